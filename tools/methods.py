"""What each method is worth on the bundled model: the table of docs/results/methods.md.

    .venv/bin/python tools/methods.py run runs/methods         # every tuning, one JSON line each; goes on where it stopped
    .venv/bin/python tools/methods.py table runs/methods

The skill is the family that the model was never trained on: the past tense of regular verbs. Its training verbs are cut
by hash: three in four are taught, one in four is for validation. Each method's learning rate is the one with the best
mean of two shares of right answers, on the validation verbs and on the taught ones in a phrasing that was not, from a
first guess in half decades up and down until both neighbours of the best are no better. Then three seeds train on all
training verbs at that rate. Asked are those, in the phrasing that was not taught, and the test split's verbs.
"""

import json
import math
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tunings import Lines, best_rate

import deltalab as dl
from deltalab.core.stats import crossed, share_interval
from deltalab.data.chat import Conversation
from deltalab.data.collate import collate
from deltalab.organism import skills
from deltalab.train.spec import LoopSpec, OptimSpec

STEPS, BATCH, SEEDS = 150, 16, (1, 2, 3)
PHRASINGS = skills.FAMILIES[skills.WITHHELD].train_phrasings
TAUGHT, NEW = PHRASINGS[:3], PHRASINGS[3]
EVERY = {"targets": "all-linear"}
REFERENCE = "LoRA r 8"


@dataclass(frozen=True)
class Row:
    """A line of the table. specs: made when torch is there. base: how the model is loaded."""

    specs: Callable[[], Any]
    rate: float
    base: dict[str, Any] = field(default_factory=dict)
    calibrated: bool = False


ROWS = {
    "full": Row(lambda: dl.Train("full"), 3e-4),
    "norms": Row(lambda: dl.Train("norms"), 3e-2),
    "last-1": Row(lambda: dl.Train("last-1"), 1e-3),
    "LoRA r 8": Row(lambda: dl.LoRA(r=8, **EVERY), 3e-3),
    "LoRA r 1": Row(lambda: dl.LoRA(r=1, alpha=2, **EVERY), 3e-3),
    "rsLoRA r 8": Row(lambda: dl.LoRA(r=8, rank_stabilised=True, **EVERY), 3e-3),
    "LoRA+ r 8": Row(lambda: dl.LoRA(r=8, lr_ratio=16, **EVERY), 1e-3),
    "PiSSA r 8": Row(lambda: dl.LoRA(r=8, init="pissa", **EVERY), 1e-3),
    "OLoRA r 8": Row(lambda: dl.LoRA(r=8, init="olora", **EVERY), 1e-3),
    "EVA r 8": Row(lambda: dl.LoRA(r=8, init="eva", **EVERY), 3e-3, calibrated=True),
    "DoRA r 8": Row(lambda: dl.DoRA(r=8, **EVERY), 3e-3),
    "AdaLoRA 12 → 8": Row(lambda: dl.AdaLoRA(init_r=12, target_r=8, alpha=16, **EVERY), 1e-2),
    "IA³": Row(lambda: dl.IA3(), 3e-2),
    "IA³ all-linear": Row(lambda: dl.IA3(**EVERY), 3e-2),
    "VeRA r 64": Row(lambda: dl.VeRA(r=64, **EVERY), 1e-2),
    "bottleneck / 16": Row(lambda: dl.Bottleneck(), 3e-3),
    "bottleneck / 16, parallel": Row(lambda: dl.Bottleneck(placement="parallel"), 3e-3),
    "zero-init prefix K 10": Row(lambda: dl.ZeroInitPrefix(), 1e-2),
    "LoRA experts 2 of 4, r 4": Row(lambda: dl.LoRAExperts(r=4, alpha=8, **EVERY), 3e-3),
    "LoRA r 8, NF4 base": Row(lambda: dl.LoRA(r=8, **EVERY), 3e-3, {"quantize": "nf4"}),
    "DoRA r 8, NF4 base": Row(lambda: dl.DoRA(r=8, **EVERY), 3e-3, {"quantize": "nf4"}),
    "LoftQ r 8, NF4 base": Row(lambda: dl.LoRA(r=8, init="loftq", **EVERY), 3e-3, {"quantize": "nf4"}),
    "LoRA r 8, int4 base": Row(lambda: dl.LoRA(r=8, **EVERY), 3e-3, {"quantize": "int4-group"}),
    "LoftQ r 8, int4 base": Row(lambda: dl.LoRA(r=8, init="loftq", **EVERY), 1e-3, {"quantize": "int4-group"}),
    "QA-LoRA r 8, int4 base": Row(lambda: dl.QALoRA(r=8, **EVERY), 3e-3, {"quantize": "int4-group"}),
}


def verbs(split: str) -> list[str]:
    """`fit` and `validation` are the training verbs cut in two, `train` all of them."""
    if split in ("train", "test"):
        return skills.past_tense_verbs(split)
    held = [v for v in skills.past_tense_verbs("train") if zlib.crc32(f"validation {v}".encode()) % 4 == 0]
    return held if split == "validation" else [v for v in skills.past_tense_verbs("train") if v not in held]


def questions(split: str, phrasings: tuple[str, ...] = PHRASINGS) -> list[tuple[str, str]]:
    """(question, answer)."""
    return [(phrasing.format(x=verb), skills.past_tense(verb)) for verb in verbs(split) for phrasing in phrasings]


def right(model: nn.Module, tokenizer: Any, asked: list[tuple[str, str]]) -> list[bool]:
    """Whether each question is answered word for word, greedily."""
    from deltalab.models.generate import generate

    replies = generate(model, tokenizer, [question for question, _ in asked], max_new_tokens=12)
    return [reply.text.strip() == answer for reply, (_, answer) in zip(replies, asked, strict=True)]


def adapted(row: Row, seed: int, split: str) -> tuple[Any, Any, list[Conversation]]:
    """The bundled model under the row's method, its tokenizer, and what is taught."""
    data = [Conversation.of(question, answer) for question, answer in questions(split, TAUGHT)]
    options: dict[str, Any] = {}
    if row.calibrated:
        from deltalab.data.chat import encode_all

        _, tokenizer = dl.load("organism")
        samples = list(encode_all(tokenizer, data[:64], 256, "skip"))
        batches = [collate(samples[i : i + 16], tokenizer.pad_token_id) for i in range(0, len(samples), 16)]
        options["calibration"] = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in batches]
    if row.base:  # the start runs before the base is quantised
        model, tokenizer = dl.load("organism", adapt=row.specs(), seed=seed, **row.base)
    else:
        model, tokenizer = dl.load("organism")
        dl.adapt(model, row.specs(), seed=seed, **options)
    return model, tokenizer, data


def tuning(row: Row, rate: float, seed: int, final: bool) -> dict[str, Any]:
    """One tuning and what came of it. final: on all training verbs, asked are the test split's; else validation."""
    model, tokenizer, data = adapted(row, seed, "train" if final else "fit")
    spec = LoopSpec(optim=OptimSpec(lr=rate, steps=STEPS, batch=BATCH), eval={"fraction": 0.0}, seed=seed)
    try:
        result = dl.train(model, tokenizer, data, spec=spec, progress=False)
    except dl.UserError as error:  # the rate was too high: the run broke down
        return {"broke": str(error.asked), "new verbs": [False], "taught verbs": [False]}
    found: dict[str, Any] = {"loss": result.mean_loss()[1], "seconds": round(result.seconds, 1)}
    new, taught = ("test", "train") if final else ("validation", "fit")
    found |= {
        "new verbs": right(model, tokenizer, questions(new)),
        "taught verbs": right(model, tokenizer, questions(taught, (NEW,))),
        "trained": dl.trainable(model).count,
        "bytes": size(model),
    }
    return found


def size(model: nn.Module) -> int:
    """Bytes of the adapter's tensors on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return (dl.save_adapter(model, Path(folder) / "adapter") / "adapter_model.safetensors").stat().st_size


class Results(Lines):
    """The tunings done so far, in `tunings.jsonl`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "tunings.jsonl")

    def get(self, name: str, rate: float, seed: int, final: bool) -> dict[str, Any]:
        key = (name, rate, seed, final)
        if key not in self.done:
            entry = self.add(key, tuning(ROWS[name], rate, seed, final))
            print(name, f"{rate:g}", "seed", seed, {k: v for k, v in entry.items() if k in ("loss", "seconds", "broke")},
                  {k: round(share(entry[k]), 3) for k in ("new verbs", "taught verbs")}, flush=True)  # fmt: skip
        return self.done[key]

    def best_rate(self, name: str) -> float:
        """The rate with the best mean of the two shares, then the lowest loss; no neighbour is better."""

        def value(rate: float) -> tuple[float, float]:
            entry = self.get(name, rate, 0, False)
            return share(entry["new verbs"]) + share(entry["taught verbs"]), -entry.get("loss", math.inf)

        return best_rate(value, ROWS[name].rate)


def run(folder: Path, names: list[str]) -> None:
    """Every tuning of the rows `names`."""
    torch.set_num_threads(1)
    results = Results(folder)
    for name in names:
        rate = results.best_rate(name)
        for seed in SEEDS:
            results.get(name, rate, seed, True)


def table(folder: Path) -> str:
    """The table in Markdown; rows whose tunings are not all done are left out."""
    results = Results(folder)
    costs_file = folder / "costs.json"
    costs = json.loads(costs_file.read_text()) if costs_file.is_file() else {}
    lines = [
        "| method | new verbs, % | less or more than LoRA r 8 | taught verbs, new phrasing, % | rate | trained | adapter, KiB | step, × LoRA | memory, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    done = {name: [e for key, e in sorted(results.done.items()) if key[0] == name and key[3]] for name in ROWS}
    for name, finals in done.items():
        if len(finals) < len(SEEDS) or any("broke" in entry for entry in finals):
            continue
        cost = costs.get(name, {})
        new, other = ([f["new verbs"] for f in entries] for entries in (finals, done[REFERENCE]))
        lines.append(
            f"| {name} | {percent(new)} | {'' if name == REFERENCE else difference(new, other)} "
            f"| {percent([f['taught verbs'] for f in finals])} | {finals[0]['key'][1]:g} | {finals[0]['trained']:,} | {finals[0]['bytes'] / 1024:,.0f} "
            f"| {cost.get('step', '')} | {cost.get('memory', '')} |"
        )
    return "\n".join(lines)


def untouched() -> str:
    """What the model answers before any tuning."""
    model, tokenizer = dl.load("organism")
    counts = [right(model, tokenizer, asked) for asked in (questions("test"), questions("train", (NEW,)))]
    new, taught = (f"{sum(flags)} of {len(flags)}" for flags in counts)
    return f"Before: {new} on new verbs, {taught} on the taught ones."


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def percent(flags: list[list[bool]]) -> str:
    """A share over seeds with its interval."""
    value, low, high = share_interval(flags)
    return f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def difference(mine: list[list[bool]], theirs: list[list[bool]]) -> str:
    """The paired difference of two shares, in points: same questions, same seeds of order."""
    value, low, high = crossed(np.array(mine, dtype=float) - np.array(theirs, dtype=float)).interval()
    return f"{100 * value:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"


if __name__ == "__main__":
    what, place, *chosen = sys.argv[1:]
    if what == "run":
        run(Path(place), chosen or list(ROWS))
    else:
        print(f"{table(Path(place))}\n\n{untouched()}")
