"""`deltalab groups` and `deltalab clean`, as a user calls them."""

import fcntl
import json
import os
import subprocess

import pytest
import torch

from deltalab import cli
from deltalab.core.spec import digest
from deltalab.safety.groups import Group, difference, top
from deltalab.safety.overlap import overlap
from deltalab.safety.units import units_of
from tests.helpers import byte_tokenizer, tiny_llama

MODEL = tiny_llama()
SHAPES = units_of(MODEL, "entry").shapes


def call(capsys, *argv) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(arg) for arg in argv])
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


class Tables(dict):
    """Scores as the verbs read them."""

    @classmethod
    def load(cls, folder, model=None):
        rng = torch.Generator().manual_seed(len(str(folder)))
        return cls({path: torch.rand(shape, generator=rng) for path, shape in SHAPES.items()})


@pytest.fixture
def scores(monkeypatch):
    monkeypatch.setattr("deltalab.safety.scores.Scores", Tables)
    return Tables.load


@pytest.fixture
def model(tmp_path):
    MODEL.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def same(a: Group, b: Group) -> bool:
    return a.info == b.info and all(torch.equal(a[path], b[path]) for path in b)


def test_make_top_and_difference(capsys, tmp_path, scores):
    code, out, _ = call(capsys, "groups", "make", tmp_path / "a", "s1", "--q", 0.1, "--per", "matrix")
    assert code == 0
    assert "asked 10 %, actual 10.0" in out
    assert "down_proj" in out
    assert same(Group.load(tmp_path / "a"), top(scores("s1"), 0.1, "matrix"))
    assert Group.load(tmp_path / "a").name == "a"
    call(capsys, "groups", "make", tmp_path / "b", "s1", "--q", 0.3, "--minus", "util", "--p", 0.2, "--name", "only")
    made = Group.load(tmp_path / "b")
    assert same(made, difference(scores("s1"), scores("util"), p=0.2, q=0.3))
    assert made.name == "only"


def test_make_units(capsys, tmp_path, scores, model):
    code, out, _ = call(capsys, "groups", "make", tmp_path / "a", "s", "--q", 0.25, "--unit", "head", "--model", model)
    assert code == 0
    assert "belong to no head" in out
    assert same(Group.load(tmp_path / "a"), top(scores("s"), 0.25, units=units_of(MODEL, "head")))
    code, _, err = call(capsys, "groups", "make", tmp_path / "b", "s", "--unit", "head")
    assert code == 2
    assert "give --model" in err
    code, _, err = call(capsys, "groups", "make", tmp_path / "b", "s", "--per", "rows")
    assert code == 2
    assert "nearest: row" in err


def test_combine_compare_describe(capsys, tmp_path, scores):
    made = {}
    for name in ("a", "bb", "ccc"):
        made[name] = top(scores(name), 0.2, name=name)
        made[name].save(tmp_path / name)
    masks = {name: group.masks() for name, group in made.items()}
    for how, given, combined in (
        ("union", "a bb ccc", lambda p: masks["a"][p] | masks["bb"][p] | masks["ccc"][p]),
        ("intersection", "a bb", lambda p: masks["a"][p] & masks["bb"][p]),
        ("minus", "a bb", lambda p: masks["a"][p] & ~masks["bb"][p]),
        ("complement", "a", lambda p: ~masks["a"][p]),
    ):
        code, out, _ = call(capsys, "groups", "combine", how, tmp_path / how, *(tmp_path / g for g in given.split()))
        assert code == 0
        assert out.startswith(f"{how}: ")
        assert all(torch.equal(Group.load(tmp_path / how).mask(path), combined(path)) for path in SHAPES)
    assert call(capsys, "groups", "combine", "minus", tmp_path / "x", tmp_path / "a")[0] == 2
    assert "nearest: union" in call(capsys, "groups", "combine", "unoin", tmp_path / "x", tmp_path / "a")[2]
    _, out, _ = call(capsys, "groups", "compare", tmp_path / "a", tmp_path / "bb",
                     "--halves-a", tmp_path / "bb", tmp_path / "ccc")  # fmt: skip
    assert out.rstrip("\n") == str(overlap(made["a"], made["bb"], (made["bb"], made["ccc"])))
    _, out, _ = call(capsys, "groups", "describe", tmp_path / "a", tmp_path / "bb")
    assert out.rstrip("\n") == f"{made['a'].table()}\n{made['bb'].table()}"
    assert call(capsys, "groups", "describe", tmp_path / "a", "--every")[1].rstrip("\n") == str(made["a"])


def test_what_groups_does_is_shown_and_the_nearest_named(capsys):
    code, out, _ = call(capsys, "groups", "--help")
    assert code == 0
    assert all(word in out for word in ("make", "combine", "compare", "describe"))
    code, _, err = call(capsys, "groups", "mkae")
    assert code == 2
    assert "nearest: make" in err


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def write(path, text="x" * 1000):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def study(folder, done=(), **score):
    write(folder / "study.json", {"spec": {"study": "drift", "score": score}})
    write(folder / ".lock", "")
    for name in done:
        write(folder / name / "result.json", {})
    for name in ("safety", "utility"):
        write(folder / "scores" / name / "scores.json", {})
        write(folder / "scores" / name / "layers.0.q.safetensors")
    write(folder / "scores" / "result.json", {})
    write(folder / "tune-free" / "run" / "checkpoints" / "step-000100" / "trained.safetensors")
    write(folder / "tune-free" / "adapter" / "adapter_model.safetensors")


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def empty_temp(monkeypatch, tmp_path):
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    return tmp_path / "temp"


def test_clean_removes_what_is_left_and_nothing_else(capsys, tmp_path, empty_temp):
    dead, mine, runs = gone(), os.getpid(), tmp_path / "runs"
    write(runs / f".deltalab-{dead}-abc" / "sums")
    write(runs / f".deltalab-{mine}-abc" / "sums")
    write(runs / "deep" / "er" / f".group.{dead}-3.tmp" / "entries.safetensors")
    write(runs / "deep" / "er" / f".group.{mine}-3.tmp")
    write(empty_temp / f".deltalab-{dead}-xyz" / "sums")
    study(runs / "finished", ["groups", "tune-free", "report"])
    study(runs / "grouped", ["groups"])
    study(runs / "begun")
    study(runs / "kept", ["groups", "tune-free", "report"], keep=True)
    scratch = tmp_path / "ram"
    study(runs / "elsewhere", ["groups", "report"], scratch=str(scratch))
    own = scratch / f"deltalab-{digest(str((runs / 'elsewhere').resolve()))}"
    write(own / "safety" / "scores.json", {})
    write(scratch / "deltalab-other" / "safety" / "scores.json", {})
    write(runs / "trained" / "record.json", {})
    write(runs / "trained" / "checkpoints" / "best" / "trained.safetensors")
    write(runs / "stopped" / "checkpoints" / "step-000010" / "trained.safetensors")
    write(runs / "scores-of-mine" / "scores.json", {})
    before = files(tmp_path)
    removed = {
        f"runs/.deltalab-{dead}-abc/sums", f"runs/deep/er/.group.{dead}-3.tmp/entries.safetensors",
        f"temp/.deltalab-{dead}-xyz/sums", f"ram/{own.name}/safety/scores.json",
        "runs/finished/tune-free/run/checkpoints/step-000100/trained.safetensors",
        "runs/kept/tune-free/run/checkpoints/step-000100/trained.safetensors",
        "runs/trained/checkpoints/best/trained.safetensors",
        *(f"runs/{name}/scores/{kind}/{file}" for name in ("finished", "grouped", "elsewhere")
          for kind in ("safety", "utility") for file in ("scores.json", "layers.0.q.safetensors")),
    }  # fmt: skip
    assert removed <= before
    size = sum((tmp_path / path).stat().st_size for path in removed)
    code, out, _ = call(capsys, "clean", runs, "--dry-run")
    assert code == 0
    assert f"{size} bytes" in out
    assert "would be freed" in out
    assert files(tmp_path) == before
    _, out, _ = call(capsys, "clean", runs)
    assert files(tmp_path) == before - removed
    assert f"{size} bytes" in out
    assert "0 found, 0 bytes" in call(capsys, "clean", runs)[1]


def test_clean_leaves_alone_what_is_in_use(capsys, tmp_path, empty_temp):
    study(tmp_path / "runs" / "busy", ["groups", "tune-free", "report"])
    before = files(tmp_path)
    with open(tmp_path / "runs" / "busy" / ".lock", "r+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "0 found" in call(capsys, "clean", tmp_path / "runs")[1]
        assert files(tmp_path) == before
    assert "3 found" in call(capsys, "clean", tmp_path / "runs")[1]
    code, _, err = call(capsys, "clean", tmp_path / "nowhere")
    assert code == 2
    assert "is no folder" in err
