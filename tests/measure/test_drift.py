"""Drift against dense merged weights in fp64, exact fractions, and the two ways of gathering against each other."""

import json
import math
from fractions import Fraction

import pytest
import torch

from deltalab.core.errors import UserError
from deltalab.deltas import LoRA, Train
from deltalab.deltas.adapt import adapt, attached, delta_weight, merged_weight
from deltalab.deltas.select import scored_linears
from deltalab.measure.drift import MEASURES, DriftProbe, drift, snapshot
from deltalab.safety.bins import bins_of
from deltalab.safety.groups import top
from deltalab.safety.nulls import Nulls
from deltalab.safety.units import units_of
from tests.helpers import tiny_llama


def perturbed(model, scale=0.05):
    for delta in attached(model).values():
        for parameter in delta.parameters():
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape).to(parameter) * scale)
    return model


def draws(model, density, seed=0):
    rng = torch.Generator().manual_seed(seed)
    group = {
        p: (torch.rand(m.weight.numel(), generator=rng) < density).nonzero()[:, 0]
        for p, m in scored_linears(model).items()
    }
    return group


def dense(w0, w1, indices, epsilon=1e-8):
    """The measures by their textbook formulas from the entries before and after, in fp64."""
    a = torch.cat([w0[p].double().flatten()[i] for p, i in indices.items()])
    b = torch.cat([w1[p].double().flatten()[i] for p, i in indices.items()])
    cosine = float(torch.dot(a, b) / (a.norm() * b.norm()))
    return {
        "entries": len(a), "cosine": cosine, "cosine_distance": 1 - cosine, "l2": float((b - a).norm()), "l2_per_sqrt": float((b - a).norm()) / math.sqrt(len(a)),
        "relative_mean": float(((b - a).abs() / (a.abs() + epsilon)).mean()), "relative_norm": float((b - a).norm() / a.norm()),
    }  # fmt: skip


def close(got, want, rel=1e-6):
    assert set(got) == set(want)
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=rel, abs=1e-12), key


def base(model):
    return {p: m.weight.detach().clone() for p, m in scored_linears(model).items()}


def now(model):
    return {p: merged_weight(model, p) for p in scored_linears(model)}


@pytest.mark.parametrize("dense_above", [0.0, 1e9], ids=["dense", "gathered"])
@pytest.mark.parametrize(
    "spec",
    [LoRA(targets="all-linear"), LoRA(targets="q,v"), Train("full"), [LoRA(targets="attention"), Train("norms")]],
    ids=str,
)
def test_drift_is_that_of_the_dense_merged_weights(spec, dense_above):
    torch.manual_seed(0)
    model = tiny_llama(seed=1)
    w0 = base(model)
    adapt(model, spec)
    perturbed(model)
    if isinstance(spec, Train):
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.01
    groups = {
        "safety": draws(model, 0.02, 1),
        "all": draws(model, 1.0),
        "half": {p: i for p, i in draws(model, 0.4, 2).items() if "layers.1" in p},
    }
    probe = DriftProbe(
        groups, {"random": [draws(model, 0.02, s) for s in range(3, 8)]}, every=10, dense_above=dense_above
    )
    got = probe.measure(model, 0)
    w1 = now(model)
    for name, indices in groups.items():
        close(got["groups"][name]["overall"], dense(w0, w1, indices))
        for path, value in got["groups"][name]["matrices"].items():
            close(value, dense(w0, w1, {path: indices[path]}))
        for layer in ("0", "1"):
            inside = {p: i for p, i in indices.items() if f"layers.{layer}." in p}
            if inside:
                close(got["groups"][name]["layers"][layer], dense(w0, w1, inside))
            else:
                assert got["groups"][name]["layers"][layer]["entries"] == 0
    assert got["groups"]["half"]["layers"]["0"]["cosine"] is None
    for number, seed in enumerate(range(3, 8)):
        want = dense(w0, w1, draws(model, 0.02, seed))
        for measure in MEASURES:
            assert got["nulls"]["random"]["overall"][measure][number] == pytest.approx(want[measure], rel=1e-6)
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_gathered_and_dense_agree_and_the_density_chooses(monkeypatch):
    import deltalab.measure.drift as module

    model = perturbed(adapt(tiny_llama(), LoRA(targets="all-linear")))
    calls = []
    for name in ("delta_weight", "delta_entries"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, original=original: calls.append(name) or original(*a))
    few, many = {"g": draws(model, 0.01)}, {"g": draws(model, 0.2)}
    a = DriftProbe(few).measure(model, 0)
    assert set(calls) == {"delta_entries"}
    calls.clear()
    DriftProbe(many).measure(model, 0)
    assert set(calls) == {"delta_weight"}
    b = DriftProbe(few, dense_above=0).measure(model, 0)
    for path, values in a["groups"]["g"]["matrices"].items():
        close(values, b["groups"]["g"]["matrices"][path])


def test_an_untouched_model_has_not_moved():
    model = adapt(tiny_llama(), LoRA())
    got = DriftProbe({"g": draws(model, 0.1)}).measure(model, 0)["groups"]["g"]["overall"]
    assert got["cosine"] == 1
    assert got["cosine_distance"] == got["l2"] == got["relative_mean"] == got["relative_norm"] == 0


def test_full_tuning_without_adapt_goes_by_a_snapshot():
    model = tiny_llama()
    indices = draws(model, 0.3)
    W0 = snapshot(model, list(indices))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.02
    for dense_above in (0.0, 1e9):
        got = DriftProbe({"g": indices}, W0=W0, dense_above=dense_above).measure(model, 0)
        close(got["groups"]["g"]["overall"], dense(W0, base(model), indices))


def test_a_snapshot_and_a_delta_add_up():
    """W0 taken before a first full tuning, LoRA trained on top: the drift is that of both."""
    model = tiny_llama()
    indices = draws(model, 0.3)
    W0 = snapshot(model, list(indices))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.02
    perturbed(adapt(model, LoRA(targets="all-linear")))
    for dense_above in (0.0, 1e9):
        got = DriftProbe({"g": indices}, W0=W0, dense_above=dense_above).measure(model, 0)
        close(got["groups"]["g"]["overall"], dense(W0, now(model), indices))


def test_a_snapshot_that_is_the_weight_itself_is_refused():
    model = tiny_llama()
    W0 = {p: m.weight for p, m in scored_linears(model).items()}
    with pytest.raises(UserError, match="is the weight itself"):
        DriftProbe({"g": draws(model, 0.1)}, W0=W0).measure(model, 0)


def test_bf16_weights_do_not_round_the_drift():
    """A change far below the spacing of bf16 is measured, where merging in bf16 would show none."""
    model = tiny_llama(dtype=torch.bfloat16)
    w0 = base(model)
    perturbed(adapt(model, LoRA(targets="all-linear")), scale=1e-3)
    indices = draws(model, 1.0)
    got = DriftProbe({"g": indices}).measure(model, 0)["groups"]["g"]["overall"]
    change = {
        p: (m.delta.s * m.delta.B.double() @ m.delta.A.double()).detach() for p, m in scored_linears(model).items()
    }
    want = dense(w0, {p: w0[p].double() + change[p] for p in w0}, indices)
    for measure in ("l2", "l2_per_sqrt", "relative_mean", "relative_norm"):
        assert got[measure] == pytest.approx(want[measure], rel=1e-6)
    assert got["l2"] > 0


def exact_distance(w, d):
    """1 − cos of w and w + d from exact fractions and a square root to 60 digits."""
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    w, v = [Fraction(x) for x in w], [Fraction(x) + Fraction(y) for x, y in zip(w, d, strict=True)]

    def number(f):
        return Decimal(f.numerator) / Decimal(f.denominator)

    ww, vv, wv = (number(sum(a * b for a, b in zip(x, y, strict=True))) for x, y in ((w, w), (v, v), (w, v)))
    return float(1 - wv / (ww * vv).sqrt())


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e-9, 1e-12])
def test_cosine_distance_does_not_cancel(scale):
    w, d = torch.randn(50, dtype=torch.float64), scale * torch.randn(50, dtype=torch.float64)
    got = drift(w, d)["cosine_distance"]
    want = exact_distance(w.tolist(), d.tolist())
    assert got == pytest.approx(want, rel=1e-12, abs=0)
    if scale <= 1e-9:
        assert 1 - float(torch.nn.functional.cosine_similarity(w, w + d, dim=0)) != pytest.approx(want, rel=0.1, abs=0)


@pytest.mark.parametrize(("change", "want"), [(-2.0, 2.0), (1.0, 0.0), (-0.5, 0.0), (-1.0, None)])
def test_cosine_distance_along_the_weight(change, want):
    w = torch.randn(20, dtype=torch.float64)
    got = drift(w, change * w)
    assert got["cosine_distance"] == (None if want is None else pytest.approx(want, abs=1e-15))
    assert got["relative_norm"] == pytest.approx(abs(change))


def test_weights_that_are_zero_have_no_cosine():
    got = drift(torch.zeros(4), torch.ones(4), epsilon=0.5)
    assert got["cosine"] is None
    assert got["relative_norm"] is None
    assert got["relative_mean"] == 2
    nothing = drift(torch.zeros(0), torch.zeros(0))
    assert nothing == {"entries": 0, **dict.fromkeys(MEASURES)}


def test_band_and_rows():
    torch.manual_seed(0)
    model = perturbed(adapt(tiny_llama(), LoRA(targets="all-linear")))
    nulls = [draws(model, 0.1, s) for s in range(25)]
    group = {p: i for p, i in draws(model, 0.05, 99).items() if "q_proj" in p}
    probe = DriftProbe({"g": group}, {"null": nulls})
    band = probe.measure(model, 0)["nulls"]["null"]["band"]["l2_per_sqrt"]
    values = torch.tensor(probe.measure(model, 0)["nulls"]["null"]["overall"]["l2_per_sqrt"], dtype=torch.float64)
    assert band["low"] == pytest.approx(float(values.quantile(0.025)))
    assert band["high"] == pytest.approx(float(values.quantile(0.975)))
    assert band["median"] == pytest.approx(float(values.median()))
    rows = probe.rows(model)["groups"]["g"]
    w0 = base(model)
    w1 = {p: w0[p].double() + delta_weight(model, p) for p in w0}  # a row of one entry shows fp32's rounding of W + ΔW
    want = []
    for path, index in group.items():
        for row in sorted(set((index // 32).tolist())):
            want.append(dense(w0, w1, {path: index[index // 32 == row]}))
    for measure in ("l2_per_sqrt", "relative_mean", "relative_norm", "cosine_distance"):
        assert rows[measure].tolist() == pytest.approx([value[measure] for value in want], rel=1e-6, abs=1e-12)
    summary = probe.distributions(model)
    assert summary["groups"]["g"]["l2_per_sqrt"]["rows"] == len(want)
    assert summary["groups"]["g"]["l2_per_sqrt"]["quantiles"][50] == pytest.approx(
        float(rows["l2_per_sqrt"].quantile(0.5))
    )
    assert summary["nulls"]["null"]["l2_per_sqrt"]["rows"] > 20 * len(want)
    json.dumps(summary, allow_nan=False)


def same(got, want, rel=1e-9):
    """Equal JSON, numbers but for the order in which they were added up."""
    if isinstance(want, dict):
        assert set(got) == set(want)
        for key, value in want.items():
            same(got[key], value, rel)
    elif isinstance(want, list):
        assert len(got) == len(want)
        for x, y in zip(got, want, strict=True):
            same(x, y, rel)
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=rel, abs=1e-12)
    else:
        assert got == want


@pytest.mark.parametrize("way", ["tiles of a few entries", "terms formed draw by draw", "without sparse matrices"])
def test_the_ways_to_add_up_agree(monkeypatch, way):
    import deltalab.measure.drift as module
    from deltalab.measure import entry_sums

    model = perturbed(adapt(tiny_llama(), LoRA(targets="all-linear")))
    groups, nulls = {"g": draws(model, 0.3)}, {"n": [draws(model, 0.2, s) for s in range(12)]}
    whole = DriftProbe(groups, nulls).measure(model, 0)
    if way == "tiles of a few entries":
        monkeypatch.setattr(entry_sums, "TILE", 500)
    elif way == "terms formed draw by draw":
        monkeypatch.setattr(module, "TERMS_BYTES", 0)
    else:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    same(DriftProbe(groups, nulls).measure(model, 0), whole)


@pytest.mark.parametrize("unit", ["entry", "row", "mlp-unit"])
@pytest.mark.parametrize("matched", [False, True])
def test_draws_that_nobody_holds_measure_as_the_same_groups_held(unit, matched):
    model = tiny_llama()
    weights = {path: module.weight.detach().clone() for path, module in scored_linears(model).items()}
    units = units_of(model, unit)
    scores = {path: weight.abs() * torch.rand_like(weight) for path, weight in weights.items()}
    group = top(scores, 0.1, "matrix", units=units)
    perturbed(adapt(model, LoRA(targets="all-linear")))
    nulls = Nulls(group, 25, 7, bins_of(weights, units=units) if matched else None, units)
    streamed = DriftProbe({"g": group}, {"n": nulls}).measure(model, 0)
    held = DriftProbe({"g": group}, {"n": [nulls.draw(i) for i in range(25)]}).measure(model, 0)
    same(streamed, held)
    w0, w1 = base(model), {p: base(model)[p].double() + delta_weight(model, p) for p in weights}
    for i in (0, 24):
        want = dense(w0, w1, dict(nulls.draw(i).items()))
        for measure in MEASURES:
            assert streamed["nulls"]["n"]["overall"][measure][i] == pytest.approx(want[measure], rel=1e-6)


def test_few_draws_usually_and_all_when_told():
    model = perturbed(adapt(tiny_llama(), LoRA(targets="all-linear")))
    group = top({path: module.weight.detach().abs() for path, module in scored_linears(model).items()}, 0.1)
    nulls = {"n": Nulls(group, 60), "listed": [draws(model, 0.1, s) for s in range(8)]}
    probe = DriftProbe({"g": group}, nulls, few=20)
    usual, every = probe.measure(model, 0), probe.measure(model, 9, probe.most)
    assert (usual["nulls"]["n"]["draws"], usual["nulls"]["listed"]["draws"]) == (20, 8)
    assert (every["nulls"]["n"]["draws"], every["nulls"]["listed"]["draws"]) == (60, 8)
    assert every["nulls"]["n"]["overall"]["l2"][:20] == usual["nulls"]["n"]["overall"]["l2"]
    assert every["groups"] == usual["groups"]
    assert probe.measure(model, 0, 5)["nulls"]["n"]["draws"] == 5
    assert DriftProbe({"g": group}, nulls).measure(model, 0)["nulls"]["n"]["draws"] == 60
    layer = every["nulls"]["n"]["layers"]["1"]["l2"]
    inside = [dict(nulls["n"].draw(i).items()) for i in range(60)]
    w0, w1 = base(model), {p: base(model)[p].double() + delta_weight(model, p) for p in group}
    values = [dense(w0, w1, {p: i for p, i in draw.items() if "layers.1." in p})["l2"] for draw in inside]
    assert layer["low"] == pytest.approx(float(torch.tensor(values, dtype=torch.float64).quantile(0.025)), rel=1e-6)
    assert layer["mean"] == pytest.approx(sum(values) / 60, rel=1e-6)


def test_no_group_is_refused():
    with pytest.raises(UserError, match="no group"):
        DriftProbe({})
