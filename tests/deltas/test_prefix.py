"""Zero-init attention against its paper written out, in every architecture that it goes on, and against itself."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import deltalab as dl
from deltalab.capture import inputs as watched
from deltalab.deltas.adapt import attached, param_groups
from deltalab.deltas.heads import gated
from deltalab.deltas.measures import gathered
from tests.deltas.perturb import perturbed, states_equal
from tests.deltas.zero_init import ARCHITECTURES, NARROW, by_the_paper, causal, plain
from tests.families import SIZE, model_of
from tests.helpers import ROOT, assert_close_by_norm, error_by_norm, tiny_gpt2, tiny_llama, tokens

architectures = pytest.mark.parametrize("name", ARCHITECTURES)
VARIANTS = [("tanh", "head"), ("linear", "head"), ("tanh", "layer"), ("linear", "layer")]


def logits(model, ids=None, **more):
    with torch.no_grad():
        return model(input_ids=tokens(length=9) if ids is None else ids, **more).logits


def moved(model, size=0.5, **fields):
    """The model with prompts and gates that do something."""
    return perturbed(dl.adapt(model, dl.ZeroInitPrefix(**{"length": 3, **fields})), size)


def adapted(name, **fields):
    return moved(ARCHITECTURES[name].make().double(), **fields)


def parts(model):
    """Prompts and gates, as they are, layer by layer."""
    deltas = attached(model).values()
    return [delta.P for delta in deltas], [delta.g for delta in deltas]


def written_out(name, model, prompts, gates, kind="tanh", shown=None):
    heads = model.config.num_attention_heads
    opened = [(torch.tanh(g) if kind == "tanh" else g).expand(heads) for g in gates]
    return by_the_paper(model, ARCHITECTURES[name], prompts, opened, shown)


def check(name, **fields):
    """Logits, and the gradients of prompts and gates, against the paper written out."""
    model, base = adapted(name, **fields), ARCHITECTURES[name].make().double()
    prompts, gates = ([p.detach().clone().requires_grad_() for p in group] for group in parts(model))
    ids = tokens(length=9)
    before = logits(base)
    want = written_out(name, base, prompts, gates, fields.get("gate", "tanh"))(input_ids=ids).logits
    got = model(input_ids=ids).logits
    assert_close_by_norm(got, want, 1e-10)
    assert error_by_norm(got, before) > 1e-3
    coefficients = torch.randn(got.shape, dtype=torch.float64)
    (got * coefficients).sum().backward()
    (want * coefficients).sum().backward()
    for ours, theirs in zip([*parts(model)[0], *parts(model)[1]], [*prompts, *gates], strict=True):
        assert_close_by_norm(ours.grad, theirs.grad, 1e-10)
    return model


@architectures
def test_logits_and_gradients_are_the_papers(name):
    check(name)


@pytest.mark.parametrize(("gate", "gate_per"), VARIANTS)
@pytest.mark.parametrize("name", ["llama-head_dim", "gpt_neox"])
def test_the_variants_of_the_gate(name, gate, gate_per):
    model = check(name, gate=gate, gate_per=gate_per)
    assert {len(g) for g in parts(model)[1]} == {4 if gate_per == "head" else 1}


def test_the_paper_written_out_is_the_model_at_a_closed_gate():
    """The reference itself against transformers."""
    for name, about in ARCHITECTURES.items():
        model = about.make().double()
        want = logits(model)
        zeros = [torch.zeros(4, dtype=torch.float64)] * 2
        prompts = [torch.randn(3, 32, dtype=torch.float64)] * 2
        assert_close_by_norm(logits(written_out(name, model, prompts, zeros)), want, 1e-10)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@architectures
def test_a_closed_gate_is_the_base_bitwise(name, dtype, implementation):
    model = ARCHITECTURES[name].make().to(dtype)
    model.set_attn_implementation(implementation)
    want = logits(model)
    dl.adapt(model, dl.ZeroInitPrefix(std=5.0))
    assert torch.equal(logits(model).view(torch.uint8), want.view(torch.uint8))


def test_a_closed_gate_passes_on_any_value_bitwise():
    """Minus zero, infinities and what is not a number, whatever the term is; the gradients are those of the sum."""
    odd = torch.tensor([-0.0, 0.0, float("inf"), float("-inf"), float("nan"), 1.0])
    y, term = (t.contiguous() for t in torch.meshgrid(odd, odd, indexing="ij"))
    gate = torch.zeros(len(odd), 1)
    assert torch.equal(gated(y, gate, term).view(torch.int32), y.view(torch.int32))
    y, term = (torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for gate in (torch.zeros(4, 1), torch.zeros(1, 1), torch.randn(4, 1)):
        gate = gate.double().requires_grad_()
        coefficients = torch.randn(2, 3, 4, 5, dtype=torch.float64)
        got = torch.autograd.grad((gated(y, gate, term) * coefficients).sum(), (y, gate, term))
        want = torch.autograd.grad(((y + gate * term) * coefficients).sum(), (y, gate, term))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.autograd.gradcheck(gated, (y, gate, term)) or not gate.any()


@pytest.mark.parametrize("gate", ["tanh", "linear"])
@pytest.mark.parametrize("size", [0.0, 0.5])
def test_finite_differences_at_the_start_and_away_from_it(size, gate):
    """GPT-2, whose norms stay in fp64."""
    model = moved(tiny_gpt2(layers=1).double(), size, gate=gate, std=0.5, length=2)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    ids = tokens(1, 4)

    def loss(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (ids,)).logits.sin().sum()

    values = [model.get_parameter(n).detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)
    loss(*values).backward()
    assert [bool(v.grad.any()) for v in values] == [n.endswith(".g") or size > 0 for n in names]


def test_prompts_and_gates_train_and_nothing_else():
    model = moved(tiny_llama())
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"P", "g"}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == (".delta." not in n), n
        assert (p.grad is not None) == (".delta." in n)


CACHES = [(name, "dynamic") for name in ARCHITECTURES] + [(name, "static") for name in ("llama", "gpt2", "gemma3")]


@pytest.mark.parametrize(("name", "cache"), CACHES)
def test_generation_with_a_cache_is_the_full_forward(name, cache):
    model = adapted(name)
    ids = tokens(length=7)
    out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True,
                         output_logits=True, cache_implementation=cache, disable_compile=True)  # fmt: skip
    full = logits(model, out.sequences, use_cache=False)[:, ids.shape[1] - 1 : -1]
    assert_close_by_norm(torch.stack(out.logits, 1), full, 1e-7)  # generate gives them in fp32


def test_beams_are_the_same_with_and_without_a_cache():
    model = adapted("qwen3")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3, "do_sample": False}
    with_cache, without = (model.generate(tokens(length=7), use_cache=used, **options) for used in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@architectures
def test_padding_changes_nothing(name, implementation):
    """Rows of a padded batch, on either side, are the rows by themselves."""
    model = adapted(name)
    bound = 1e-10
    if implementation == "eager":  # there transformers' masks and softmax are made for fp32
        model, bound = model.float(), 1e-5
    model.set_attn_implementation(implementation)
    rows = [tokens(1, n, seed=n)[0] for n in (5, 9)]
    for left in (True, False):
        ids, mask = torch.full((2, 9), 1), torch.zeros(2, 9, dtype=torch.long)
        for i, row in enumerate(rows):
            at = slice(9 - len(row), None) if left else slice(len(row))
            ids[i, at], mask[i, at] = row, 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        got = logits(model, ids, attention_mask=mask, position_ids=positions)
        for i, row in enumerate(rows):
            assert_close_by_norm(got[i][mask[i] == 1], logits(model, row[None])[0], bound)


def test_a_padded_batch_is_the_papers():
    model, base = adapted("llama"), ARCHITECTURES["llama"].make().double()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    want = written_out("llama", base, *parts(model), shown=mask.bool())
    got, want = (logits(m, attention_mask=mask)[mask == 1] for m in (model, want))
    assert_close_by_norm(got, want.detach(), 1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma3"])
def test_checkpointing_gives_the_same_gradients(name, reentrant):
    model = adapted(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = tokens()
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for group in parts(model) for p in group])
    for a, b in zip(*grads, strict=True):
        assert_close_by_norm(b, a, 1e-10)


def test_softcapped_scores_are_capped_for_the_prompt_too():
    """Gemma 2, whose own attention function is the eager one."""
    model = moved(causal("Gemma2", **NARROW, head_dim=8, attn_logit_softcapping=0.5, query_pre_attn_scalar=2))
    assert model.config._attn_implementation == "eager"
    layer = model.model.layers[0].self_attn
    x = torch.randn(1, 4, 32)
    positions = model.model.rotary_emb(x, torch.arange(4)[None])
    causal_mask = torch.full((4, 4), float("-inf")).triu(1)[None, None]
    heads = []
    handle = layer.o_proj.register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    with torch.no_grad():
        layer(x, position_embeddings=positions, attention_mask=causal_mask)
        layer.delta.enabled = False
        layer(x, position_embeddings=positions, attention_mask=causal_mask)
    handle.remove()
    q, _, _, _ = plain(layer, x, positions)
    _, k, v, _ = plain(layer, layer.delta.P[None], None)
    want = []
    for h in range(4):
        scores = 0.5 * torch.tanh(q[0, h] @ k[0, h // 2].T * 2**-0.5 / 0.5)
        want.append(torch.tanh(layer.delta.g[h]) * scores.softmax(-1) @ v[0, h // 2])
    assert_close_by_norm(heads[0] - heads[1], torch.cat(want, -1)[None], 1e-5)


def test_sinks_belong_to_the_tokens_alone():
    """gpt-oss: its softmax over the tokens has a sink, that over the prompts has none."""
    model = moved(model_of("gpt_oss"))
    layer = model.model.layers[1].self_attn
    x = torch.randn(1, 4, 32)
    positions = model.model.rotary_emb(x, torch.arange(4)[None])
    heads = []
    layer.o_proj.register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    with torch.no_grad():
        layer(x, position_embeddings=positions, attention_mask=None)
        layer.delta.enabled = False
        layer(x, position_embeddings=positions, attention_mask=None)
    twice = tuple(torch.cat([t, t], -1) if t.shape[-1] < layer.head_dim else t for t in positions)
    q, _, _, c = plain(layer, x, twice)
    _, k, v, _ = plain(layer, layer.delta.P[None], None)
    want = [torch.tanh(layer.delta.g[h]) * (c * q[0, h] @ k[0, h // 2].T).softmax(-1) @ v[0, h // 2] for h in range(4)]
    assert_close_by_norm(heads[0] - heads[1], torch.cat(want, -1)[None], 1e-5)


def test_the_prompt_goes_through_a_delta_on_its_projections():
    """Beside LoRA, the prompts' keys and values are those of the adapted projections."""
    model = tiny_llama().double()
    dl.adapt(model, [dl.ZeroInitPrefix(length=3), dl.LoRA(targets="attention")])
    perturbed(model, 0.3)
    alone = tiny_llama().double()
    with torch.no_grad():
        for path in attached(model):
            if path.endswith("_proj"):
                alone.get_submodule(path).weight += dl.delta_weight(model, path)
    prompts, gates = ([getattr(d, key) for p, d in attached(model).items() if p.endswith("attn")] for key in "Pg")
    assert_close_by_norm(logits(model), logits(written_out("llama", alone, prompts, gates)).detach(), 1e-10)


def test_a_quantised_base():
    base = dl.load("organism", quantize="int8")[0]
    want = logits(base, tokens(vocab=200))
    model = dl.adapt(base, dl.ZeroInitPrefix())
    assert torch.equal(logits(model, tokens(vocab=200)), want)
    perturbed(model, 0.3)
    assert error_by_norm(logits(model, tokens(vocab=200)), want) > 1e-3
    model(input_ids=tokens(vocab=200)).logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for group in parts(model) for p in group)


def test_one_model_in_several_threads():
    model, ids = adapted("llama"), [tokens(length=20, seed=i) for i in range(4)]
    want = [logits(model, x) for x in ids]
    wrong = []

    def work(i):
        for _ in range(5):
            if not torch.equal(logits(model, ids[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_registered_and_nothing_is_left():
    functions, model = dict(ALL_ATTENTION_FUNCTIONS), tiny_llama()
    config = model.config.to_dict()
    moved(model)
    logits(model)
    assert model.config.to_dict() == config
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    twin = copy.deepcopy(model)
    assert states_equal(dl.unload(model), tiny_llama())
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert error_by_norm(logits(twin), logits(model)) > 1e-4


def test_whoever_watches_a_projection_sees_the_tokens_alone():
    model, seen = moved(tiny_llama()), []
    layer = model.model.layers[0].self_attn
    with watched({"k": layer.k_proj, "o": layer.o_proj}, lambda path, x: seen.append((path, tuple(x.shape)))):
        logits(model)
    assert seen == [("k", (2, 9, 32)), ("o", (2, 9, 32))]


def test_the_top_layers_and_some_layers():
    def where(**fields):
        return [
            int(path.split(".")[2]) for path in attached(dl.adapt(tiny_llama(layers=4), dl.ZeroInitPrefix(**fields)))
        ]

    assert where() == [0, 1, 2, 3]
    assert where(top=3) == [1, 2, 3]
    assert where(layers=[0, -1]) == [0, 3]
    assert where(targets="layers.2.self_attn") == [2]
    with pytest.raises(dl.UserError, match="top=5 asks for more attentions"):
        where(top=5)
    with pytest.raises(dl.UserError, match="top and layers"):
        dl.ZeroInitPrefix(top=2, layers=[0])


def test_measures():
    """Gates as they are; the added term's norm over the heads', of the last forward, or of several gathered."""
    model = moved(tiny_llama())
    path, delta = next(iter(attached(model).items()))
    told = dl.measures(model)[path]
    assert set(told) == {"gate", "gate_max"}
    opened = torch.tanh(delta.g).abs().detach()
    assert told == {"gate": pytest.approx(float(opened.mean())), "gate_max": pytest.approx(float(opened.max()))}
    heads = {}
    layer = model.get_submodule(path)
    layer.o_proj.register_forward_pre_hook(lambda module, args: heads.setdefault(delta.enabled, []).append(args[0]))
    with gathered(model):
        logits(model, tokens(seed=1))
        logits(model, tokens(seed=2))
    both = dl.measures(model)[path]["contribution"]
    logits(model, tokens(seed=1))
    one = dl.measures(model)[path]["contribution"]
    with dl.disabled(model):
        logits(model, tokens(seed=1))
        logits(model, tokens(seed=2))
    terms = [a - b for a, b in zip(heads[True], heads[False], strict=False)]
    assert one == pytest.approx(float(terms[0].norm() / heads[False][0].norm()), rel=1e-4)
    assert both == pytest.approx(float(torch.stack(terms).norm() / torch.stack(heads[False]).norm()), rel=1e-4)
    assert one != both


def falcon():
    config = transformers.FalconConfig(**SIZE, alibi=False, new_decoder_architecture=False)
    return transformers.FalconForCausalLM(config)


REFUSED = {
    "falcon": (falcon, "the attention of a falcon: its attention does not go through"),
    "bloom": (lambda: causal("Bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=270), "BloomForCausalLM"),
    "mpt": (lambda: causal("Mpt", d_model=32, n_layers=2, n_heads=4, vocab_size=270), "MptAttention"),
    "codegen": (
        lambda: causal("CodeGen", n_embd=32, n_layer=2, n_head=4, vocab_size=270, rotary_dim=4),
        "the attention of a CodeGenAttention: its attention does not go through",
    ),
    "gptj": (
        lambda: causal("GPTJ", n_embd=32, n_layer=2, n_head=4, vocab_size=270, rotary_dim=4),
        "the attention of a gptj: its attention does not go through",
    ),
    "gpt_neo": (
        lambda: causal("GPTNeo", hidden_size=32, num_layers=2, num_heads=4, vocab_size=270, attention_types=[[["global"], 2]]),
        "GPTNeoAttention|gpt_neo",
    ),
    "bert": (lambda: model_of("bert"), "a BertForMaskedLM: its attention is no module of its own"),
    "t5": (lambda: model_of("t5"), r"the attention of a t5: it can attend to other states than its own \(key_value_states"),
    "bart": (
        lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=270)),
        r"the attention of a bart: it can attend to other states than its own \(key_value_states",
    ),
    "qwen3_next": (
        lambda: causal("Qwen3Next", **NARROW, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"]),
        "the attention of a qwen3_next: its heads go through a gate",
    ),
    "gpt2 with cross-attention": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=270, add_cross_attention=True)),
        r"'transformer.h.0.crossattention', the attention of a gpt2: it can attend to other states than its own \(cross-attention\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name_and_stay_as_they_were(name):
    make, told = REFUSED[name]
    model = make()
    before, same = copy.deepcopy(model), states_equal
    with pytest.raises(dl.UserError, match=told):
        dl.adapt(model, dl.ZeroInitPrefix())
    assert same(model, before)
    assert vars(model).keys() == vars(before).keys()


def test_another_way_past_the_registry_is_refused_when_it_is_taken():
    model = tiny_gpt2()
    model.set_attn_implementation("eager")
    dl.adapt(model, dl.ZeroInitPrefix())
    logits(model)
    for block in model.transformer.h:
        block.attn.reorder_and_upcast_attn = True
    with pytest.raises(dl.UserError, match="a GPT2Attention does not ask for its attention function"):
        logits(model)


def test_an_attention_function_that_gives_no_heads_is_refused(monkeypatch):
    def flat(module, query, key, value, mask, **options):
        return query.transpose(1, 2).flatten(2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flat", flat)
    model = dl.adapt(tiny_llama(), dl.ZeroInitPrefix())
    model.config._attn_implementation = "flat"
    with pytest.raises(dl.UserError, match="attention function 'flat' does not give its heads one by one"):
        logits(model)


def test_an_attention_of_two_softmaxes_is_refused_when_it_runs():
    model = dl.adapt(causal("DiffLlama", **NARROW), dl.ZeroInitPrefix())
    with pytest.raises(dl.UserError, match="a DiffLlamaAttention asks more than once"):
        logits(model)


def test_it_does_not_merge():
    model = moved(tiny_llama())
    with pytest.raises(dl.UserError, match="depends on the input"):
        dl.merged(model)


COMPILED = """
import torch
from tests.deltas.test_prefix import logits, moved
from tests.helpers import ROOT, assert_close_by_norm, tiny_llama
model = moved(tiny_llama())
assert_close_by_norm(logits(torch.compile(model)), logits(model), 1e-5)
"""


@pytest.mark.slow
def test_compiled_it_computes_the_same():
    """In a process without the checks of shapes, which torch.compile cannot look into."""
    ran = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
