"""Scores on disk: the same as in memory, whole or absent, scratch gone afterwards."""

import json
import os

import pytest
import torch

from deltalab.core.errors import UserError
from deltalab.deltas.select import scored_linears
from deltalab.safety.scores import Scores, scratch_folder, snip
from tests.helpers import small_disk, tiny_llama
from tests.safety.test_scores import Sample, samples


def test_scores_on_disk_are_those_in_memory(tmp_path):
    model, data = tiny_llama(), samples()
    memory, disk = snip(model, data, template="t"), snip(model, data, folder=tmp_path / "s", template="t")
    assert memory.manifest == disk.manifest == json.loads((tmp_path / "s/scores.json").read_text())
    back = Scores.load(tmp_path / "s")
    for scores in (disk, back, memory.save(tmp_path / "m")):
        assert scores.names() == memory.names() == list(scored_linears(model))
        assert all(torch.equal(scores[p], memory[p]) for p in memory)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == sorted(
        ["scores.json", *(f"{p}.safetensors" for p in memory)]
    )
    assert memory.manifest["samples"] == 5
    assert memory.manifest["dtype"] == "float32"
    assert "14 matrices over 5 samples" in str(memory)
    back.discard()
    assert not (tmp_path / "s").exists()
    memory.discard()


def test_the_manifest_knows_model_data_and_template():
    def manifest(model=None, data=None, **more):
        return snip(model or tiny_llama(layers=1), data or samples(), **more).manifest

    one = manifest()
    assert one == manifest()
    assert one["model"] != manifest(tiny_llama(layers=1, seed=1))["model"]
    assert one["data"] != manifest(data=samples(seed=1))["data"]
    assert one["template"] is None
    assert manifest(template="a")["template"] != manifest(template="b")["template"]


def test_scratch_is_where_it_was_asked_for_and_gone_afterwards(tmp_path):
    seen = []

    def watched():
        for sample in samples(2):
            seen.extend(p.stat().st_size for p in (tmp_path / "scratch").rglob("*") if p.is_file())
            yield sample

    snip(tiny_llama(), watched(), folder=tmp_path / "s", scratch=tmp_path / "scratch")
    assert sum(seen[:14]) == 4 * sum(m.weight.numel() for m in scored_linears(tiny_llama()).values())
    assert not list((tmp_path / "scratch").iterdir())
    with pytest.raises(UserError):
        snip(tiny_llama(), [Sample([5, 6], [-100, -100])], folder=tmp_path / "t", scratch=tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())
    assert not list((tmp_path / "t").glob("*"))


@pytest.mark.parametrize("kib", [20, 80, 100])
def test_a_full_disk_is_said_so_and_leaves_nothing_half_written(tmp_path, kib):
    """The sums do not fit; they fit and the results do not; a few of the results fit."""
    with small_disk(tmp_path / "disk", f"{kib}k") as disk:
        with pytest.raises(UserError, match="the disk is full"):
            snip(tiny_llama(), samples(1), folder=disk / "s")
        assert all(p.suffix == ".safetensors" for p in (disk / "s").rglob("*") if p.is_file())
        with pytest.raises(UserError, match="does not exist"):
            Scores.load(disk / "s")


def test_scratch_of_a_killed_process_is_removed(tmp_path):
    (tmp_path / ".deltalab-999999999-x").mkdir()
    (tmp_path / f".deltalab-{os.getpid()}-x").mkdir()
    (tmp_path / ".deltalab-1-x").mkdir()
    with scratch_folder(tmp_path) as folder:
        assert folder.is_dir()
        assert not (tmp_path / ".deltalab-999999999-x").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".deltalab-1-x", f".deltalab-{os.getpid()}-x"])


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
