"""The benchmark for machines with a GPU, as far as a CPU goes: every line runs, and the sides compute the same."""

import json
import math

import pytest
import torch

from benchmarks import gpu


def test_its_sides_compute_the_same_step(tmp_path, capsys, monkeypatch):
    pytest.importorskip("bitsandbytes")
    real = gpu.by_deltalab

    def fails(model, method, kernels):
        if kernels == "plain" and method == "lora":
            raise torch.OutOfMemoryError("no room\nat all")
        return real(model, method, kernels)

    monkeypatch.setattr(gpu, "by_deltalab", fails)
    assert gpu.main(["--tiny", "--sides", *(s for s in gpu.SIDES if s != "peft, compiled"), "--json", str(tmp_path / "x.json")]) == 0  # fmt: skip
    said = json.loads((tmp_path / "x.json").read_text())
    assert said["machine"]["torch"] == torch.__version__
    rows = said["rows"]
    assert len(rows) == 3 * 4
    for method in gpu.METHODS:
        first, *others = [row for row in rows if row["method"] == method and row["failed"] is None]
        assert first["side"] == "peft"
        assert len(others) == (2 if method == "lora" else 3)
        for row in others:
            assert math.isclose(row["loss"], first["loss"], rel_tol=1e-5)
            assert math.isclose(row["gradient"], first["gradient"], rel_tol=1e-3)
            assert row["tokens_per_second"] > 0
    assert [row["failed"] for row in rows if row["failed"]] == ["OutOfMemoryError: no room"]
    assert "OutOfMemoryError: no room" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 0
    assert "needs a CUDA device" in capsys.readouterr().out
