"""Zero-init attention against its paper written out, in every architecture that it goes on."""

import pytest
import torch

import deltalab as dl
from deltalab.deltas.adapt import attached, param_groups
from deltalab.deltas.heads import gated
from deltalab.deltas.measures import gathered
from deltalab.kernels.attention import NAMES
from tests.deltas.perturb import perturbed
from tests.deltas.zero_init import ARCHITECTURES, NARROW, adapted, causal, logits, moved, parts, plain, written_out
from tests.families import model_of
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_gpt2, tiny_llama, tokens

architectures = pytest.mark.parametrize("name", ARCHITECTURES)
VARIANTS = [("tanh", "head"), ("linear", "head"), ("tanh", "layer"), ("linear", "layer")]


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


def test_softcapped_scores_are_capped_for_the_prompt_too():
    """Gemma 2, whose own attention function is the eager one."""
    model = moved(causal("Gemma2", **NARROW, head_dim=8, attn_logit_softcapping=0.5, query_pre_attn_scalar=2))
    assert model.config._attn_implementation == NAMES["eager"]
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


@pytest.mark.parametrize("fused", [False, True])
def test_evaluation_after_a_step_sees_the_step(fused):
    """torch's fused AdamW changes values and no version: prompts' keys that an earlier evaluation kept are not used again."""
    model = perturbed(dl.adapt(tiny_llama(), dl.ZeroInitPrefix(length=3)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5, fused=fused)
    ids = tokens()
    for _ in range(2):
        model.eval()
        with torch.no_grad():
            before = model(ids).logits
        model.train()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            after = model(ids).logits
        want = model(ids).logits.detach()  # with gradients nothing is kept
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, want)
