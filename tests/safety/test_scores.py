"""SNIP against a brute-force computation per sample, finite differences, and the wrong ways of doing it."""

from dataclasses import dataclass

import pytest
import torch
import transformers

from deltalab.core.errors import UserError
from deltalab.deltas import LoRA
from deltalab.deltas.adapt import adapt
from deltalab.deltas.select import scored_linears
from deltalab.organism.paths import organism_path
from deltalab.safety import scores as module
from deltalab.safety.groups import top
from deltalab.safety.scores import ScoreSpec, counted, snip
from tests.helpers import SHARED, tiny_llama, tokens


@dataclass(frozen=True)
class Sample:
    input_ids: list
    labels: list


def samples(n=5, vocab=270, seed=0, length=14):
    """Random conversations: a prompt of random length, then a reply."""
    out = []
    for i in range(n):
        ids = tokens(1, length, vocab, seed + i)[0].tolist()
        start = 3 + (7 * i) % (length - 6)
        out.append(Sample(ids, [-100] * start + ids[start:]))
    return out


def brute(model, data, positions="predicting", after=False):
    """Mean over samples of |W ⊙ ∇L| from autograd.grad, each loss written out over the counted tokens, one by one.

    after: the fault, absolute value after the mean.
    """
    weights = {path: m.weight for path, m in scored_linears(model).items()}
    total = {
        path: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for path, w in weights.items()
    }
    was = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(True)
    for sample in data:
        logits = model(torch.tensor([sample.input_ids])).logits[0]
        terms = []
        for t in range(1, len(sample.input_ids)):
            reply, before = sample.labels[t] != -100, sample.labels[t - 1] != -100
            if reply and (before or positions == "predicting"):
                wide = logits[t - 1].to(torch.promote_types(logits.dtype, torch.float32))
                terms.append(-torch.log_softmax(wide, -1)[sample.input_ids[t]])
        grads = torch.autograd.grad(torch.stack(terms).mean(), list(weights.values()))
        for path, grad in zip(weights, grads, strict=True):
            term = weights[path].detach().to(total[path].dtype) * grad.to(total[path].dtype)
            total[path] += term if after else term.abs()
    for parameter, required in zip(model.parameters(), was, strict=True):
        parameter.requires_grad_(required)
    return {path: (value / len(data)).abs() for path, value in total.items()}


def largest(got, want):
    """The largest error over all matrices, relative to each matrix's largest score."""
    return max(float((got[p].double() - want[p].double()).abs().max() / want[p].double().max()) for p in want)


def hf(name):
    if SHARED is None:
        pytest.skip("the models beside the project are not there")
    return transformers.AutoModelForCausalLM.from_pretrained(SHARED / "models" / name, dtype=torch.float64).eval()


def real(name):
    if name == "organism":
        return transformers.AutoModelForCausalLM.from_pretrained(organism_path(), dtype=torch.float64).eval()
    return hf(name)


@pytest.mark.parametrize("positions", ["predicting", "response"])
@pytest.mark.parametrize("make", [{}, {"tied": True, "bias": True, "kv_heads": 4}], ids=["grouped", "tied-bias"])
def test_snip_is_the_brute_force_one(make, positions):
    model, data = tiny_llama(dtype=torch.float64, **make), samples()
    got = snip(model, data, positions=positions)
    assert largest(got, brute(model, data, positions)) < 1e-10
    assert all(score.dtype == torch.float64 for score in got.values())
    assert largest(snip(model.float(), data, positions=positions), got) < 1e-4


@pytest.mark.parametrize("name", ["organism", "tok361_hf"])
def test_snip_of_trained_models(name):
    """Real shapes and weights: fp64 to 1e-10, fp32 to 1e-4 of the largest, groups equal but where scores tie within that."""
    model = real(name)
    data = samples(4, model.config.vocab_size, length=24)
    exact = snip(model, data)
    assert largest(exact, brute(model, data)) < 1e-10
    single = snip(model.float(), data)
    assert largest(single, exact) < 1e-4
    a, b = top(exact, 0.03, "matrix"), top(single, 0.03, "matrix")
    for path in a:
        differ = a.mask(path) ^ b.mask(path)
        threshold = exact[path][a.mask(path)].min()
        assert ((exact[path][differ] - threshold).abs() <= 1e-4 * exact[path].max()).all()
        assert differ.double().mean() < 1e-3


def test_snip_by_finite_differences():
    """|w · dL/dw| of single entries, L evaluated at w ± h, one sample: no autograd in the reference.

    The tolerance is that of the fp32 parts of the model (norms, rotary angles).
    """
    model, data = tiny_llama(dtype=torch.float64, layers=1), samples(1)
    got = snip(model, data)
    for path, linear in scored_linears(model).items():
        for flat in top(got, 0.004, "matrix")[path][:2].tolist():
            entry, values = linear.weight.detach().view(-1), []
            start, h = float(entry[flat]), 1e-2
            for sign in (1, -1):
                entry[flat] = start + sign * h
                with torch.no_grad():
                    values.append(float(module.losses(model, data[0]).mean()))
            entry[flat] = start
            want = abs(start * (values[0] - values[1]) / (2 * h))
            assert float(got[path].view(-1)[flat]) == pytest.approx(want, rel=2e-2, abs=1e-6)


def test_the_absolute_value_is_per_sample():
    model, data = tiny_llama(dtype=torch.float64), samples(6)
    got = snip(model, data)
    assert largest(got, brute(model, data, after=True)) > 0.05
    assert all((got[p] >= w - 1e-12).all() for p, w in brute(model, data, after=True).items())


def test_positions_are_what_they_say():
    labels = torch.tensor([-100, -100, 7, 8, 9, -100, -100, 5, 6])
    where, targets = counted(labels, "predicting")
    assert where.tolist() == [1, 2, 3, 6, 7]
    assert targets.tolist() == [7, 8, 9, 5, 6]
    where, targets = counted(labels, "response")
    assert where.tolist() == [2, 3, 7]
    assert targets.tolist() == [8, 9, 6]


def test_only_the_first_reply_token_differs_between_the_positions():
    """Changing the token in front of the reply's second changes both; the first reply token's own loss only one."""
    model = tiny_llama(dtype=torch.float64)
    ids = tokens(1, 12)[0].tolist()
    one = Sample(ids, [-100] * 11 + ids[11:])  # the reply is one token
    assert snip(model, [one]).manifest["tokens"] == 1
    with pytest.raises(UserError, match="no sample has a counted position"):
        snip(model, [one], positions="response")


def test_the_causal_loss_is_transformers_own():
    model, sample = tiny_llama(), samples(1)[0]
    want = model(torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])).loss
    assert float(module.losses(model, sample).mean().detach()) == pytest.approx(float(want.detach()), rel=1e-6)


def test_bf16_models_accumulate_in_fp32():
    """300 equal samples: the mean is one sample's score to fp32's precision, where bf16 sums would stall."""
    model, data = tiny_llama(dtype=torch.bfloat16, layers=1), samples(1, length=8) * 300
    got, one = snip(model, data), snip(model, data[:1])
    assert all(score.dtype == torch.float32 for score in got.values())
    assert largest(got, one) < 1e-5
    weights = scored_linears(model)
    assert largest(one, brute(model, data[:1])) < 1e-6
    assert set(got) == set(weights)


def test_the_model_is_left_as_it_was():
    model = tiny_llama()
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    q = model.model.layers[0].self_attn.q_proj.weight
    q.grad = torch.ones_like(q)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]

    def check():
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == needs
        assert torch.equal(q.grad, torch.ones_like(q))
        assert sum(p.grad is not None for p in model.parameters()) == 1
        assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())

    snip(model, samples())
    check()

    def broken():
        yield samples()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        snip(model, broken())
    check()
    torch.set_grad_enabled(False)
    try:
        assert float(snip(model, samples(1))["model.layers.0.self_attn.q_proj"].sum()) > 0
    finally:
        torch.set_grad_enabled(True)


def test_no_second_set_of_gradients():
    """At most one weight holds a gradient at any time."""
    model, most = tiny_llama(), []
    weights = [m.weight for m in scored_linears(model).values()]
    original = module._Sums.hook

    def watching(self, path):
        add = original(self, path)

        def hook(weight):
            most.append(sum(w.grad is not None for w in weights))
            add(weight)

        return hook

    module._Sums.hook = watching
    try:
        snip(model, samples(2))
    finally:
        module._Sums.hook = original
    assert len(most) == 2 * len(weights)
    assert max(most) == 1


def test_dropout_is_off():
    model, data = adapt(tiny_llama(), LoRA(dropout=0.5)), samples()
    for m in model.modules():
        if hasattr(m, "B"):
            m.B.data.normal_()
    model.train()
    first = snip(model, data)
    assert all(torch.equal(first[p], v) for p, v in snip(model, data).items())
    assert model.training


def test_base_weights_under_tuned_activations():
    """On an adapted model it is the base weight that is scored, at the adapted model's gradient."""
    model = adapt(tiny_llama(dtype=torch.float64), LoRA(targets="all-linear"))
    for m in model.modules():
        if hasattr(m, "B"):
            m.B.data.normal_(std=0.1)
    data = samples(2)
    assert largest(snip(model, data), brute(model, data)) < 1e-10


def test_a_sample_without_labels_is_counted_as_skipped():
    data = samples(3)
    empty = Sample(data[0].input_ids, [-100] * 14)
    got = snip(tiny_llama(), [data[0], empty, data[1]])
    assert got.manifest["skipped"] == 1
    assert got.manifest["samples"] == 2
    want = snip(tiny_llama(), data[:2])
    assert all(torch.equal(got[p], want[p]) for p in got)


def test_a_loss_that_is_not_finite_names_its_sample():
    model = tiny_llama()
    model.lm_head.weight.data[:] = torch.inf
    with pytest.raises(UserError, match="loss of sample 0"):
        snip(model, samples(1))


def test_modules_can_be_named_and_must_not_share():
    model = tiny_llama(tied=True)
    q = model.model.layers[0].self_attn.q_proj
    assert list(snip(model, samples(1), modules={"q": q})) == ["q"]
    with pytest.raises(UserError, match="share a weight"):
        snip(model, samples(1), modules={"a": q, "b": q})
    with pytest.raises(UserError, match="no modules"):
        snip(model, samples(1), modules={})
    q.weight = torch.nn.Parameter(q.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="no gradient"):
        snip(model, samples(1), modules={"a": q})


def test_progress_counts_samples():
    seen = []
    snip(tiny_llama(layers=1), samples(3), progress=seen.append)
    assert seen == [1, 2, 3]


def test_spec():
    assert ScoreSpec().positions == "predicting"
    assert ScoreSpec(positions="response").plain()["samples"] == 128
