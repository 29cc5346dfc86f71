"""Several adapters made into one: against brute force on dense changes, against peft, and what it says it lost."""

import copy

import peft
import pytest
import torch

import deltalab as dl
from deltalab.core.errors import UserError
from deltalab.deltas.adapt import attached, delta_weight, is_adapted
from deltalab.deltas.base import shape_of
from tests.deltas.perturb import perturbed, states_equal
from tests.families import logits, model_of
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_llama

Q = "model.layers.0.self_attn.q_proj"


def adapted(base, seed, spec):
    return perturbed(dl.adapt(copy.deepcopy(base), spec), size=0.2, seed=seed)


def some(*specs, base=None):
    """A base and a model for each spec: names a, b, …"""
    base = tiny_llama() if base is None else base
    return base, {name: adapted(base, i, spec) for i, (name, spec) in enumerate(zip("abcdefgh", specs, strict=False))}


def changes(models, path):
    """The dense changes of those that have one at the path, in fp64."""
    return {name: delta_weight(model, path).double() for name, model in models.items() if path in attached(model)}


def paths_of(models):
    return list(dict.fromkeys(path for model in models.values() for path in attached(model)))


def nearest_of_rank(T, r):
    U, S, Vh = torch.linalg.svd(T, full_matrices=False)
    return (U[..., :r] * S[..., None, :r]) @ Vh[..., :r, :]


def check(combined, targets, rank):
    """The result at each path is the nearest change of that rank to its target, and the report says how near."""
    model, report = combined
    assert [module.path for module in report.modules] == list(targets)
    lost = whole = 0.0
    for module, (path, T) in zip(report.modules, targets.items(), strict=True):
        best = nearest_of_rank(T, rank(path))
        assert_close_by_norm(delta_weight(model, path), best, 2e-5)
        assert module.rank == attached(model)[path].factors().A.shape[-2] <= rank(path)
        assert module.norm == pytest.approx(float(T.norm()), rel=1e-5)
        assert module.error == pytest.approx(error_by_norm(best, T), rel=1e-3, abs=2e-6)
        lost, whole = lost + float((T - best).norm()) ** 2, whole + float(T.norm()) ** 2
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3, abs=2e-6)


SAME = [dl.LoRA(r=2, alpha=3), dl.LoRA(r=4, alpha=8), dl.LoRA(r=3, rank_stabilised=True)]
MIXED = [
    dl.LoRA(r=2, targets="all-linear"),
    dl.DoRA(r=3, targets="q,v"),
    dl.IA3(targets=["down_proj", "k_proj"]),
    dl.VeRA(r=8, targets="attention"),
    dl.LoRA(r=4, init="pissa", targets=["q_proj", "embed_tokens"]),
]
WEIGHTS = [0.7, -0.4, 1.3, 0.5, 2.0]


def test_linear_is_the_sum_and_peft_reads_it(tmp_path):
    base, models = some(
        *SAME, dl.AdaLoRA(targets=["q_proj", "up_proj"]), dl.LoRA(r=4, init="pissa", targets=["k_proj"])
    )
    weights = WEIGHTS
    model, report = dl.combine(copy.deepcopy(base), models, weights)
    for path in paths_of(models):
        there = changes(models, path)
        want = sum(w * there[name] for name, w in zip(models, weights, strict=True) if name in there)
        assert_close_by_norm(delta_weight(model, path), want, 1e-6)
        ranks = [attached(m)[path].factors().A.shape[0] for m in models.values() if path in attached(m)]
        assert attached(model)[path].A.shape[0] == sum(ranks)
    assert report.error == 0
    assert set(attached(model)) == set(paths_of(models))
    dl.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close_by_norm(logits(theirs), logits(model), 1e-5)
    assert torch.equal(logits(dl.load_adapter(copy.deepcopy(base), tmp_path)), logits(model))
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(attached(model))


@pytest.mark.parametrize("r", [None, 1, 5])
def test_svd_of_factors_is_the_nearest_of_its_rank(r):
    base, models = some(*SAME)
    targets = {}
    for path in paths_of(models):
        targets[path] = sum(w * T for w, T in zip(WEIGHTS, changes(models, path).values(), strict=False))
    check(dl.combine(copy.deepcopy(base), models, WEIGHTS[:3], how="svd", r=r), targets, lambda path: r or 4)


def test_svd_of_factors_makes_no_dense_matrix(monkeypatch):
    base, models = some(*SAME)
    svd, shapes = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda M, **more: shapes.append(tuple(M.shape)) or svd(M, **more))
    dl.combine(base, models, how="svd")
    assert set(shapes) == {(9, 9)}


@pytest.mark.parametrize("r", [3, 32])
def test_svd_of_any_methods_ranks_and_targets(r):
    base, models = some(*MIXED)
    assert len({len(changes(models, path)) for path in paths_of(models)}) > 2
    targets = {}
    for path in paths_of(models):
        there = changes(models, path)
        targets[path] = sum(w * there[name] for name, w in zip(models, WEIGHTS, strict=True) if name in there)
    check(dl.combine(copy.deepcopy(base), models, WEIGHTS, how="svd", r=r), targets, lambda path: r)


def trimmed(T, density):
    """Brute force: one entry after the other, the largest first."""
    flat, kept = T.flatten().tolist(), torch.zeros(T.numel(), dtype=torch.float64)
    for i in sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[: int(density * len(flat))]:
        kept[i] = flat[i]
    return kept.view(T.shape)


def agreed(parts):
    """Brute force: the mean of those that have the sign of the sum."""
    out = torch.zeros_like(parts[0]).flatten()
    for i, values in enumerate(zip(*(part.flatten().tolist() for part in parts), strict=True)):
        total = sum(values)
        same = [v for v in values if v * total > 0]
        out[i] = sum(same) / len(same) if same else 0.0
    return out.view_as(parts[0])


@pytest.mark.parametrize(("density", "r"), [(0.2, 32), (0.5, 4), (1.0, 32)])
def test_ties_is_trim_elect_and_disjoint_mean(density, r):
    base, models = some(dl.LoRA(r=2), dl.DoRA(r=4, targets=["q_proj"]), dl.LoRA(r=3))
    weights, targets = [1.0, 0.6, -0.8], {}
    for path in paths_of(models):
        there = changes(models, path)
        targets[path] = agreed([w * trimmed(there[name], density) for name, w in zip(models, weights, strict=True) if name in there])  # fmt: skip
    check(dl.combine(copy.deepcopy(base), models, weights, how="ties", density=density, r=r), targets, lambda path: r)


@pytest.mark.parametrize("how", ["dare", "dare-ties"])
def test_dare_drops_at_random_and_makes_up_for_it(how):
    base, models = some(*SAME)
    weights, generator, targets = [1.0, -0.5, 2.0], torch.Generator().manual_seed(5), {}
    for path in paths_of(models):
        kept = []
        for weight, T in zip(weights, changes(models, path).values(), strict=True):
            keep = torch.rand(T.shape, generator=generator) < 0.4
            assert keep.double().mean() == pytest.approx(0.4, abs=0.08)
            kept.append(weight * T * keep / 0.4)
        targets[path] = sum(kept) if how == "dare" else agreed(kept)
    combined = dl.combine(copy.deepcopy(base), models, weights, how=how, density=0.4, r=32, seed=5)
    check(combined, targets, lambda path: 32)
    again = dl.combine(copy.deepcopy(base), models, weights, how=how, density=0.4, r=32, seed=5)
    assert torch.equal(delta_weight(again.model, Q), delta_weight(combined.model, Q))
    other = dl.combine(copy.deepcopy(base), models, weights, how=how, density=0.4, r=32, seed=6)
    assert error_by_norm(delta_weight(other.model, Q), targets[Q]) > 0.1


def test_the_mean_over_the_seeds_of_dare_is_the_sum():
    base, models = some(*[dl.LoRA(r=2, targets=["q_proj"])] * 2, base=tiny_llama(layers=1))
    want = sum(changes(models, Q).values())
    seeds = 40
    total = sum(
        delta_weight(dl.combine(copy.deepcopy(base), models, how="dare", density=0.5, r=32, seed=seed).model, Q)
        for seed in range(seeds)
    )
    expected = (1 / seeds) ** 0.5  # an entry's variance is its square at density ½, of both adapters
    assert error_by_norm(total / seeds, want) < 2 * expected


PEFT = {
    "svd": ({"how": "svd", "r": 3}, {"combination_type": "svd", "svd_rank": 3}, [0.7, -0.4]),
    "ties": ({"how": "ties", "density": 0.3, "r": 5}, {"combination_type": "ties_svd", "density": 0.3, "svd_rank": 5}, [1.0, 1.0]),
    "dare": ({"how": "dare", "density": 0.3, "r": 16}, {"combination_type": "dare_linear_svd", "density": 0.3, "svd_rank": 16}, [0.7, -0.4]),
    "dare-ties": ({"how": "dare-ties", "density": 0.3, "r": 16}, {"combination_type": "dare_ties_svd", "density": 0.3, "svd_rank": 16}, [1.0, 1.0]),
    "linear": ({"how": "linear"}, {"combination_type": "cat"}, [0.7, 0.4]),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFT)
def test_peft_combines_alike_where_it_means_the_same(case, tmp_path, monkeypatch):
    ours, theirs, weights = PEFT[case]
    base, models = some(dl.LoRA(r=4, alpha=3, targets="attention"), dl.LoRA(r=4, alpha=8, targets="attention"))
    for name, model in models.items():
        dl.save_adapter(model, tmp_path / name)
    combined = dl.combine(copy.deepcopy(base), {name: tmp_path / name for name in models}, weights, **ours)
    with_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", adapter_name="a")
    with_peft.load_adapter(tmp_path / "b", adapter_name="b")
    generator = torch.Generator().manual_seed(0)  # the same draws, for it takes them from the global generator
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.rand(p.shape, generator=generator) < 0.3).to(p))
    with_peft.add_weighted_adapter(list(models), weights, "new", **theirs)
    with_peft.set_adapter("new")
    assert_close_by_norm(logits(combined.model), logits(with_peft), 1e-5)
    for path in attached(combined.model):
        layer = with_peft.get_submodule(f"base_model.model.{path}")
        assert_close_by_norm(delta_weight(combined.model, path), layer.get_delta_weight("new"), 2e-5)
        if case == "linear":  # what peft calls so adds up A and B by themselves, and that is another change
            with_peft.add_weighted_adapter(list(models), weights, "theirs", combination_type="linear")
            assert error_by_norm(layer.get_delta_weight("theirs"), layer.get_delta_weight("new")) > 0.3


@pytest.mark.parametrize(
    ("family", "targets"), [("mixtral", "all-linear"), ("gpt2", "all-linear"), ("llama-bf16", "mlp")]
)
def test_experts_and_transposed_and_narrow_weights(family, targets):
    base, models = some(dl.LoRA(r=2, targets=targets), dl.LoRA(r=3, targets=targets), base=model_of(family))
    for how, options in (("linear", {}), ("svd", {"r": 2}), ("ties", {"density": 0.4, "r": 2})):
        model, report = dl.combine(copy.deepcopy(base), models, [0.5, 1.5], how=how, **options)
        for path in paths_of(models):
            a, b = (T for T in changes(models, path).values())
            if how == "ties":
                matrices = [(0.5 * x, 1.5 * y) for x, y in zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)]  # fmt: skip
                want = torch.stack([agreed([trimmed(x, 0.4), trimmed(y, 0.4)]) for x, y in matrices]).view_as(a)
            else:
                want = 0.5 * a + 1.5 * b
            want = want if how == "linear" else nearest_of_rank(want, 2)
            assert_close_by_norm(delta_weight(model, path), want, 2e-5)
        assert (report.error > 1e-3) == (how != "linear")
        if how == "ties":
            break


def test_a_quantised_base():
    model, _ = dl.load("organism", quantize="int8")
    models = {name: adapted(model, i, dl.LoRA(r=2)) for i, name in enumerate("ab")}
    path = next(iter(attached(models["a"])))
    want = sum(changes(models, path).values())
    assert_close_by_norm(delta_weight(dl.combine(model, models).model, path), want, 1e-6)


def test_deltas_by_path_and_one_adapter_and_none_that_does_anything():
    base, models = some(dl.LoRA(r=4))
    model, report = dl.combine(copy.deepcopy(base), {"a": attached(models["a"])}, how="svd", adapter="mine")
    assert_close_by_norm(delta_weight(model, Q), delta_weight(models["a"], Q), 1e-6)
    assert dl.adapters(model) == ["mine"]
    assert report.error < 1e-6
    still = dl.adapt(copy.deepcopy(base), dl.LoRA())
    report = dl.combine(copy.deepcopy(base), {"still": still}, how="ties", density=0.1).report
    assert (report.error, report.modules[0].norm) == (0, 0)


def test_the_report_prints_and_is_plain():
    base, models = some(dl.LoRA(r=2), dl.LoRA(r=4, targets=["q_proj"]))
    report = dl.combine(base, models, [0.5, 2], how="ties", density=0.25).report
    lines = str(report).splitlines()
    assert lines[0] == "ties: 0.5 × a + 2 × b"
    assert [line.split()[:3] for line in lines[2:4]] == [["q_proj", "2", "4"], ["v_proj", "2", "2"]]
    assert lines[-1] == f"  error of the whole: {report.error:.2g} of the target's norm"
    plain = report.plain()
    assert plain["adapters"] == {"a": 0.5, "b": 2.0}
    assert (plain["density"], plain["seed"], plain["error"]) == (0.25, None, report.error)
    assert plain["modules"][0]["path"] == Q


def test_mistakes_are_told_in_words(tmp_path):
    base, models = some(dl.LoRA(), dl.DoRA(), dl.LoRA(r=4))
    plain = copy.deepcopy(base)
    attached(models["c"])[Q].keep = torch.ones(shape_of(base.get_submodule(Q)), dtype=torch.bool)
    two = {"a": models["a"], "b": models["b"]}
    for given, options, message in [
        (two, {}, r"'b' on '.*q_proj' has no low rank(.|\n)*DoRA(.|\n)*svd"),
        ({"c": models["c"]}, {}, r"'c' on '.*q_proj' has no low rank(.|\n)*masked"),
        (two, {"how": "svd"}, "which rank"),
        (two, {"how": "tise", "density": 0.2}, r"no way to combine(.|\n)*nearest: ties"),
        (two, {"how": "sum"}, "nearest: linear"),
        (two, {"how": "linear", "r": 4}, "keeps every rank"),
        (two, {"how": "svd", "r": 0}, "no rank"),
        (two, {"how": "ties"}, "needs a density"),
        (two, {"how": "svd", "r": 3, "density": 0.5}, "density is of"),
        (two, {"how": "dare", "density": 1.5}, "no share"),
        (two, {"weights": [1.0]}, "2 adapters and the weights"),
        (two, {"weights": [1.0, float("nan")]}, "2 adapters and the weights"),
        ({}, {}, "no adapter is named"),
        ({"a": tmp_path / "nowhere"}, {}, "does not exist"),
        ({"a": tiny_llama()}, {}, "has no adapter"),
        ({"a": dl.adapt(tiny_llama(), [dl.LoRA(), dl.Train("norms")])}, {}, "trains the model's own"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            dl.combine(base, given, **options)
        assert states_equal(base, plain)
        assert not is_adapted(base)
    biased = tiny_llama(bias=True)
    with pytest.raises(UserError, match="changes the bias"):
        dl.combine(biased, {"a": adapted(biased, 0, dl.IA3(targets="all-linear"))}, how="svd", r=3)
    with pytest.raises(UserError, match="is adapted"):
        dl.combine(models["a"], two)
