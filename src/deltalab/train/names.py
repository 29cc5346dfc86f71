"""What a run tells its trackers, by name: one number a name and step, made from the rows of the curves and from the record.

    train/loss  train/lr  train/grad_norm  eval/loss                the curves
    <method>_adapters/<path>/…  <method>_rank/<path>/…              the deltas (`probe`); without a path the mean over all
    efficiency/…  verification/…  training_efficiency/…             what trains, what is proved, what it costs
    score/<task>/<measure>                                          at step 0 and at the last

docs/training.md has the table of them.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from deltalab.train.checkpoint import flat

Values = dict[str, float]
NO_MEASURE = ("low", "high", "n")
"""What a task's summary has beside its measures."""


def numbers(prefix: str, value: Any) -> Values:
    """The numbers in nested mappings and lists, by the way to them: `prefix/key/0`. A truth is 1 or 0; texts are left out."""
    if isinstance(value, Mapping):
        return {name: one for key, item in value.items() for name, one in numbers(f"{prefix}/{key}", item).items()}
    if isinstance(value, list | tuple):
        return {name: one for i, item in enumerate(value) for name, one in numbers(f"{prefix}/{i}", item).items()}
    if isinstance(value, bool):
        return {prefix: int(value)}
    return {prefix: value} if isinstance(value, int | float) and math.isfinite(value) else {}


def of_row(curve: str, row: Mapping[str, Any]) -> Values:
    """A row of `curves/<curve>.jsonl`."""
    values = {key: value for key, value in row.items() if key != "step"}
    if curve == "deltas":
        return _of_deltas(values)
    if curve == "speed":
        return numbers("training_efficiency", {"step_seconds": values["seconds"], "tokens_per_second": values["tokens_per_second"]})  # fmt: skip
    return numbers(curve, values)


def of_sizes(trained: int, base: int) -> Values:
    """How much trains, of the base's parameters."""
    return numbers("efficiency", {"trained": trained, "base": base, "percent": 100 * trained / base, "factor": base / max(trained, 1)})  # fmt: skip


def of_scores(scores: Mapping[str, Mapping[str, Any] | None]) -> Values:
    """The tasks' measures."""
    return {
        f"score/{task}/{name}": value for task, found in scores.items() for name, value in (found or {}).items()
        if name not in NO_MEASURE and isinstance(value, int | float) and math.isfinite(value)
    }  # fmt: skip


def of_record(record: Mapping[str, Any]) -> Values:
    """What only the end of a run knows: scores, proofs, the error of merging, costs."""
    sizes, cost, risen = record["sizes"], dict(record["cost"]), record.get("forgetting", {})
    proofs = {**record["proofs"], "merge": cost.pop("merge", {})}
    whole = {  # of the whole run, beside the step's own
        "median_step_seconds": cost.pop("step_seconds", None),
        "mean_tokens_per_second": cost.pop("tokens_per_second", None),
        "seconds": record["result"]["training_seconds"],
    }
    return {
        **of_sizes(sizes["trained"], sizes["base"]), "efficiency/adapter_bytes": sizes["adapter_bytes"],
        **numbers("verification", proofs), **numbers("training_efficiency", {**cost, **whole}),
        **numbers("forgetting", {task: pair["after"] - pair["before"] for task, pair in risen.items()}),
        **of_scores(record["scores"]["after"]),
    }  # fmt: skip


def config(spec: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A plain spec by the keys of overrides, without its trackers; lists and null as JSON, for trackers know neither."""
    values = flat({key: value for key, value in spec.items() if key != "track"})
    return {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in values.items()}


def _of_deltas(row: Mapping[str, Any]) -> Values:
    """Of each weight, and their means: norm, mean and deviation of ΔW, A and B; rank and singular values; what a delta tells."""
    found: Values = {}
    methods = row["methods"]
    sums: dict[str, list[float]] = {}
    for path, w in row["weights"].items():
        adapters, rank = f"{methods[path]}_adapters", f"{methods[path]}_rank"
        S, r = w["singular"], w["rank"]
        weight = {key: value for key, value in w.items() if key not in ("singular", "effective_rank", "rank")}
        spectrum = {"effective": w["effective_rank"], "share": w["effective_rank"] / r if r else None,
                    "largest": S[0], "mean": sum(S) / len(S), "smallest": S[-1]}  # fmt: skip
        found |= numbers(f"{adapters}/{path}", weight) | numbers(f"{rank}/{path}", spectrum)
        for name, value in {**numbers(adapters, weight), **numbers(rank, spectrum)}.items():
            sums.setdefault(name, []).append(value)
    for path, told in row["told"].items():
        found |= numbers(f"{methods[path]}_adapters/{path}", told)
    return found | {name: sum(values) / len(values) for name, values in sums.items()}
