"""Training on instructions: real tokens a second of `deltalab.train` beside peft in transformers' Trainer, three ways.

    .venv/bin/python -m benchmarks instructions

Alpaca's 5000 rows (beside the project, CC BY-NC 4.0, read and never kept): 512 of them to train on, one epoch in batches
of 8, and 200 held out; what is learnt are the outputs. The tokens are those of a byte-level BPE of 8192 entries, made of the
same text when this runs. A random Llama (hidden 512, 4 layers) is frozen, LoRA r 8 trains on every linear of its blocks.
Everything is the same but the program: model, samples, epochs, batch, AdamW, rate, schedule, clipping; the order of samples is each
program's own. peft: `padded`, batches as they come, padded to their longest; `grouped`, by length; `packed`, by position ids
(DataCollatorWithFlattening). A round trains every side from the start, with a seed of its own; the time is that of the whole call. Padding
is no real token. The held-out loss is computed by one function for all, before and after: `loss above theirs` says by how much
ours is the worse, in the mean of the rounds, and may be what seeds make (95 %, the spread pooled over the sides).
"""

import contextlib
import io
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import peft
import torch
import transformers
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

import deltalab as dl
from benchmarks import sides
from benchmarks.harness import ROOT, Asked, Check, Row, ratio, timed
from benchmarks.sides import Case
from deltalab.core.errors import UserError
from deltalab.data.chat import Encoded
from deltalab.data.collate import collate
from deltalab.data.packing import pack
from deltalab.train import LoopSpec, OptimSpec, RunSpec, train
from deltalab.train.loss import count, mean_nll, nll_sum

DATA = ROOT.parent / "shared" / "data" / "nc" / "alpaca_5000" / "alpaca_5000.json"
ENTRIES, LONGEST, SAMPLES, HELD_OUT, BATCH, RATE, ROUNDS = 8192, 512, 512, 200, 8, 1e-3, 3
PAD, END = "<pad>", "<end>"
PEFT = {"peft, padded": 2.5, "peft, grouped": 1.4, "peft, packed": 1.5}
"""Side -> its time over ours, at least."""
PROMPT = "### Instruction:\n{instruction}\n\n{input}### Response:\n"


def rows_of_alpaca() -> list[dict[str, str]]:
    """Raises: UserError if the data is not there."""
    if not DATA.is_file():
        raise UserError(f"'{DATA}' is not there.", found="the benchmark reads Alpaca's rows beside the project",
                        next="put alpaca_5000.json of tatsu-lab/stanford_alpaca there")  # fmt: skip
    return json.loads(DATA.read_text())


def texts(row: dict[str, str]) -> tuple[str, str]:
    """What is read and what is learnt."""
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return PROMPT.format(instruction=row["instruction"], input=given), row["output"]


@cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of the rows' own text; the same each time."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=ENTRIES, special_tokens=[PAD, END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    made.train_from_iterator(("".join(texts(row)) for row in rows_of_alpaca()), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, eos_token=END)


def samples(number: int, held_out: int) -> tuple[list[Encoded], list[Encoded]]:
    """Drawn without replacement, the same each time; longer ones than 512 tokens are cut."""
    rows, known = rows_of_alpaca(), tokenizer()
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: number + held_out].tolist()
    made = []
    for i in chosen:
        read, learnt = (known(text, add_special_tokens=False)["input_ids"] for text in texts(rows[i]))
        ids = [*read, *learnt, known.eos_token_id]
        labels = [-100] * len(read) + ids[len(read) :]
        made.append(Encoded(ids[:LONGEST], labels[:LONGEST]))
    return made[:number], made[number:]


def base(dtype: torch.dtype) -> transformers.PreTrainedModel:
    return sides.base(Case("S", dtype, vocabulary=ENTRIES, tokens=LONGEST))


def in_deltalab(dtype: torch.dtype, data: Sequence[Encoded], seed: int) -> tuple[nn.Module, Callable[[], object]]:
    """The model, and what trains it."""
    model = dl.adapt(base(dtype), dl.LoRA(r=8, alpha=16, targets="all-linear"), seed=seed)
    spec = LoopSpec(
        optim=OptimSpec(lr=RATE, batch=BATCH, epochs=1), seed=seed,
        run=RunSpec(dtype="bfloat16" if dtype is torch.bfloat16 else "float32", context=LONGEST),
    )  # fmt: skip
    shortest = min(
        data, key=lambda sample: len(sample.input_ids)
    )  # a loss is asked for at both ends: of next to nothing
    return model, lambda: train(model, tokenizer(), data, spec, test=[shortest], progress=False)


def in_trainer(
    side: str, dtype: torch.dtype, data: Sequence[Encoded], seed: int, folder: str
) -> tuple[nn.Module, Callable[[], object]]:
    """The same with peft and transformers' Trainer."""
    transformers.set_seed(seed)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=sides.TARGETS["all-linear"], task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(base(dtype), config)
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=RATE, lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.06 * math.ceil(len(data) / BATCH)), max_grad_norm=1.0, bf16=dtype is torch.bfloat16, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False, seed=seed,
        train_sampling_strategy="group_by_length" if side == "peft, grouped" else "random",
    )  # fmt: skip
    padded = DataCollatorForSeq2Seq(tokenizer(), padding=True, label_pad_token_id=-100)
    rows = [{"input_ids": s.input_ids, "labels": s.labels, "attention_mask": [1] * len(s.input_ids)} for s in data]
    if side == "peft, packed":
        rows = [{"input_ids": s.input_ids, "labels": s.labels} for s in data]
    collator: Any = DataCollatorWithFlattening() if side == "peft, packed" else padded
    trainer = Trainer(model, arguments, collator, train_dataset=rows)  # type: ignore[arg-type]
    return model, trainer.train


def held_out_loss(model: nn.Module, data: Sequence[Encoded]) -> float:
    """The mean over counted tokens, padded, near lengths together; fp32 sums."""
    ordered, pad = sorted(data, key=lambda sample: len(sample.input_ids)), tokenizer().pad_token_id
    model.eval()
    return mean_nll(model, (ordered[i : i + 16] for i in range(0, len(ordered), 16)), lambda some: collate(some, pad))


def same_batch(dtype: torch.dtype, data: Sequence[Encoded]) -> list[Check]:
    """The loss of one batch, in training: ours packed and peft's packed against peft's padded."""
    few, pad = list(data[:BATCH]), tokenizer().pad_token_id
    counted, most = sum(map(count, few)), 1e-3 if dtype is torch.bfloat16 else 1e-5
    mine = dl.adapt(base(dtype), dl.LoRA(r=8, targets="all-linear")).train()
    plain = base(dtype)
    rows = [{"input_ids": s.input_ids, "labels": s.labels} for s in few]
    with torch.no_grad():
        want = float(plain(**collate(few, pad)).loss)
        packed = float(plain(**DataCollatorWithFlattening()(rows)).loss)
    got = float(nll_sum(mine, pack(few)).detach()) / counted
    return [Check("packed batch", abs(got - want) / want, most), Check("peft's packed", abs(packed - want) / want, most)]  # fmt: skip


def rows(asked: Asked) -> Iterator[Row]:
    data, held_out = samples(24, 8) if asked.quick else samples(SAMPLES, HELD_OUT)
    tokens = sum(len(sample.input_ids) for sample in data)
    lengths = sorted(len(sample.input_ids) for sample in data)
    about = f"{len(data)} samples of {lengths[len(data) // 2]} tokens in the middle, {lengths[-1]} at most"
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))[: 1 if asked.quick else 2]:
        setting = f"hidden 512, {name}, all-linear, batches of {BATCH}, vocabulary {ENTRIES}, {about}"
        if not asked.wants("instructions", setting):
            continue
        checks, before = same_batch(dtype, data), held_out_loss(base(dtype), held_out)
        seconds, losses = measured(dtype, data, held_out, asked.turns(ROUNDS, 2))
        rates = {side: tokens / statistics.median(taken) for side, taken in seconds.items()}
        noise = of_seeds(list(losses.values()))
        for side, target in PEFT.items():
            mine, other = losses["ours"], losses[side]
            above = max(0.0, statistics.mean(mine) - statistics.mean(other))
            note = f"held-out loss {before:.3f} → ours {statistics.mean(mine):.3f}, {side} {statistics.mean(other):.3f}"
            yield Row("instructions, real tokens a second", setting, f"ours / {side}", ratio(seconds[side], seconds["ours"]), rates,
                      "tokens/s", target=target, checks=[*checks, Check("loss above theirs", above, noise)], note=note)  # fmt: skip


def of_seeds(losses: Sequence[Sequence[float]]) -> float:
    """What seeds alone put between two sides' means in 19 of 20 cases: t, with the variance pooled over all sides."""
    rounds = len(losses[0])
    pooled = statistics.mean(statistics.variance(side) for side in losses)
    return float(stats.t.ppf(0.975, len(losses) * (rounds - 1))) * math.sqrt(2 * pooled / rounds)


def measured(
    dtype: torch.dtype, data: Sequence[Encoded], held_out: Sequence[Encoded], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each side's whole training, and held-out losses after it, by round."""
    losses: dict[str, list[float]] = {side: [] for side in ("ours", *PEFT)}
    ready: dict[str, tuple[nn.Module, Callable[[], object]]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def prepare(side: str) -> None:
            for done in list(ready):
                losses[done].append(held_out_loss(ready.pop(done)[0], held_out))
            seed = len(losses[side])
            if side == "ours":
                ready[side] = in_deltalab(dtype, data, seed)
            else:
                ready[side] = in_trainer(side, dtype, data, seed, folder)

        def run(side: str) -> None:
            with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its metrics
                ready[side][1]()

        seconds = timed({side: lambda side=side: run(side) for side in losses}, rounds, 0, prepare)  # type: ignore[misc]
        for done in list(ready):
            losses[done].append(held_out_loss(ready.pop(done)[0], held_out))
    return seconds, losses
