"""What a run's record tells in numbers."""

from collections.abc import Mapping
from typing import Any

FALLING = ("loss", "perplexity", "held_out", "bits_per_byte", "brier_score", ".ter", ".wer")
"""Ends of the names of measures of which less is better."""

OF_DATA = (".unchanged_bleu4",)
"""Ends of the names of scores that no model has a part in; they stand in tables and are not compared."""


def rises(measure: str) -> bool:
    """Whether more of a measure is better."""
    return not measure.endswith(FALLING)


def row_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of `deltalab.lab.load`."""
    result, sizes, cost = record["result"], record["sizes"], record.get("cost", {})
    return {
        "seed": record["seed"],
        **_scores("score", record["scores"]["after"]), **_scores("before", record["scores"]["before"]),
        "loss": result["loss"][1], "held_out": result["held_out"][-1] if result["held_out"] else None,
        "trained": sizes["trained"], "base": sizes["base"], "adapter_bytes": sizes["adapter_bytes"],
        "seconds": record["seconds"], "training_seconds": result["training_seconds"],
        "tokens": result["tokens"], "steps": result["steps"],
        "trained_percent": 100 * sizes["trained"] / sizes["base"], "trained_factor": sizes["base"] / sizes["trained"],
        **_flat(cost), "memory_above": cost["memory_peak"] - cost["memory_before"] if "memory_peak" in cost else None,
        **_forgetting(record.get("forgetting", {})), **record.get("proofs", {}),
    }  # fmt: skip


def _scores(before: str, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        f"{before}.{task}.{name}": value
        for task, found in scores.items() for name, value in found.items() if name not in ("low", "high", "n")
    }  # fmt: skip


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of parts by `whole.part`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            {f"{key}.{part}": one for part, one in _flat(value).items()} if isinstance(value, Mapping) else {key: value}
        )
    return flat


def _forgetting(losses: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    risen = {f"forgetting.{tag}": pair["after"] - pair["before"] for tag, pair in losses.items()}
    return risen | ({"forgetting": sum(risen.values()) / len(risen)} if risen else {})
