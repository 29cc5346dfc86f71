"""What a finished run costs and proves: each figure against its own definition, each proof against something that breaks it."""

import json

import pytest
import torch

import deltalab as dl
from deltalab.core.errors import UserError
from deltalab.core.records import read_record
from deltalab.core.spec import build
from deltalab.data.chat import encode_all
from deltalab.data.collate import collate
from deltalab.deltas.peft_format import save_adapter
from deltalab.measure.activations import saved_bytes
from deltalab.train import LoopSpec, OptimSpec, RunSpec, TrainSpec, costs, run_spec
from deltalab.train import loop as loops
from deltalab.train.evaluate import loss
from deltalab.train.loop import Loop
from deltalab.train.loss import nll_sum
from deltalab.train.parts import read_parts
from tests.deltas.perturb import perturbed
from tests.helpers import byte_tokenizer, tiny_llama
from tests.train.runs import conversations

TOKENIZER = byte_tokenizer()
SAMPLES = list(encode_all(TOKENIZER, conversations(), 128))
ONE = {key: value for key, value in collate(SAMPLES[:1], 0).items() if key != "labels"}


def ran(model, **optim):
    spec = LoopSpec(optim=OptimSpec(lr=0.01, steps=2, batch=4, **optim), run=RunSpec(pack=False))
    one = Loop(model, 0, SAMPLES, [], spec, progress=False)
    one.run()
    return one


def plan(tmp_path, rows=20, **fields):
    tiny_llama(hidden=16, layers=1, mlp=24).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"q": f"number {i}", "a": "even" if i % 2 == 0 else "odd"}) for i in range(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    task = {"task": "rows", "path": str(tmp_path / "rows.jsonl"), "prompt": "{q}", "reply": "{a}", "answers": ["even", "odd"]}  # fmt: skip
    return build(TrainSpec, {"model": str(tmp_path / "model"), "adapt": [{"method": "lora", "r": 2}], "data": [task],
                             "optim": {"lr": 0.01, "steps": 2, "batch": 4}, **fields})  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_saved_activations_are_those_of_the_first_piece(accumulate):
    one = ran(dl.adapt(tiny_llama(), dl.LoRA(r=2)), accumulate=accumulate)
    found = costs.of_step(one)
    one.model.train()
    first = [one.data[i] for i in one.batch(0)]
    pieces = [first] if accumulate == 1 else [first[:2], first[2:]]
    sizes = {saved_bytes(one.model, lambda part=part: nll_sum(one.model, collate(part, 0))) for part in pieces}
    assert found["saved_activations"] in sizes
    assert found["gradient_only_delta"]
    assert all(p.grad is None for p in one.model.parameters())


def test_a_gradient_in_the_base_is_found():
    one = ran(dl.adapt(tiny_llama(), dl.LoRA(r=2)))
    next(p for n, p in one.model.named_parameters() if ".delta." not in n).requires_grad_()
    assert not costs.of_step(one)["gradient_only_delta"]


@pytest.mark.parametrize("method", [dl.LoRA(r=2), dl.DoRA(r=2), dl.IA3(), dl.Train("full")], ids=lambda m: m.method)
def test_a_merged_and_a_loaded_adapter_are_the_trained_one(tmp_path, method):
    model = perturbed(dl.adapt(tiny_llama(), method))
    save_adapter(model, tmp_path / "adapter")
    want = model(**ONE).logits
    found = costs.of_adapter(model, tmp_path / "adapter", ONE)
    z = dl.merged(model)(**ONE).logits
    assert torch.equal(model(**ONE).logits, want)
    assert found["reloaded"]
    assert found["reload_error"] == 0
    assert found["merge"]["holds"]
    assert found["merge"]["largest"] == pytest.approx(float((z - want).detach().abs().max()), abs=1e-5)
    assert found["merge"]["tolerance"] == 1e-3
    assert found["latency"].keys() == {"base", "adapter", "merged"}
    assert min(found["latency"].values()) > 0


def test_a_bad_merge_and_another_file_are_found(tmp_path, monkeypatch):
    model = perturbed(dl.adapt(tiny_llama(), dl.LoRA(r=2)))
    save_adapter(perturbed(dl.adapt(tiny_llama(), dl.LoRA(r=2)), seed=5), tmp_path / "adapter")
    monkeypatch.setattr(costs, "merged", lambda _: tiny_llama())
    found = costs.of_adapter(model, tmp_path / "adapter", ONE)
    assert not found["reloaded"]
    assert not found["merge"]["holds"]
    assert found["merge"]["relative"] > 1e-3


def test_a_pruned_file_is_the_trained_one_to_rounding(tmp_path):
    spec = plan(tmp_path, adapt=[{"method": "adalora", "init_r": 12, "target_r": 8}], optim={"lr": 0.01, "steps": 12, "batch": 4})  # fmt: skip
    record = read_record(run_spec(spec, tmp_path / "run", progress=False))
    assert record["proofs"]["reloaded"]
    assert record["cost"]["reload_error"] < 1e-6


def test_what_has_no_merged_weight_says_so(tmp_path):
    model = dl.adapt(tiny_llama(), dl.ZeroInitPrefix())
    save_adapter(model, tmp_path / "adapter")
    found = costs.of_adapter(model, tmp_path / "adapter", ONE)
    assert "depends on the input" in found["merge"]["why"]
    assert found["latency"].keys() == {"base", "adapter"}


def test_a_merged_model_that_does_not_fit_is_not_made(tmp_path, monkeypatch):
    model = perturbed(dl.adapt(tiny_llama(), dl.LoRA(r=2)))
    save_adapter(model, tmp_path / "adapter")
    monkeypatch.setattr(costs, "available_memory", lambda: 1000)
    why = costs.of_adapter(model, tmp_path / "adapter", ONE)["merge"]["why"]
    assert "a copy of the adapted weights needs" in why


def test_the_record_of_a_run_has_them(tmp_path):
    retained = {"task": "rows", "path": str(tmp_path / "rows.jsonl"), "prompt": "say {a}", "reply": "{a}", "limit": 4}
    spec = plan(tmp_path, retain=[retained, retained], output=str(tmp_path / "run"))
    record = read_record(run_spec(spec, progress=False))
    assert record["proofs"] == {"base_untouched": True, "gradient_only_delta": True, "reloaded": True}
    assert record["cost"]["merge"]["holds"]
    assert record["cost"]["step_seconds"] > 0
    assert record["cost"]["tokens_per_second"] > 0
    assert record["cost"]["memory_peak"] > record["cost"]["memory_before"] > 0
    assert record["sizes"]["kinds"][0][0] == "LoRA"
    model, tokenizer = dl.load(spec.model)
    known = spec.retain[0].train()
    assert list(record["forgetting"]) == ["rows", "rows.2"]
    assert record["forgetting"]["rows"]["before"] == pytest.approx(loss(model, tokenizer, known, 128), rel=1e-6)
    dl.load_adapter(model, tmp_path / "run/adapter")
    assert record["forgetting"]["rows"]["after"] == pytest.approx(loss(model, tokenizer, known, 128), rel=1e-6)
    plain = read_record(run_spec(spec.but(costs=False, output=str(tmp_path / "plain")), progress=False))
    assert plain["cost"].keys() == {"tokens_per_second", "memory_before", "memory_peak"}
    assert plain["proofs"] == {"base_untouched": True}


def test_full_tuning_leaves_the_base_to_be_restored_and_a_touched_base_is_found(tmp_path, monkeypatch):
    full = plan(tmp_path, adapt=[{"method": "train", "what": "full"}])
    assert read_record(run_spec(full, tmp_path / "full", progress=False))["proofs"]["base_untouched"]
    step = loops.Loop._step

    def touching(self, samples, shown):
        step(self, samples, shown)
        with torch.no_grad():
            next(p for n, p in self.model.named_parameters() if ".delta." not in n).add_(1e-3)

    monkeypatch.setattr(loops.Loop, "_step", touching)
    assert not read_record(run_spec(plan(tmp_path), tmp_path / "lora", progress=False))["proofs"]["base_untouched"]


def test_validation_is_a_part_of_the_training_data_and_never_the_test_data(tmp_path):
    spec = plan(tmp_path, validation=0.25)
    task = {**spec.plain()["data"][0], "test_path": str(tmp_path / "test.jsonl")}
    spec = spec.but(data=[task])
    with pytest.raises(UserError, match=r"test\.jsonl"):  # told before anything is tuned, rather than after
        read_parts(spec)
    (tmp_path / "test.jsonl").write_text(json.dumps({"q": "of the test data", "a": "odd"}))
    (part,) = read_parts(spec)
    assert "of the test data" not in {c.messages[0]["content"] for c in part.train + part.test}
    whole = spec.data[0].train()
    assert len(part.test) == 5
    assert sorted(map(repr, part.train + part.test)) == sorted(map(repr, whole))
    assert read_parts(spec.but(seed=1)) == [part]
    skill = {"task": "skills", "families": ["past_tense"], "n": 300}
    (verbs,) = read_parts(spec.but(data=[skill], validation=0.25))
    sides = [{c.messages[1]["content"] for c in side} for side in (verbs.train, verbs.test)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == round(0.25 * len(sides[0] | sides[1]))
    record = read_record(run_spec(spec, tmp_path / "run", progress=False))
    assert record["scores"]["after"]["rows"]["n"] == 5
    assert record["data"]["samples"] == 15
    with pytest.raises(UserError, match="validation=0.01 leaves nothing"):
        read_parts(spec.but(validation=0.01))
