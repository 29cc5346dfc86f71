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
from deltalab.quant.linear import GroupLinear
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


def plan(place, output, adapt, **fields):
    values = {"model": str(place), "quantize": "int4-group", "adapt": [{"targets": "all-linear", "r": 2, **adapt}],
              "data": [{"task": "instruct", "path": str(place / "data.jsonl")}],
              "optim": {"lr": 0.01, "steps": 6, "batch": 4}, "run": {"checkpoint_every": 2}, "output": str(output)}  # fmt: skip
    return build(TrainSpec, {**values, **fields})


def adapter_of(path):
    return (path.parent / "adapter" / "adapter_model.safetensors").read_bytes()


ADAPTS = [{"method": "qalora"}, {"method": "lora", "init": "loftq"}, {"method": "lora", "init": "pissa"}]


@pytest.mark.parametrize("adapt", ADAPTS, ids=lambda a: a.get("init", a["method"]))
def test_a_run_is_recorded_stopped_and_gone_on_with_bitwise(place, tmp_path, adapt, monkeypatch):
    spec = plan(place, tmp_path / "whole", adapt)
    path = run_spec(spec, progress=False)
    record = read_record(path.parent)
    fresh, _ = load(place, quantize="int4-group", adapt=spec.adapt, seed=spec.seed)
    assert record["spec"]["quantize"] == "int4-group"
    assert record["base"] == model_digest(fresh) != model_digest(load(place)[0])
    assert record["sizes"]["base"] == sum(p.numel() for p in tiny_llama(hidden=16, layers=1, mlp=24).parameters())
    assert 0 < record["result"]["loss"][-1] < record["result"]["loss"][0]
    rows = dict(tables(record)[0].rows)
    assert rows["quantised"] == "int4-group"
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
    with pytest.raises(UserError, match=r"quantize: 'int4-group' there, 'int8' here"):
        run_spec(again.but(quantize="int8"), progress=False)
    assert adapter_of(run_spec(again, progress=False)) == adapter_of(path)

    model = load_adapter(unload(fresh), path.parent / "adapter")
    assert all(isinstance(model.get_submodule(p), GroupLinear) for p in attached(model))
    assert torch.isfinite(merged(model)(tokens()).logits).all()
