"""Scores against their definitions (reference.py), finite differences, and the wrong ways of computing them."""

import pytest
import torch
import transformers

from deltalab.core.errors import UserError
from deltalab.core.spec import build
from deltalab.deltas import LoRA
from deltalab.deltas.adapt import adapt
from deltalab.deltas.select import scored_linears
from deltalab.organism.paths import organism_path
from deltalab.safety.groups import top
from deltalab.safety.scores import ScoreSpec, counted, magnitude, random_scores, score, snip, taken, wanda
from tests.deltas.perturb import perturbed
from tests.helpers import SHARED, tiny_gpt2, tiny_llama, tokens
from tests.safety.reference import BRUTE, Sample, brute_snip, brute_wanda, largest, magnitudes, nll, ragged, samples

POSITIONS = ["predicting", "response", "first-2"]
MODES = [{}, {"mode": "streamed", "blocks": 1}]


def real(name):
    path = organism_path() if name == "organism" else SHARED / "models" / name
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


REAL = [
    "organism",
    pytest.param(
        "tok361_hf",
        marks=[pytest.mark.shared, pytest.mark.skipif(SHARED is None, reason="no models beside the project")],
    ),
]


@pytest.mark.parametrize("mode", MODES, ids=["resident", "streamed"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("make", [{}, {"tied": True, "bias": True, "kv_heads": 4}], ids=["grouped", "tied-bias"])
def test_snip_is_the_brute_force_one(make, positions, mode):
    """In padded batches, against one sample at a time."""
    model, data = tiny_llama(dtype=torch.float64, **make), ragged()
    got = snip(model, data, positions=positions, batch=3, **mode)
    assert largest(got, brute_snip(model, data, positions)) < 1e-10
    assert all(score.dtype == torch.float64 for score in got.values())
    assert (got.manifest["samples"], got.manifest["skipped"]) == (6, 1)
    assert largest(snip(model.float(), data, positions=positions, batch=3, **mode), got) < 1e-4


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("make", [{}, {"tied": True, "bias": True, "kv_heads": 4}], ids=["grouped", "tied-bias"])
def test_wanda_is_the_brute_force_one(make, positions):
    model, data = tiny_llama(dtype=torch.float64, **make), ragged()
    got = wanda(model, data, positions=positions, batch=3)
    want = brute_wanda(model, data, positions)
    assert largest(got, want) < 1e-10
    assert all(score.dtype == torch.float64 for score in got.values())
    single = wanda(model.float(), data, positions=positions, batch=3)
    assert all(score.dtype == torch.float32 for score in single.values())
    assert largest(single, want) < 1e-4


SCORES = [("snip", {}), ("snip", {"mode": "streamed", "blocks": 2}), ("wanda", {})]


@pytest.mark.parametrize(("kind", "mode"), SCORES, ids=["snip", "snip-streamed", "wanda"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", REAL)
def test_scores_of_trained_models(name, positions, kind, mode):
    """Real shapes and weights: fp64 to 1e-10, fp32 to 1e-4 of the largest, groups equal but where scores tie within that."""
    model = real(name)
    data, spec = ragged(4, model.config.vocab_size), ScoreSpec(score=kind, positions=positions, batch=2, **mode)
    exact = score(model, data, spec)
    assert largest(exact, BRUTE[kind](model, data, positions)) < 1e-10
    exact = {path: exact[path] for path in exact}
    single = score(model.float(), data, spec)
    assert largest(single, exact) < 1e-4
    a, b = top(exact, 0.03, "matrix"), top(single, 0.03, "matrix")
    for path in a:
        differ = a.mask(path) ^ b.mask(path)
        threshold = exact[path][a.mask(path)].min()
        assert ((exact[path][differ] - threshold).abs() <= 1e-4 * exact[path].max()).all()
        assert differ.double().mean() < 1e-3


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_batch_changes_nothing(batch):
    model, data = tiny_llama(dtype=torch.float64), ragged()
    assert largest(snip(model, data, batch=batch), snip(model, data, batch=4)) < 1e-12
    assert largest(wanda(model, data, batch=batch), wanda(model, data, batch=4)) < 1e-12


def test_modes_do_the_same_operations():
    """Bitwise on the CPU, whatever the groups of blocks."""
    model, data = tiny_llama(layers=5), ragged()
    resident = snip(model, data, batch=3)
    for blocks in (1, 2, 5):
        streamed = snip(model, data, batch=3, mode="streamed", blocks=blocks)
        assert list(streamed) == list(resident)
        assert all(torch.equal(streamed[p], resident[p]) for p in resident)


@pytest.mark.parametrize("kind", ["snip", "wanda"])
@pytest.mark.parametrize("base", ["model", "weights"])
def test_the_difference_from_a_base_model(kind, base):
    model, other, data = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64, seed=1), ragged()
    given = other if base == "model" else {path: m.weight for path, m in scored_linears(other).items()}
    got = score(model, data, ScoreSpec(score=kind, base="other", batch=3), base=given)
    assert largest(got, BRUTE[kind](model, data, base=other)) < 1e-10
    assert largest(got, BRUTE[kind](model, data)) > 0.05
    assert got.manifest["base"] is not None


def test_a_base_is_loaded_by_its_name(tmp_path):
    from tests.helpers import byte_tokenizer

    tiny_llama(seed=1).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, spec = tiny_llama(), ScoreSpec(score="magnitude", base=str(tmp_path))
    want = magnitudes(model, tiny_llama(seed=1))
    assert largest(score(model, [], spec), want) < 1e-6
    with pytest.raises(UserError, match="asks for no difference"):
        score(model, [], ScoreSpec(score="magnitude"), base=model)


def test_a_base_of_another_shape_is_refused_by_name():
    with pytest.raises(UserError, match="gate_proj' has another shape"):
        magnitude(tiny_llama(), base=tiny_llama(mlp=40))
    with pytest.raises(UserError, match=r"no weight 'model\.layers\.1"):
        magnitude(tiny_llama(), base=tiny_llama(layers=1))


def test_magnitude_is_the_weights():
    model = tiny_llama(dtype=torch.bfloat16)
    got = magnitude(model)
    assert all(torch.equal(got[p], m.weight.detach().float().abs()) for p, m in scored_linears(model).items())
    assert all(value.dtype == torch.float32 for value in got.values())


def test_random_scores_are_seeded_permutations():
    model = tiny_llama()
    one, same, other = random_scores(model), random_scores(model), random_scores(model, seed=1)
    for path, module in scored_linears(model).items():
        count = module.weight.numel()
        assert torch.equal(one[path].flatten().sort().values, torch.arange(1, count + 1).double() / count)
        assert torch.equal(one[path], same[path])
        assert not torch.equal(one[path], other[path])
    assert not torch.equal(one["model.layers.0.mlp.up_proj"], one["model.layers.1.mlp.up_proj"])


@pytest.mark.parametrize("kind", ["snip", "wanda"])
def test_halves_are_the_scores_of_even_and_odd_samples(kind):
    """Counted over the samples that have a counted position: the third has none. The whole is what it is without halves."""
    model, data, spec = tiny_llama(dtype=torch.float64), ragged(), ScoreSpec(score=kind, batch=3)
    got = score(model, data, spec, halves=True)
    scored = [s for s in data if any(label != -100 for label in s.labels)]
    assert largest(got, score(model, data, spec)) < 1e-12
    for half, own in zip(got.halves, (scored[::2], scored[1::2]), strict=True):
        assert largest(half, BRUTE[kind](model, own)) < 1e-10
        assert half.manifest["samples"] == len(own)
        assert half.halves == ()
    assert [h.manifest["half"] for h in got.halves] == ["even", "odd"]
    uneven = score(model, data[:2] + data[3:4], spec, halves=True)  # two and one: the mean has to be weighted
    assert largest(uneven, BRUTE[kind](model, data[:2] + data[3:4])) < 1e-10
    with pytest.raises(UserError, match="no halves"):
        score(model, data[:1], spec, halves=True)
    assert score(model, data, spec).halves == ()


@pytest.mark.parametrize("kind", ["snip", "wanda"])
def test_gpt2s_transposed_linears(kind):
    model, data = tiny_gpt2().double(), ragged()
    got = score(model, data, ScoreSpec(score=kind, batch=3))
    assert largest(got, BRUTE[kind](model, data)) < 1e-10
    assert got["transformer.h.0.attn.c_attn"].shape == (96, 32)
    assert all(value.is_contiguous() for value in got.values())


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
                    values.append(float(nll(model, data[0])))
            entry[flat] = start
            want = abs(start * (values[0] - values[1]) / (2 * h))
            assert float(got[path].view(-1)[flat]) == pytest.approx(want, rel=2e-2, abs=1e-6)


def test_the_absolute_value_is_per_sample():
    model, data = tiny_llama(dtype=torch.float64), samples(6)
    got = snip(model, data)
    signed = brute_snip(model, data, after=True)
    assert largest(got, signed) > 0.05
    assert all((got[p] >= w - 1e-12).all() for p, w in signed.items())


def test_positions_are_what_they_say():
    labels = torch.tensor([-100, -100, 7, 8, 9, -100, -100, 5, 6])
    where, targets = counted(labels, "predicting")
    assert where.tolist() == taken(labels, "predicting").tolist() == [1, 2, 3, 6, 7]
    assert targets.tolist() == [7, 8, 9, 5, 6]
    where, targets = counted(labels, "response")
    assert where.tolist() == [2, 3, 7]
    assert targets.tolist() == [8, 9, 6]
    assert taken(labels, "response").tolist() == [2, 3, 4, 7, 8]
    assert counted(labels, "first-4")[0].tolist() == taken(labels, "first-4").tolist() == [1, 2, 3, 6]
    assert counted(labels, "first-4")[1].tolist() == [7, 8, 9, 5]
    assert taken(labels, "first-99").tolist() == [1, 2, 3, 6, 7]


def test_only_the_first_reply_token_differs_between_the_positions():
    """Changing the token in front of the reply's second changes both; the first reply token's own loss only one."""
    model = tiny_llama(dtype=torch.float64)
    ids = tokens(1, 12)[0].tolist()
    one = Sample(ids, [-100] * 11 + ids[11:])  # the reply is one token
    assert snip(model, [one]).manifest["tokens"] == wanda(model, [one], positions="response").manifest["tokens"] == 1
    with pytest.raises(UserError, match="no sample has a counted position"):
        snip(model, [one], positions="response")


def test_the_causal_loss_is_transformers_own():
    model, data = tiny_llama(), samples(2)
    from deltalab.safety.calibration import Calibration
    from deltalab.safety.snip import mean_nll

    (batch,) = Calibration(data, "predicting", "loss").batches(2, model)
    got = mean_nll(model, batch)
    for value, sample in zip(got, data, strict=True):
        want = model(torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])).loss
        assert float(value.detach()) == pytest.approx(float(want.detach()), rel=1e-6)


def test_bf16_models_accumulate_in_fp32():
    """300 equal samples: the mean is one sample's score to fp32's precision, where bf16 sums would stall."""
    model, data = tiny_llama(dtype=torch.bfloat16, layers=1), samples(1, length=8) * 300
    got, one = snip(model, data), snip(model, data[:1])
    assert all(score.dtype == torch.float32 for score in got.values())
    assert largest(got, one) < 1e-5
    # autograd rounds a weight's gradient to bf16 at the end, our products are kept in fp32: half a unit of 2⁻⁷ apart
    assert largest(one, brute_snip(model, data[:1])) < 2**-7
    norms, first = wanda(model, data), wanda(model, data[:1])
    assert largest(norms, {p: first[p].double() * 300**0.5 for p in first}) < 1e-5


def test_dropout_is_off():
    model, data = perturbed(adapt(tiny_llama(), LoRA(dropout=0.5)), size=1), samples()
    model.train()
    first = snip(model, data)
    assert all(torch.equal(first[p], v) for p, v in snip(model, data).items())
    assert model.training


@pytest.mark.parametrize("kind", ["snip", "wanda"])
def test_base_weights_under_tuned_activations(kind):
    """On an adapted model it is the base weight that is scored, at the adapted model's gradient and inputs."""
    data = samples(2)
    model = perturbed(adapt(tiny_llama(dtype=torch.float64), LoRA(targets="all-linear")))
    got = score(model, data, ScoreSpec(score=kind))
    assert largest(got, BRUTE[kind](model, data)) < 1e-10
    plain = score(tiny_llama(dtype=torch.float64), data, ScoreSpec(score=kind))
    assert largest(got, plain) > 0.05
    assert got.manifest["model"] == plain.manifest["model"]
    assert got.manifest["adapted"] is not None
    assert plain.manifest["adapted"] is None


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
    with pytest.raises(UserError, match="loss of sample 1"):
        snip(model, [Sample([5, 6], [-100, -100]), *samples(1)])
    model.model.embed_tokens.weight.data[:] = torch.inf
    with pytest.raises(UserError, match="input of 'model.layers.0.self_attn.q_proj' is not finite"):
        wanda(model, samples(1))


def test_modules_can_be_named_and_must_not_share():
    model = tiny_llama(tied=True)
    q = model.model.layers[0].self_attn.q_proj
    for make in (snip, wanda):
        assert list(make(model, samples(1), modules={"q": q})) == ["q"]
        with pytest.raises(UserError, match="share a weight"):
            make(model, samples(1), modules={"a": q, "b": q})
        with pytest.raises(UserError, match="no modules"):
            make(model, samples(1), modules={})
    q.weight = torch.nn.Parameter(q.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="no gradient"):
        snip(model, samples(1), modules={"a": q})
    torch.nn.utils.parametrize.register_parametrization(
        model.model.layers[1].mlp.up_proj, "weight", torch.nn.Identity()
    )
    with pytest.raises(UserError, match="'b' has no parameter 'weight'"):
        snip(model, samples(1), modules={"b": model.model.layers[1].mlp.up_proj})


@pytest.mark.parametrize("mode", MODES, ids=["resident", "streamed"])
def test_progress_counts_samples(mode):
    seen = []
    snip(tiny_llama(layers=2), samples(3), progress=seen.append, batch=2, **mode)
    assert seen == list(range(1, 4 if not mode else 7))


def test_spec():
    assert ScoreSpec().positions == "predicting"
    assert ScoreSpec(positions="first-5", score="wanda").plain()["samples"] == 128
    for name in ("first-0", "first-", "first--1", "all", "first-1.5"):
        with pytest.raises(UserError, match="positions: positions are predicting, response, or first-K"):
            build(ScoreSpec, {"positions": name})
        with pytest.raises(UserError, match="names no positions"):
            snip(tiny_llama(), samples(), positions=name)
    with pytest.raises(UserError, match="no base"):
        build(ScoreSpec, {"score": "random", "base": "organism:base"})
    with pytest.raises(UserError, match="'stremed' is no mode"):
        snip(tiny_llama(), samples(), mode="stremed")
