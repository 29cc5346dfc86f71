"""A run on a quantised base: what it records, that it goes on bitwise, and what its adapter loads on."""

import json
import signal

import pytest
import torch

from deltalab.core.errors import UserError
from deltalab.core.records import read_record
from deltalab.core.spec import build
from deltalab.deltas.adapt import attached, unload
from deltalab.deltas.merge import merged
from deltalab.deltas.peft_format import load_adapter
from deltalab.models.load import load, model_digest
from deltalab.quant.base import QuantisedLinear
from deltalab.report.training import tables
from deltalab.train import TrainSpec, loop, run_spec
from tests.helpers import byte_tokenizer, tiny_llama, tokens
from tests.train.runs import conversations


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder with data beside it."""
    folder = tmp_path_factory.mktemp("place")
    tiny_llama(hidden=16, layers=1, mlp=24).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    rows = [{"prompt": c.messages[0]["content"], "response": c.messages[1]["content"]} for c in conversations()]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def plan(place, output, way, adapt, **fields):
    values = {"model": str(place), "quantize": way, "adapt": [{"targets": "all-linear", "r": 2, **adapt}],
              "data": [{"task": "instruct", "path": str(place / "data.jsonl")}],
              "optim": {"lr": 0.01, "steps": 6, "batch": 4}, "run": {"checkpoint_every": 2}, "output": str(output)}  # fmt: skip
    return build(TrainSpec, {**values, **fields})


def adapter_of(path):
    return (path.parent / "adapter" / "adapter_model.safetensors").read_bytes()


ADAPTS = [
    ("int4-group", {"method": "qalora"}),
    ("int4-group", {"method": "lora", "init": "pissa"}),
    ("nf4", {"method": "lora", "init": "loftq"}),
    ("nf4", {"method": "dora"}),
]


@pytest.mark.parametrize(
    ("way", "adapt"), ADAPTS, ids=lambda a: a if isinstance(a, str) else a.get("init", a["method"])
)
def test_a_run_is_recorded_stopped_and_gone_on_with_bitwise(place, tmp_path, way, adapt, monkeypatch):
    spec = plan(place, tmp_path / "whole", way, adapt)
    path = run_spec(spec, progress=False)
    record = read_record(path.parent)
    fresh, _ = load(place, quantize=way, adapt=spec.adapt, seed=spec.seed)
    assert record["spec"]["quantize"] == way
    assert record["base"] == model_digest(fresh) != model_digest(load(place)[0])
    assert record["sizes"]["base"] == sum(p.numel() for p in tiny_llama(hidden=16, layers=1, mlp=24).parameters())
    assert 0 < record["result"]["loss"][-1] < record["result"]["loss"][0]
    rows = dict(tables(record)[0].rows)
    assert rows["quantised"] == way
    assert rows["delta"] == f"{adapt['method']} on all-linear"

    step = loop.Loop._step

    def interrupted(self, samples, shown):
        step(self, samples, shown)
        if self.state.step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop.Loop, "_step", interrupted)
    again = spec.but(output=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        run_spec(again, progress=False)
    monkeypatch.setattr(loop.Loop, "_step", step)
    with pytest.raises(UserError, match=rf"quantize: '{way}' there, 'int8' here"):
        run_spec(again.but(quantize="int8"), progress=False)
    assert adapter_of(run_spec(again, progress=False)) == adapter_of(path)

    model = load_adapter(unload(fresh), path.parent / "adapter")
    assert all(isinstance(model.get_submodule(p), QuantisedLinear) for p in attached(model))
    assert torch.isfinite(merged(model)(tokens()).logits).all()


def test_a_run_on_a_saved_quantised_model_is_the_run_on_the_one_quantised_then(place, tmp_path):
    """The same base: the adapter and the record's digest are the same, bitwise."""
    quantised, tokenizer = load(place, quantize="nf4")
    for part in (quantised, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    first = run_spec(plan(place, tmp_path / "first", "nf4", {"method": "lora"}), progress=False)
    second = plan(place, tmp_path / "second", None, {"method": "lora"}, model=str(tmp_path / "saved"))
    second = run_spec(second, progress=False)
    assert adapter_of(first) == adapter_of(second)
    assert read_record(first.parent)["base"] == read_record(second.parent)["base"] == model_digest(quantised)
