"""Sweeps as `deltalab sweep` leaves them, with made-up records: their report is tested without a training."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deltalab.core.spec import build
from deltalab.lab.spec import SweepSpec, Trial
from deltalab.lab.trials import Sweep, create, fail, find
from deltalab.report.contents import Contents
from deltalab.report.verdicts import Told

BASE = {"model": "organism", "adapt": [{"method": "lora", "targets": "q,v"}], "data": [{"task": "skills"}], "optim": {"steps": 20}}  # fmt: skip
PATHS = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]


def record(trial: Trial, right: int, of: int = 10, **fields: Any) -> dict[str, Any]:
    """A training's record: `right` of so many answers, costs by the trial's rank, and fields put in their place."""
    r, seed = int(getattr(trial.spec.adapt[0], "r", 1)), trial.spec.seed
    made: dict[str, Any] = {
        "format": 1, "kind": "train", "written": "2026-01-02T03:04:05+00:00", "digest": trial.spec.digest(), "spec": trial.spec.plain(),
        "versions": {"python": "3.11", "torch": "2.6"}, "git": None, "machine": {"system": "Linux", "arch": "x86_64", "cpus": 2},
        "seed": seed, "seconds": 10.0 * r + seed, "base": "b0", "device": "cpu", "threads": 1,
        "result": {"steps": 20, "tokens": 2000, "stopped_early": False, "best": None, "loss": [3.0, 1.0 + 0.1 * seed],
                   "held_out": [3.0, 2.0 - 0.1 * r + 0.01 * seed * r], "training_seconds": 8.0 * r},
        "scores": {"before": {"own": {"accuracy": 0.1, "low": 0.0, "high": 0.3, "n": of}},
                   "after": {"own": {"accuracy": right / of, "low": 0.0, "high": 1.0, "n": of}}},
        "data": {}, "sizes": {"trained": 1000 * r, "base": 1_000_000, "adapter_bytes": 4000 * r + 500},
        "cost": {"tokens_per_second": 250.0 / r, "memory_before": 14_000_000, "memory_peak": 20_000_000 + 1_000_000 * r},
        "proofs": {"base_untouched": True},
    }  # fmt: skip
    for key, values in fields.items():
        made[key] = {**made.get(key, {}), **values} if isinstance(values, Mapping) else values
    return made


def curves(trial: Trial, steps: int = 20) -> dict[str, list[dict[str, Any]]]:
    """Losses that fall faster with rank, and changes that grow with it; a seed is a shift."""
    r, seed = int(getattr(trial.spec.adapt[0], "r", 1)), trial.spec.seed
    at = range(0, steps + 1, 10)
    return {
        "train": [{"step": s, "loss": 3.0 - 0.01 * r * s + 0.1 * seed, "counted": 5} for s in range(1, steps + 1)],
        "eval": [{"step": s, "loss": 3.0 - 0.02 * s + 0.1 * seed} for s in at],
        "deltas": [{"step": s, "weights": {path: {"norm": 0.1 * s, "relative": 0.001 * s * (i + 1), "singular": [0.01 * s * 0.5**k for k in range(r)],
                                                  "effective_rank": 0.5 * r if s else 0.0} for i, path in enumerate(PATHS)}, "told": {}} for s in at],
        "representations": [{"step": s, "cka": [1.0, 1.0 - 0.001 * s, 1.0 - 0.002 * s], "cosine": [1.0, 0.99, 0.98]} for s in at],
    }  # fmt: skip


def finish(sweep: Sweep, trial: Trial, right: int, of: int = 10, probed: bool = True, **fields: Any) -> None:
    """Leave what a finished trial leaves: its record, the values of single examples, its curves."""
    place = sweep.place(trial)
    (place / "curves").mkdir(parents=True)
    (place / "record.json").write_text(json.dumps(record(trial, right, of, **fields)))
    items = {"own": {"accuracy": [1.0] * right + [0.0] * (of - right)}}
    (place / "examples.json").write_text(json.dumps({"before": items, "after": items}))
    for name, rows in curves(trial).items():
        if probed or name in ("train", "eval"):
            (place / "curves" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sweep_of(folder: Path, right: Callable[[Trial], int | str | None], of: int = 10, probed: bool = True, fields: Callable[[Trial], dict[str, Any]] = lambda _: {}, **plan: Any) -> Sweep:  # fmt: skip
    """A sweep of `plan`; `right` says of each trial how many of its answers are right, None for one that waits, or why it failed.

    What is tuned is chosen by those that `right` gives the trials that it is tuned by.
    """
    sweep = create(build(SweepSpec, {"base": BASE, "product": {"adapt.r": [2, 8]}, "seeds": [1, 2, 3], **plan}), folder)
    for trial in sweep.tuning:
        finish(sweep, trial, int(right(trial) or 0), of, probed=False)
    sweep = find(folder) if sweep.tuning else sweep
    for trial in sweep.trials:
        count = right(trial)
        if isinstance(count, str):
            fail(sweep, trial, count, "Traceback …")
        elif count is not None:
            finish(sweep, trial, count, of, probed, **fields(trial))
    return sweep


def table(contents: Contents, name: str) -> dict[str, dict[str, str]]:
    """Row -> head -> cell."""
    found = next(t for section in contents.sections for t in section.tables if t.name == name)
    return {row[0]: dict(zip(found.head[1:], row[1:], strict=True)) for row in found.rows}


def told(contents: Contents, name: str) -> Told:
    """The verdict of this name."""
    return next(one for one in contents.verdicts if one.name == name)
