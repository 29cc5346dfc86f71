"""Zero-init attention in a model at work: caches, padding, threads; where it does not go; and what it leaves alone."""

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
from tests.deltas.perturb import perturbed, states_equal
from tests.deltas.zero_init import ARCHITECTURES, NARROW, adapted, causal, logits, moved, parts, written_out
from tests.families import SIZE, model_of
from tests.helpers import ROOT, assert_close_by_norm, error_by_norm, tiny_gpt2, tiny_llama, tokens

architectures = pytest.mark.parametrize("name", ARCHITECTURES)


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
from tests.deltas.zero_init import logits, moved
from tests.helpers import ROOT, assert_close_by_norm, tiny_llama
model = moved(tiny_llama())
assert_close_by_norm(logits(torch.compile(model)), logits(model), 1e-5)
"""


@pytest.mark.slow
def test_compiled_it_computes_the_same():
    """In a process without the checks of shapes, which torch.compile cannot look into."""
    ran = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
