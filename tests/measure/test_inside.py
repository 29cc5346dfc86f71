"""The inside of adapters and of tuned models, against dense SVDs of their own ΔW."""

import copy
import json
import re

import pytest
import torch

import deltalab as dl
from deltalab.cli import main
from deltalab.deltas.weights import attached
from deltalab.measure.inside import inside_adapted, inside_pair, shared, shared_by_parts
from tests.data.test_tasks import said
from tests.deltas.perturb import perturbed
from tests.helpers import assert_close_by_norm, model_folder, tiny_llama


@pytest.mark.parametrize("method", [dl.LoRA(r=3), dl.DoRA(r=3), dl.IA3(), dl.AdaLoRA(init_r=3, target_r=2), dl.VeRA(r=4)], ids=lambda m: m.method)  # fmt: skip
def test_every_method_with_a_change_of_the_weight(method):
    model = perturbed(dl.adapt(tiny_llama(), method))
    deltas = dict(attached(model))
    changes = {path: dl.delta_weight(model, path).double() for path in deltas}
    base = dl.unload(copy.deepcopy(model))
    lines, spectra, _ = inside_adapted(model, directions=4)
    assert [line.path for line in lines] == list(deltas)
    for line in lines:
        want = torch.linalg.svdvals(changes[line.path])
        got = torch.tensor(line.S, dtype=torch.float64)
        n = min(len(got), len(want))
        assert_close_by_norm(got[:n], want[:n], 1e-5)
        assert line.norm == pytest.approx(float(changes[line.path].norm()), rel=1e-5)
        W = base.get_submodule(line.path).weight.double()
        assert line.relative == pytest.approx(line.norm / float(W.detach().norm()), rel=1e-5)
        assert line.layer == int(line.path.split(".")[2])
        assert line.module == line.path.split(".")[-1]
        assert 0 < line.utilisation <= 1 + 1e-9
        assert 0 <= line.intruders <= 4
    assert set(spectra) == set(deltas)


def test_a_tuned_model_and_its_base():
    base, tuned = tiny_llama(), tiny_llama()
    path = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        tuned.get_submodule(path).weight.add_(0.1 * torch.randn(tuned.get_submodule(path).weight.shape))
    (line,), *_ = inside_pair(base, tuned)
    change = (tuned.get_submodule(path).weight.double() - base.get_submodule(path).weight.double()).detach()
    assert_close_by_norm(torch.tensor(line.S, dtype=torch.float64), torch.linalg.svdvals(change), 1e-5)
    (few,), *_ = inside_pair(base, tuned, k=3)
    assert few.norm == pytest.approx(float(change.norm()))
    assert few.error == pytest.approx(float(torch.linalg.svdvals(change)[3:].norm()), rel=1e-3)
    said(lambda: inside_pair(base, copy.deepcopy(base)), "the same linears")
    said(lambda: inside_pair(base, tiny_llama(layers=1)), "is no tuned form of")


def test_what_two_changes_share():
    model = tiny_llama()
    first = perturbed(dl.adapt(copy.deepcopy(model), dl.LoRA(r=2)))
    second = perturbed(dl.adapt(copy.deepcopy(model), dl.LoRA(r=2)), seed=5)
    found = [inside_adapted(one)[1] for one in (first, second)]
    same = shared(found[0], found[0])
    assert all(both == pytest.approx(1) for both, _ in same.values())
    other = shared(*found)
    assert set(other) == set(found[0])
    assert all(0 <= both < 1 and 0 < chance < 1 for both, chance in other.values())
    assert shared(found[0], {}) == {}


def test_each_expert_of_a_mixture(tmp_path, capsys):
    model = perturbed(dl.adapt(tiny_llama(), dl.LoRAExperts(experts=3, top_k=2, r=2, targets="q,v")))
    deltas = dict(attached(model))
    found = inside_adapted(model, directions=3)
    lines, spectra, _ = found
    assert [(line.path, line.part) for line in lines] == [(p, f"expert {e}") for p in deltas for e in range(3)]
    assert list(spectra) == [f"{line.path}, {line.part}" for line in lines]
    changes = {}
    for line in lines:
        delta, e = deltas[line.path], int(line.part[-1])
        changes[line.path, e] = (delta.s * delta.B[:, e] @ delta.A[e]).detach().double()
        want = torch.linalg.svdvals(changes[line.path, e])[:2]
        assert_close_by_norm(torch.tensor(line.S, dtype=torch.float64), want, 1e-5)
        assert line.rank == 2
    pairs = [(path, i, j) for path in deltas for i in range(3) for j in range(i)]
    both = [
        shared({"": spectra[f"{path}, expert {i}"]}, {"": spectra[f"{path}, expert {j}"]})[""] for path, i, j in pairs
    ]
    assert shared_by_parts(found) == pytest.approx(tuple(sum(pair[k] for pair in both) / len(both) for k in (0, 1)))
    assert shared_by_parts(inside_adapted(perturbed(dl.adapt(tiny_llama(), dl.LoRA(r=2))))) is None
    model_folder(dl.unload(copy.deepcopy(model)), tmp_path / "base")
    dl.save_adapter(model, tmp_path / "mixture")
    assert run(tmp_path / "mixture", "--base", tmp_path / "base", "--out", tmp_path / "out") == 0
    assert "3 experts on each module" in capsys.readouterr().out
    (kept,) = (values for values in json.loads((tmp_path / "out/inspect.json").read_text())["changes"].values())
    assert len(kept) == 12


def test_what_has_no_change_of_a_weight(tmp_path, capsys):
    model = perturbed(dl.adapt(tiny_llama(), [dl.Bottleneck(size=4, targets="mlp"), dl.ZeroInitPrefix(length=3)]))
    deltas = dict(attached(model))
    lines, spectra, parameters = inside_adapted(model)
    assert (lines, spectra) == ([], {})
    assert [(line.path, line.name) for line in parameters] == [
        (p, n) for p, d in deltas.items() for n, _ in d.named_parameters()
    ]
    for line in parameters:
        t = deltas[line.path].get_parameter(line.name).detach().double()
        assert line.shape == list(t.shape)
        assert [line.norm, line.mean, line.deviation, line.largest] == pytest.approx([float(v) for v in (t.norm(), t.mean(), t.std(correction=0), t.abs().max())])  # fmt: skip
        assert line.layer == int(line.path.split(".")[2])
    model_folder(dl.unload(copy.deepcopy(model)), tmp_path / "base")
    dl.save_adapter(model, tmp_path / "a")
    assert run(tmp_path / "a", tmp_path / "a", "--base", tmp_path / "base", "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "no ΔW to look into" in out
    assert "shared directions" not in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"inspect.json"}
    kept = json.loads((tmp_path / "out/inspect.json").read_text())["parameters"][str(tmp_path / "a")]
    assert [line["norm"] for line in kept] == [line.norm for line in parameters]


def test_biases_alone_have_no_matrix():
    model = perturbed(dl.adapt(tiny_llama(bias=True), dl.Train("bias")))
    said(lambda: inside_adapted(model), "nothing in it is a change of a matrix", "no delta")


def run(*args):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *map(str, args)])
    return ended.value.code


def test_the_verb(tmp_path, capsys):
    for seed in (0, 1):
        model = perturbed(dl.adapt(dl.load("organism")[0], dl.LoRA(r=2, targets="q,v")), seed=seed)
        dl.save_adapter(model, tmp_path / f"a{seed}")
    assert run(tmp_path / "a0", tmp_path / "a1", "--out", tmp_path / "out", "--directions", "3") == 0
    shown = capsys.readouterr().out
    assert "a0, on organism" in shown
    assert "q_proj        4" in shown
    assert "intruders" in shown
    assert "shared directions" in shown
    values = json.loads((tmp_path / "out/inspect.json").read_text())
    assert values["base"] == "organism"
    lines = values["changes"][str(tmp_path / "a0")]
    base = dl.load("organism")[0]
    want = inside_adapted(dl.load_adapter(base, tmp_path / "a0"))
    assert [line["S"] for line in lines] == [line.S for line in want.lines]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["inspect-1.png", "inspect-2.png"]


def test_the_verb_on_a_tuned_model(tmp_path, capsys):
    tuned, tokenizer = dl.load("organism")
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
    tuned.save_pretrained(tmp_path / "t")
    tokenizer.save_pretrained(tmp_path / "t")
    assert run(tmp_path / "t", "--base", "organism") == 0
    shown = capsys.readouterr().out
    assert re.search(r"q_proj +1 +1\.00%", shown)
    assert "the first singular values alone" not in shown
    assert run(tmp_path / "t") == 2
    assert "does not name the model" in capsys.readouterr().err
