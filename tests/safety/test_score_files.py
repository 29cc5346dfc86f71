"""Scores on disk: the same as in memory, whole or absent, gone on with after a kill, and never of two things at once."""

import gc
import json
import os

import pytest
import torch

from deltalab.core import scratch
from deltalab.core.errors import UserError
from deltalab.core.scratch import make_scratch
from deltalab.core.spec import digest
from deltalab.deltas import LoRA
from deltalab.deltas.adapt import adapt, disabled
from deltalab.deltas.select import scored_linears
from deltalab.safety import score_files
from deltalab.safety.scores import (
    COMPARABLE,
    Scores,
    ScoreSpec,
    cost,
    magnitude,
    random_scores,
    require_same,
    score,
    snip,
    wanda,
)
from tests.deltas.perturb import perturbed
from tests.helpers import small_disk, tiny_llama
from tests.safety.reference import Sample, brute_wanda, largest, ragged, samples

STORED = [("snip", False), ("snip", True), ("wanda", False), ("wanda", True)]
STREAMED = {"mode": "streamed", "blocks": 1}


@pytest.mark.parametrize(("kind", "halves"), STORED)
def test_scores_on_disk_are_those_in_memory(tmp_path, kind, halves):
    model, data, spec = tiny_llama(), samples(), ScoreSpec(score=kind)
    memory = score(model, data, spec, template="t", halves=halves)
    disk = score(model, data, spec, folder=tmp_path / "s", template="t", halves=halves)
    assert memory.manifest == disk.manifest == json.loads((tmp_path / "s/scores.json").read_text())
    back = Scores.load(tmp_path / "s", model)
    for scores in (disk, back, memory.save(tmp_path / "m")):
        assert scores.names() == memory.names() == list(scored_linears(model))
        assert all(torch.equal(scores[p], memory[p]) for p in memory)
        for half, want in zip(scores.halves, memory.halves, strict=True):
            assert all(torch.equal(half[p], want[p]) for p in want)
    files = sorted(["scores.json", *(f"{p}.safetensors" for p in memory)])
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == files
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == files
    assert "14 matrices over 5 samples" in str(memory)
    back.discard()
    assert not (tmp_path / "s").exists()
    memory.discard()


def test_what_is_kept_is_the_least(tmp_path):
    """Wanda keeps vectors, magnitude and random nothing; with halves the whole is not kept."""
    model, data = tiny_llama(), samples()
    wanda(model, data, folder=tmp_path / "w")
    snip(model, data, folder=tmp_path / "h", halves=True)
    magnitude(model, folder=tmp_path / "m")
    random_scores(model, folder=tmp_path / "r", seed=3)
    path = "model.layers.0.mlp.down_proj"
    (kept,) = score_files.load_file(tmp_path / f"w/{path}.safetensors").items()
    assert (kept[0], kept[1].shape, kept[1].dtype) == ("squares", (48,), torch.float64)
    assert sorted(score_files.load_file(tmp_path / f"h/{path}.safetensors")) == ["even", "odd"]
    assert (
        [p.name for p in (tmp_path / "m").iterdir()] == [p.name for p in (tmp_path / "r").iterdir()] == ["scores.json"]
    )
    assert torch.equal(Scores.load(tmp_path / "m", model)[path], model.get_submodule(path).weight.detach().abs())
    assert torch.equal(Scores.load(tmp_path / "r")[path], random_scores(model, seed=3)[path])


def test_the_manifest_says_what_was_scored_on_what():
    def manifest(model=None, data=None, **more):
        return snip(model or tiny_llama(layers=1), data or samples(), **more).manifest

    one = manifest()
    assert one == manifest()
    assert one["model"] != manifest(tiny_llama(layers=1, seed=1))["model"]
    assert one["data"] != manifest(data=samples(seed=1))["data"]
    assert one["template"] is None
    assert manifest(template="a")["template"] != manifest(template="b")["template"]
    assert (one["samples"], one["skipped"], one["dtype"], one["positions"]) == (5, 0, "float32", "predicting")
    assert one["tokens"] == sum(label != -100 for sample in samples() for label in sample.labels)
    assert one["data"] == digest([[s.input_ids, s.labels] for s in samples()])
    assert "absolute value per sample" in one["reduction"]
    assert one["shapes"]["model.layers.0.mlp.down_proj"] == [32, 48]
    adapted = perturbed(adapt(tiny_llama(layers=1), LoRA()))
    on = manifest(adapted)["adapted"]
    with disabled(adapted):
        assert manifest(adapted)["adapted"] not in (on, None)


def test_scores_of_different_things_are_not_compared():
    model, data = tiny_llama(), samples()
    one, two = snip(model, data).manifest, snip(model, samples(seed=1)).manifest
    require_same(one, two, COMPARABLE, "not comparable.")
    other = snip(tiny_llama(seed=1), data, positions="first-2").manifest
    with pytest.raises(UserError, match="not comparable") as caught:
        require_same(one, other, COMPARABLE, "not comparable.")
    found = caught.value.found
    assert (
        found
        == f"positions: 'predicting' there, 'first-2' here; model: '{one['model']}' there, '{other['model']}' here"
    )


@pytest.mark.parametrize("kind", ["wanda", "magnitude"])
def test_rebuilt_scores_need_the_model_that_was_scored(tmp_path, kind):
    model, base = tiny_llama(), tiny_llama(seed=1)
    spec = ScoreSpec(score=kind, base="b")
    want = score(model, samples(), spec, base=base, folder=tmp_path)
    assert all(torch.equal(Scores.load(tmp_path, model, base)[p], want[p]) for p in want)
    with pytest.raises(UserError, match="rebuilt from the model's weights"):
        Scores.load(tmp_path)
    with pytest.raises(UserError, match="difference from a base model"):
        Scores.load(tmp_path, model)
    with pytest.raises(UserError, match="something else") as caught:
        Scores.load(tmp_path, base, base)
    assert caught.value.found.startswith("model: ")
    with pytest.raises(UserError, match="something else") as caught:
        Scores.load(tmp_path, model, model)
    assert caught.value.found.startswith("base: ")


def test_a_weight_that_changed_since_is_refused():
    """In memory too: the norms are of the model as it was, the weights would be of the model as it is."""
    model, data = tiny_llama(), samples()
    got, q = wanda(model, data), "model.layers.0.self_attn.q_proj"
    want = brute_wanda(model, data)
    model.get_submodule(q).weight.data[0, 0] += 1
    with pytest.raises(UserError, match=f"weights of '{q}' have changed"):
        got[q]
    rest = {p: v for p, v in want.items() if p != q}
    assert largest({p: got[p] for p in rest}, rest) < 1e-4


@pytest.mark.parametrize("halves", [False, True])
def test_the_cost_is_what_is_held_and_written(tmp_path, halves):
    model, held = tiny_llama(layers=5), []
    for number, (spec, passes) in enumerate([({}, 1), ({"mode": "streamed", "blocks": 2}, 3), (STREAMED, 5)]):
        needs = cost(model, ScoreSpec(batch=3, **spec), halves)
        seen = []
        snip(model, ragged(), batch=3, halves=halves, folder=tmp_path / str(number), progress=seen.append, **spec)
        assert needs.passes == passes == len(seen) // 6
        written = sum(
            t.nbytes for p in (tmp_path / str(number)).glob("*.safetensors") for t in score_files.load_file(p).values()
        )
        assert needs.disk == written
        held.append(needs.memory)
    entries = sum(m.weight.numel() for m in scored_linears(model).values())
    assert held == [4 * entries * (1 + halves), 4 * entries * (1 + halves) * 2 // 5, 4 * entries * (1 + halves) // 5]
    needs = cost(model, ScoreSpec(score="wanda"), halves)
    wanda(model, ragged(), folder=tmp_path / "w", halves=halves)
    assert needs.disk == sum(
        t.nbytes for p in (tmp_path / "w").glob("*.safetensors") for t in score_files.load_file(p).values()
    )
    assert cost(model, ScoreSpec(score="random")) == (0, 0, 0)


def test_without_a_folder_streamed_scores_lie_in_scratch_as_long_as_they_are_used(tmp_path):
    scores = snip(tiny_llama(), samples(), scratch=tmp_path, halves=True, **STREAMED)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f".deltalab-{os.getpid()}-")
    want = snip(tiny_llama(), samples(), halves=True)
    even = scores.halves[0]
    del scores
    gc.collect()
    assert all(torch.equal(even[p], want.halves[0][p]) for p in want)
    del even
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_no_scratch(tmp_path):
    model = tiny_llama()
    with pytest.raises(UserError, match="no sample"):
        snip(model, [Sample([5, 6], [-100, -100])], scratch=tmp_path, **STREAMED)
    model.lm_head.weight.data[:] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        snip(model, samples(1), scratch=tmp_path, **STREAMED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kib", [20, 40])
def test_too_little_space_is_said_before_anything_is_computed(tmp_path, kib):
    with small_disk(tmp_path / "disk", f"{kib}k") as disk:
        seen = []
        with pytest.raises(UserError, match=r"too little space(.|\n)*0.1 MiB needed"):
            snip(tiny_llama(), samples(1), folder=disk / "s", progress=seen.append)
        assert seen == []
        with pytest.raises(UserError, match="does not exist"):
            Scores.load(disk / "s")


def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(score_files, "free_bytes", lambda path: 1 << 40)
    model, data = tiny_llama(), samples(1)
    with small_disk(tmp_path / "disk", "60k") as disk:
        with pytest.raises(UserError, match="the disk is full"):
            snip(model, data, folder=disk / "s")
        want = snip(model, data)
        for file in (disk / "s").glob("*.safetensors"):
            assert torch.equal(score_files.load_file(file)["score"], want[file.stem])
        with pytest.raises(UserError, match="incomplete"):
            Scores.load(disk / "s")


def test_scratch_of_a_killed_process_is_removed(tmp_path):
    (tmp_path / ".deltalab-999999999-x").mkdir()
    (tmp_path / ".deltalab-99999999999999999999-x").mkdir()
    (tmp_path / ".deltalab-none-x").mkdir()
    (tmp_path / f".deltalab-{os.getpid()}-x").mkdir()
    (tmp_path / ".deltalab-1-x").mkdir()
    folder = make_scratch(tmp_path)
    assert folder.is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [".deltalab-1-x", f".deltalab-{os.getpid()}-x", folder.name]
    )
    assert scratch.sweep_scratch(tmp_path) == []


def test_incomplete_scores_are_refused(tmp_path):
    model = tiny_llama(layers=1)
    snip(model, samples(), folder=tmp_path / "s")
    file = tmp_path / "s/model.layers.0.self_attn.q_proj.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:40])
    with pytest.raises(UserError, match="missing or damaged"):
        Scores.load(tmp_path / "s")["model.layers.0.self_attn.q_proj"]
    (tmp_path / "s/model.layers.0.self_attn.k_proj.safetensors").replace(file)
    with pytest.raises(UserError, match="incomplete"):
        Scores.load(tmp_path / "s")
    scores = Scores(json.loads((tmp_path / "s/scores.json").read_text()), folder=tmp_path / "s")
    with pytest.raises(UserError, match="shape"):
        scores["model.layers.0.self_attn.q_proj"]
    with pytest.raises(UserError, match="has no score"):
        scores["lm_head"]
    with pytest.raises(UserError, match="does not exist"):
        Scores.load(tmp_path / "none")
    file.unlink()
    again = snip(model, samples(), folder=tmp_path / "s")
    want = snip(model, samples())
    assert all(torch.equal(again[p], want[p]) for p in want)
