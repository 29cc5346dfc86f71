"""A packed step is the padded one, to any budget; a run says what it does."""

import json

import pytest
import torch
import transformers

import deltalab as dl
from deltalab.core.errors import UserError
from deltalab.core.records import read_record
from deltalab.data.chat import IGNORED, Encoded
from deltalab.data.collate import collate, epoch_order
from deltalab.data.packing import PackedCollator, cut, pack
from deltalab.deltas.adapt import is_adapted
from deltalab.deltas.peft_format import trained_state
from deltalab.deltas.switch import set_kernels
from deltalab.models import precision
from deltalab.train import EvalSpec, LoopSpec, OptimSpec, RunSpec, loop, run_spec, train
from deltalab.train.checkpoint import Checkpoints
from deltalab.train.loss import mean_nll, nll_sum
from deltalab.train.trial import choose_packing
from tests.data.test_packing import MODELS, samples
from tests.deltas.perturb import perturbed
from tests.helpers import assert_close_by_norm, byte_tokenizer, tiny_llama
from tests.train.runs import At, interrupt, run
from tests.train.test_run import place, plan  # noqa: F401 - the fixture
from tests.train.test_trial import SAMPLES, deaf

TOKENIZER = byte_tokenizer()
PREFIX = "zero-init prefix"


@pytest.fixture
def one_order(monkeypatch):
    """Padded runs take the samples in the order of packed ones."""
    monkeypatch.setattr(
        loop, "epoch_order", lambda *args, by_length, **kwargs: epoch_order(*args, by_length=False, **kwargs)
    )


def step_of(model, batches):
    """Loss and gradients of some batches together, as one vector each."""
    model.zero_grad(set_to_none=True)
    losses = [nll_sum(model, batch) for batch in batches]
    sum(losses).backward()
    grads = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return torch.stack(losses).detach().double().sum()[None], torch.cat(grads)


def trained(name, dtype=torch.float32):
    """An adapted model in training mode, its dropout off."""
    model = MODELS[name]()
    if not is_adapted(model):
        model = perturbed(dl.adapt(model, dl.LoRA(r=2, targets="all-linear")))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.to(dtype).train()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3", "mixtral", "llama-int8", PREFIX])
def test_a_packed_step_is_the_padded_one(name, dtype, bound):
    if name == "mixtral" and dtype is torch.float64:
        pytest.skip("torch multiplies grouped experts in fp32 and narrower")
    some, model = samples(), trained(name, dtype)
    want = step_of(model, [collate(some, 0)])
    for pieces in ([some], [some[:2], some[2:]]):
        for got, expected in zip(step_of(model, [pack(piece) for piece in pieces]), want, strict=True):
            assert_close_by_norm(got, expected, bound)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", PREFIX])
def test_so_it_is_without_kernels(name, attention):
    model = trained(name, torch.float64)
    want = step_of(model, [collate(samples(), 0)])
    set_kernels(model, "plain")
    model.set_attn_implementation(attention)
    for got, expected in zip(step_of(model, [pack(samples())]), want, strict=True):
        assert_close_by_norm(got, expected, 1e-6)  # norms round to fp32


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", PREFIX])
def test_checkpointing_of_layers(name, reentrant):
    model = trained(name, torch.float64)
    want = step_of(model, [collate(samples(), 0)])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for got, expected in zip(step_of(model, [pack(samples())]), want, strict=True):
        assert_close_by_norm(got, expected, 1e-6)  # norms round to fp32


def test_a_planted_leak_changes_the_step():
    model = trained("llama")
    want = step_of(model, [collate(samples(), 0)])
    row = {name: value for name, value in pack(samples()).items() if "cu_seq" not in name}  # ours would hold to these
    leaking = step_of(model, [{**row, "attention_mask": torch.ones_like(row["input_ids"])}])
    assert abs(leaking[0] - want[0]) > 1e-3 * want[0]
    unmasked = step_of(model, [{**row, "labels": row["input_ids"].clone()}])
    assert unmasked[0] > want[0], "first tokens of samples would be predicted from the one before"


def test_the_held_out_loss_is_the_same():
    model = tiny_llama()
    want = mean_nll(model, [[sample] for sample in SAMPLES], lambda some: collate(some, 0))
    for packed, batch in ((True, pack), (False, lambda some: collate(some, 0))):
        ((*pieces,),) = cut([len(s.input_ids) for s in SAMPLES], packed=packed, budget=200)
        got = mean_nll(model, [[SAMPLES[i] for i in piece] for piece in pieces], batch)
        assert got == pytest.approx(want, rel=1e-5)


def options(pack=None, tokens=None, *, steps=5, accumulate=1, **fields):
    return LoopSpec(
        optim=OptimSpec(lr=5e-3, steps=steps, batch=6, accumulate=accumulate),
        run=RunSpec(pack=pack, tokens=tokens, **fields), eval=EvalSpec(fraction=0.3), seed=7,
    )  # fmt: skip


def flat(model):
    return torch.cat([t.flatten() for t in trained_state(model).values()])


def no_dropout():
    return dl.adapt(tiny_llama(hidden=16, layers=1, mlp=24), dl.LoRA(r=4, targets="all-linear"), seed=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 3},
        {"tokens": 90},
        {"tokens": 1},
        {"tokens": 150, "accumulate": 2},
        {"pack": False, "tokens": 90},
    ],
    ids=str,
)
def test_runs_come_to_the_same(changes, one_order):
    want, got = no_dropout(), no_dropout()
    padded = train(want, TOKENIZER, SAMPLES, options(pack=False), progress=False)
    other = train(got, TOKENIZER, SAMPLES, options(**changes), progress=False)
    assert other.data["packed"] is changes.get("pack", True)
    assert other.losses == pytest.approx(padded.losses, rel=1e-5)
    for name in ("tokens", "counted", "grad_norm"):
        rows = [[row[name] for row in result.curves["train"]] for result in (other, padded)]
        assert rows[0] == pytest.approx(rows[1], rel=1e-4)
    held = [[row["loss"] for row in result.curves["eval"]] for result in (other, padded)]
    assert held[0] == pytest.approx(held[1], rel=1e-5)
    assert_close_by_norm(flat(got), flat(want), 1e-5)


@pytest.mark.parametrize(("pack", "tokens"), [(None, 90), (False, 90)])
def test_passes_stay_in_the_budget(pack, tokens):
    model, seen = no_dropout(), []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((kwargs["input_ids"].shape, kwargs.get("attention_mask"))), with_kwargs=True
    )
    train(model, TOKENIZER, SAMPLES, options(pack, tokens, steps=4), progress=False)
    longest = max(len(s.input_ids) for s in SAMPLES)
    assert all(shape.numel() <= max(tokens, longest) for shape, _ in seen)
    whole = [shape for shape, mask in seen if mask is None]
    assert bool(whole) == (pack is None)
    assert all(shape[0] == 1 for shape in whole)


@pytest.mark.skipif(
    not precision.cpu_multiplies_bfloat16(), reason="the system blocks this CPU's bfloat16 instructions"
)
def test_bfloat16_packs_as_well():
    want, got = no_dropout(), no_dropout()
    a = train(want, TOKENIZER, SAMPLES, options(False, dtype="bfloat16"), progress=False)
    b = train(got, TOKENIZER, SAMPLES, options(dtype="bfloat16"), progress=False)
    assert b.data["packed"]
    assert b.losses == pytest.approx(a.losses, rel=2e-2)


def test_a_model_that_cannot_is_padded_or_refused(monkeypatch, capsys):
    def model():
        return dl.adapt(deaf(monkeypatch), dl.LoRA(r=2), seed=1)

    result = train(model(), TOKENIZER, SAMPLES, options(steps=2))
    assert not result.data["packed"]
    assert "off by" in result.data["packing"]
    assert "batches: padded, near lengths together: the logits of sample 2 of 3 are off by" in capsys.readouterr().err
    with pytest.raises(UserError) as error:
        train(model(), TOKENIZER, SAMPLES, options(True), progress=False)
    said = str(error.value)
    assert said.startswith("LlamaForCausalLM cannot be trained on packed samples.\n  found: the logits of sample 2")
    assert "nearest: llama" in said
    assert "next: leave run.pack out, or set run.pack=false" in said


def test_the_record_says_how(place, tmp_path, capsys):  # noqa: F811
    for asked, packed in ((None, True), (False, False)):
        home = tmp_path / str(asked)
        record = read_record(run_spec(plan(place, output=str(home), run={"pack": asked, "tokens": 64})))
        assert record["data"]["packed"] is packed
        assert record["data"]["packing"] == ("each sample's logits are those alone" if packed else "run.pack=false")
        assert record["spec"]["run"] | {"pack": asked, "tokens": 64} == record["spec"]["run"]
        assert f"batches: {'packed: each' if packed else 'padded, near'}" in capsys.readouterr().err


@pytest.mark.parametrize("fields", [{"pack": False}, {"tokens": 70}, {"pack": False, "tokens": 70}], ids=str)
def test_interrupted_and_continued_is_bitwise_the_same(tmp_path, fields):
    how = {"run": RunSpec(checkpoint_every=3, **fields)}
    run(tmp_path / "a", **how)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", probes=[At(5, interrupt)], **how)
    run(tmp_path / "b", **how)
    for file in ("adapter/adapter_model.safetensors", "curves/train.jsonl", "curves/eval.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_run_goes_on_only_as_it_began(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, probes=[At(4, interrupt)])
    with pytest.raises(UserError, match="run.tokens: None there, 80 here"):
        run(tmp_path, run=RunSpec(checkpoint_every=3, tokens=80))
    monkeypatch.setattr("deltalab.train.trial.why_not_packed", lambda *_: "another attention")
    with pytest.raises(UserError, match="the packing"):
        run(tmp_path)
    assert Checkpoints(tmp_path, 2).last().step == 4


def test_a_sample_without_a_label_of_its_own(one_order):
    """Single tokens, and samples whose only label is their first: nothing to learn, and nothing taken from others."""
    some = [*SAMPLES[:5], Encoded([7], [7]), Encoded([9, 8], [9, IGNORED])]
    want, got = no_dropout(), no_dropout()
    a = train(want, TOKENIZER, some, options(False, steps=2), progress=False)
    b = train(got, TOKENIZER, some, options(steps=2), progress=False)
    assert b.losses == pytest.approx(a.losses, rel=1e-5)
    assert_close_by_norm(flat(got), flat(want), 1e-5)


def test_the_collator_in_transformers_trainer(tmp_path):
    """The same steps as with a padded batch, dropout aside; evaluated too."""
    data = [{"input_ids": s.input_ids, "labels": s.labels, "attention_mask": [1] * len(s.input_ids)} for s in SAMPLES]

    def trainer(name, collator):
        model = no_dropout()
        args = transformers.TrainingArguments(
            str(tmp_path / name), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True,
            learning_rate=5e-3, logging_steps=1, save_steps=4, report_to="none", disable_tqdm=True, seed=3,
        )  # fmt: skip
        run = transformers.Trainer(model, args, collator, data, eval_dataset=data[:5], callbacks=[dl.TrainerCallback()])
        run.train()
        log = json.loads((tmp_path / name / "checkpoint-4/trainer_state.json").read_text())["log_history"]
        return flat(model), [row["loss"] for row in log if "loss" in row], run.evaluate()["eval_loss"]

    padded = trainer("padded", transformers.DataCollatorForSeq2Seq(TOKENIZER))
    packed = trainer("packed", PackedCollator())
    assert_close_by_norm(packed[0], padded[0], 1e-5)
    assert packed[1] == pytest.approx(padded[1], rel=1e-5)
    assert packed[2] == pytest.approx(padded[2], rel=1e-5)


def test_null_limits_rows_only_where_attention_masks_them(monkeypatch):
    model = tiny_llama()
    assert choose_packing(RunSpec(), model, SAMPLES).row == 512
    assert choose_packing(RunSpec(tokens=50), model, SAMPLES).row == 50
    monkeypatch.setattr("deltalab.train.trial.why_not_packed", lambda *_: "")
    model.config._attn_implementation = "flash_attention_2"
    by_segments = choose_packing(RunSpec(), model, SAMPLES)
    assert by_segments.row is None
    assert len(by_segments.cut([250] * 6, 1)[0]) == 1
    assert len(by_segments.cut([250] * 6, 1, training=False)[0]) == 3
