"""A record is enough to run it again, to the same bits."""

import json

import pytest

from deltalab.cli import main
from deltalab.train import EvalSpec, OptimSpec, RunSpec, TrainSpec, run_spec


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "first"
    spec = TrainSpec(
        model="organism", adapt=[{"method": "lora", "r": 2, "dropout": 0.1}], data=[{"task": "skills", "n": 24, "n_test": 4}],
        optim=OptimSpec(steps=3, batch=4), run=RunSpec(), eval=EvalSpec(limit=4), output=str(folder),
    )  # fmt: skip
    run_spec(spec, progress=False)
    return folder


def run(*args):
    with pytest.raises(SystemExit) as ended:
        main(["rerun", *map(str, args)])
    return ended.value.code


def test_it_comes_to_the_same(first, capsys):
    assert run(first) == 0
    said = capsys.readouterr().out
    again = first.with_name("first-again")
    assert f"written: {again}" in said
    assert "the adapter: the same to the bit" in said
    assert "losses" not in said
    records = [json.loads((place / "record.json").read_text()) for place in (first, again)]
    assert records[0]["result"]["loss"] == records[1]["result"]["loss"]


def test_what_came_out_otherwise_is_told(first, tmp_path, capsys):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(first, other)
    record = json.loads((other / "record.json").read_text())
    record["result"]["loss"][1] += 1
    record["versions"]["torch"] = "1.0"
    (other / "record.json").write_text(json.dumps(record))
    (other / "adapter/adapter_model.safetensors").write_bytes(b"")
    assert run(other / "record.json", "--output", tmp_path / "again") == 0
    said = capsys.readouterr().out
    assert "losses: " in said
    assert "'torch': '1.0'" in said
    assert "the adapter: other bytes" in said


def test_mistakes(first, tmp_path, capsys):
    assert run(first, "--output", first) == 2
    assert "holds the record itself" in capsys.readouterr().err
    assert run(tmp_path) == 2
    assert "no record in" in capsys.readouterr().err
    (tmp_path / "record.json").write_text(json.dumps({"format": 1, "kind": "score"}))
    assert run(tmp_path) == 2
    assert "is not run again" in capsys.readouterr().err
