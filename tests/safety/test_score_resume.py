"""Scores that were killed are gone on with bitwise, and a folder is never of two things at once."""

import signal
import subprocess
import sys

import pytest
import torch

from deltalab.core.errors import UserError
from deltalab.deltas import LoRA
from deltalab.deltas.adapt import adapt
from deltalab.deltas.select import scored_linears
from deltalab.safety import score_files
from deltalab.safety.scores import Scores, snip, wanda
from tests.helpers import ROOT, tiny_llama
from tests.safety.reference import ragged, samples

STREAMED = {"mode": "streamed", "blocks": 1}


class Killed(BaseException):
    """What no one catches."""


@pytest.mark.parametrize(
    "mode", [{}, STREAMED, {"mode": "streamed", "blocks": 2}], ids=["resident", "streamed", "by-two"]
)
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("written", [1, 9, 13])
def test_a_killed_run_goes_on_at_the_first_matrix_that_is_missing(tmp_path, monkeypatch, mode, halves, written):
    """Bitwise as if it had not been killed, and only what is missing is computed."""
    model, data, write, done = tiny_llama(layers=2), ragged(), score_files.write_parts, []

    def writing(folder, path, parts):
        if len(done) == written:
            raise Killed
        write(folder, path, parts)
        done.append(path)

    monkeypatch.setattr(score_files, "write_parts", writing)
    with pytest.raises(Killed):
        snip(model, data, folder=tmp_path / "s", batch=3, halves=halves, **mode)
    assert sorted(p.name for p in (tmp_path / "s").glob("*.json")) == ["scores.partial.json"]
    with pytest.raises(UserError, match=r"incomplete(.|\n)*give the same command again"):
        Scores.load(tmp_path / "s")
    first, done[:] = list(done), []
    monkeypatch.setattr(score_files, "write_parts", lambda *args: (write(*args), done.append(args[1])))
    went_on = snip(model, data, folder=tmp_path / "s", batch=3, halves=halves, **mode)
    assert sorted(first + done) == sorted(scored_linears(model))
    want = snip(model, data, batch=3, halves=halves)
    assert all(torch.equal(went_on[p], want[p]) for p in want)
    assert not (tmp_path / "s/scores.partial.json").exists()
    before, seen = (tmp_path / "s/scores.json").stat().st_mtime_ns, []
    assert snip(model, data, folder=tmp_path / "s", batch=3, halves=halves, progress=seen.append)[first[0]].shape
    assert seen == []
    assert (tmp_path / "s/scores.json").stat().st_mtime_ns >= before


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from deltalab.safety import score_files
from deltalab.safety.scores import snip
from tests.helpers import tiny_llama
from tests.safety.reference import ragged
write, count = score_files.write_with, []
def writing(*args):
    count.append(1)
    if len(count) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*args)
score_files.write_with = writing
snip(tiny_llama(), ragged(), folder={folder!r}, batch=3, mode="streamed", blocks=1)
"""


def test_sigkill(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", KILLED.format(root=str(ROOT), folder=str(tmp_path / "s"))], capture_output=True
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    assert len(list((tmp_path / "s").glob("*.safetensors"))) == 5
    went_on = snip(tiny_llama(), ragged(), folder=tmp_path / "s", batch=3, **STREAMED)
    want = snip(tiny_llama(), ragged(), batch=3)
    assert all(torch.equal(went_on[p], want[p]) for p in want)


def stopped(folder, **more):
    """SNIP scores that were stopped after some matrices."""
    snip(tiny_llama(), samples(), folder=folder, **more)
    (folder / "scores.json").rename(folder / "scores.partial.json")
    for file in sorted(folder.glob("*.safetensors"))[::2]:
        file.unlink()


OTHERS = {
    "model": lambda f: snip(tiny_llama(seed=1), samples(), folder=f),
    "data": lambda f: snip(tiny_llama(), samples(seed=1), folder=f),
    "template": lambda f: snip(tiny_llama(), samples(), folder=f, template="t"),
    "positions": lambda f: snip(tiny_llama(), samples(), folder=f, positions="response"),
    "batch": lambda f: snip(tiny_llama(), samples(), folder=f, batch=2),
    "halves": lambda f: snip(tiny_llama(), samples(), folder=f, halves=True),
    "base": lambda f: snip(tiny_llama(), samples(), folder=f, base=tiny_llama(seed=1)),
    "score": lambda f: wanda(tiny_llama(), samples(), folder=f),
    "dtype": lambda f: snip(tiny_llama(dtype=torch.float64), samples(), folder=f),
    "adapted": lambda f: snip(adapt(tiny_llama(), LoRA()), samples(), folder=f),
    "samples": lambda f: snip(tiny_llama(), samples(4), folder=f),
    "shapes": lambda f: snip(tiny_llama(mlp=40), samples(), folder=f),
}  # fmt: skip


@pytest.mark.parametrize("key", OTHERS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "stopped"])
def test_going_on_with_something_else_is_refused_by_name(tmp_path, key, whole):
    folder = tmp_path / "s"
    if whole:
        snip(tiny_llama(), samples(), folder=folder)
    else:
        stopped(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UserError, match="holds scores of something else") as caught:
        OTHERS[key](folder)
    assert f"{key}" in caught.value.found
    assert "there" in caught.value.found
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_mode_is_no_other_score(tmp_path):
    stopped(tmp_path / "s")
    went_on, want = snip(tiny_llama(), samples(), folder=tmp_path / "s", **STREAMED), snip(tiny_llama(), samples())
    assert all(torch.equal(went_on[p], want[p]) for p in want)


def test_a_beginning_without_a_result_binds_nobody(tmp_path):
    stopped(tmp_path / "s")
    for file in (tmp_path / "s").glob("*.safetensors"):
        file.unlink()
    assert snip(tiny_llama(seed=1), samples(), folder=tmp_path / "s").manifest["samples"] == 5


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"no score manifest(.|\n)*found: model.safetensors"):
        snip(tiny_llama(), samples(), folder=tmp_path)
