"""A model adapted here in transformers.Trainer and TRL's SFTTrainer: schedules, penalties, checkpoints, resumption."""

import copy
import json
import pickle
import shutil
import types

import datasets
import pytest
import torch
import transformers
import trl
from safetensors.torch import load_file

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.peft_format import trained_state
from tests.helpers import assert_close_by_norm, byte_tokenizer, tiny_llama, tokens

STEPS, BATCH = 8, 4
METHODS = {
    "lora": lambda: dl.LoRA(r=4, dropout=0.2, targets="all-linear"),
    "adalora": lambda: dl.AdaLoRA(init_r=4, target_r=2, dropout=0.1, tinit=1, tfinal=2, targets="attention"),
    "lora and norms": lambda: [dl.LoRA(r=2, dropout=0.1), dl.Train("norms")],
}
trainer_kind = pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])


def base():
    return tiny_llama(hidden=16, layers=1, mlp=24)


def adapted(method="lora"):
    return dl.adapt(base(), METHODS[method](), seed=1)


def rows(n=24, length=10):
    return [{"input_ids": ids, "labels": ids, "attention_mask": [1] * length} for ids in tokens(n, length).tolist()]


def trainer(kind, model, folder, **changes):
    """A run of more than one epoch, with a checkpoint in the middle and at the end."""
    options = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 5e-3,
        "save_steps": STEPS // 2, "logging_steps": 1, "report_to": "none", "seed": 3, "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "weight_decay": 0.1, **changes,
    }  # fmt: skip
    own = {"callbacks": [dl.TrainerCallback()], "model": model}
    if kind == "Trainer":
        args = transformers.TrainingArguments(**options)
        return transformers.Trainer(args=args, train_dataset=rows(), eval_dataset=rows(4), **own)
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows()])
    args = trl.SFTConfig(max_length=16, **options)
    return trl.SFTTrainer(
        args=args, train_dataset=data, eval_dataset=data.select(range(4)), processing_class=byte_tokenizer(), **own
    )


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def moments(folder):
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return {f"{i}.{key}": value for i, of in state.items() for key, value in of.items()}


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **given):
        control.should_training_stop = state.global_step == self.step


@trainer_kind
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_holds_the_adapter_alone_and_a_resumed_run_ends_with_the_same_bits(kind, method, tmp_path):
    whole, half = adapted(method), adapted(method)
    first, last = f"checkpoint-{STEPS // 2}", f"checkpoint-{STEPS}"
    trainer(kind, whole, tmp_path / "whole").train()
    holds_the_adapter_alone(whole, tmp_path / "whole" / last)
    (tmp_path / "half").mkdir()
    shutil.copytree(tmp_path / "whole" / first, tmp_path / "half" / first)
    before = {key: value.clone() for key, value in trained_state(half).items()}
    trainer(kind, half, tmp_path / "half").train(resume_from_checkpoint=True)
    assert states_equal(trained_state(half), trained_state(whole))
    assert not states_equal(trained_state(half), before)
    assert states_equal(moments(tmp_path / "half" / last), moments(tmp_path / "whole" / last))


def holds_the_adapter_alone(model, folder):
    assert states_equal(load_file(folder / "model.safetensors"), trained_state(model))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    written = {key for file in folder.glob("*.safetensors") for key in load_file(file)}
    assert not frozen & {key.removeprefix("base_model.model.") for key in written}
    again = dl.load_adapter(base(), folder)
    assert_close_by_norm(again(tokens()).logits, model.eval()(tokens()).logits, 1e-6)


@trainer_kind
def test_the_schedule_runs_by_the_trainers_count(kind, tmp_path):
    model = adapted("adalora")
    trainer(kind, model, tmp_path).train()
    for delta in attached(model).values():
        assert delta.clock.tolist() == [STEPS, STEPS - 2, STEPS]
    assert sum(int((delta.E != 0).sum()) for delta in attached(model).values()) == 2 * len(attached(model))
    halfway, config = (
        json.loads((tmp_path / f"checkpoint-{step}/adapter_config.json").read_text()) for step in (STEPS // 2, STEPS)
    )
    assert (config["total_step"], config["tinit"], config["tfinal"]) == (STEPS, 1, 2)
    assert halfway["rank_pattern"] is None
    assert config["rank_pattern"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_penalty_counts_once_a_step_and_is_clipped(accumulate, tmp_path):
    """The same steps in plain PyTorch: the mean loss of the batch and the penalty, clipped together."""
    spec = dl.AdaLoRA(init_r=4, target_r=2, tinit=1, tfinal=2, targets="attention", orth_reg_weight=5.0)
    model, other = (dl.adapt(base(), spec, seed=1) for _ in range(2))
    changes = {"per_device_train_batch_size": BATCH // accumulate, "gradient_accumulation_steps": accumulate,
               "lr_scheduler_type": "constant", "max_grad_norm": 0.5, "weight_decay": 0.0}  # fmt: skip
    in_theirs, seen = trainer("Trainer", model, tmp_path, **changes), []
    collate = in_theirs.data_collator
    in_theirs.data_collator = lambda batch: seen.append(collate(batch)) or seen[-1]
    in_theirs.train()
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    norms = []
    for t in range(1, STEPS + 1):
        ids = torch.cat([piece["input_ids"] for piece in seen[(t - 1) * accumulate : t * accumulate]])
        assert len(ids) == BATCH
        loss = other(input_ids=ids, labels=ids).loss
        (loss + dl.penalty(other)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)))
        optimizer.step()
        dl.step(other, t, STEPS)
        optimizer.zero_grad()
        logged = in_theirs.state.log_history[t - 1]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4), "the penalty is no part of what is logged"
        assert logged["grad_norm"] == pytest.approx(norms[-1], rel=1e-4)
    assert max(norms) > 0.5, "nothing was clipped"
    for name, tensor in trained_state(other).items():
        assert_close_by_norm(trained_state(model)[name].double(), tensor.double(), 1e-5)


@trainer_kind
def test_the_best_checkpoint_is_loaded_at_the_end(kind, tmp_path):
    model = adapted("lora")
    changes = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "eval_loss",
               "greater_is_better": True}  # fmt: skip
    ran = trainer(kind, model, tmp_path, learning_rate=5e-2, **changes)
    ran.train()
    losses = {row["step"]: row["eval_loss"] for row in ran.state.log_history if "eval_loss" in row}
    best = max(losses, key=losses.get)
    assert best != STEPS, "the last one: nothing would have to be loaded"
    assert ran.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert states_equal(trained_state(model), load_file(tmp_path / f"checkpoint-{best}/model.safetensors"))


def test_nothing_is_said_about_the_base_when_a_checkpoint_is_loaded(tmp_path, caplog):
    trainer("Trainer", adapted(), tmp_path).train()
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    transformers.utils.logging.enable_propagation()
    try:
        trainer("Trainer", adapted(), tmp_path).train(resume_from_checkpoint=True)
    finally:
        transformers.utils.logging.disable_propagation()
    assert "missing keys" not in caplog.text


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    trainer("Trainer", adapted("lora"), tmp_path).train()
    for method in ("adalora", "lora and norms"):
        with pytest.raises(dl.UserError, match="the checkpoint is of another adapter"):
            trainer("Trainer", adapted(method), tmp_path).train(resume_from_checkpoint=True)
    model, state = adapted("lora"), tiny_llama(hidden=16, layers=1, mlp=24, seed=5).state_dict()
    trainer("Trainer", model, tmp_path)
    model.load_state_dict(state, strict=False)  # a base's state is none of an adapter
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


@trainer_kind
def test_what_is_saved_in_the_end_is_the_adapter(kind, tmp_path):
    model = adapted("adalora")
    ran = trainer(kind, model, tmp_path / "run")
    ran.train()
    ran.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final/model.safetensors").exists()
    again = dl.load_adapter(base(), tmp_path / "final")
    assert_close_by_norm(again(tokens()).logits, model.eval()(tokens()).logits, 1e-6)
    ran = trainer(kind, adapted("adalora"), tmp_path / "stopped", save_strategy="no")
    ran.add_callback(StopAt(4))
    ran.train()
    with pytest.raises(dl.UserError, match="stopped at step 4 of 6"):
        ran.save_model(str(tmp_path / "none"))


@trainer_kind
def test_merged_and_unloaded_models_are_plain_again(kind, tmp_path):
    model = adapted("lora")
    trainer(kind, model, tmp_path / "run", save_strategy="no").train()
    want, plain = model.eval()(tokens()).logits, dl.merged(model)
    twin = (
        copy.deepcopy(model) if kind == "Trainer" else None
    )  # TRL leaves a forward on the model that cannot be copied
    dl.unload(model)
    assert torch.equal(model(tokens()).logits, base()(tokens()).logits)
    assert_close_by_norm(plain(tokens()).logits, want, 1e-5)
    for name, one in (("merged", plain), ("base", model)):
        one.save_pretrained(tmp_path / name)
        assert states_equal(load_file(tmp_path / name / "model.safetensors"), one.state_dict())
        assert not (tmp_path / name / "adapter_config.json").exists()
    for copied in (twin, pickle.loads(pickle.dumps(twin))) if twin is not None else ():
        assert torch.equal(copied(tokens()).logits, want)
        copied.save_pretrained(tmp_path / "twin")
        assert_close_by_norm(dl.load_adapter(base(), tmp_path / "twin")(tokens()).logits, want, 1e-6)


def test_a_model_without_adapter_is_refused(tmp_path):
    ran = trainer("Trainer", base(), tmp_path)
    with pytest.raises(dl.UserError, match="has no adapter"):
        ran.train()


@trainer_kind
def test_a_delta_on_the_output_layer(kind, tmp_path):
    """TRL multiplies with the output layer's weight itself, so a delta there would never train."""
    model = dl.adapt(base(), dl.LoRA(targets=["q_proj", "lm_head"]))
    ran = trainer(kind, model, tmp_path)
    if kind == "Trainer":
        ran.train()
        assert attached(model)["lm_head"].B.abs().sum() > 0
    else:
        with pytest.raises(dl.UserError, match="without the delta on it"):
            ran.train()


def test_half_precision_scales_the_penalty_and_leaves_steps_out():
    """fp16: the optimizer divides gradients by a scale, and does nothing when they are not finite."""
    model, other = adapted("adalora"), adapted("adalora")
    callback, state = dl.TrainerCallback(), types.SimpleNamespace(global_step=0, max_steps=STEPS)
    scaler = types.SimpleNamespace(get_scale=lambda: 1024.0)
    callback.on_step_begin(None, state, None, model=model, optimizer=types.SimpleNamespace(scaler=scaler))
    callback.on_step_begin(None, state, None, model=other, optimizer=types.SimpleNamespace(scaler=None))
    scaled, plain = ([p.grad for p in m.parameters() if p.grad is not None] for m in (model, other))
    assert len(plain) == 2 * len(attached(other))
    for got, want in zip(scaled, plain, strict=True):
        assert_close_by_norm(got, 1024 * want, 1e-6)
    for skipped, t in ((True, 0), (False, 1)):
        for delta in attached(model).values():
            delta.E.grad = torch.ones_like(delta.E)
        optimizer = types.SimpleNamespace(step_was_skipped=skipped)
        callback.on_optimizer_step(None, state, None, model=model, optimizer=optimizer)
        assert {int(delta.clock[0]) for delta in attached(model).values()} == {t}
