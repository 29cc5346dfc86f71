"""What a run has become: the part of its state that is no tensor, and the result."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrainResult:
    """What a run did. losses: by step. curves: rows by name. best: step and held-out loss, if there is held-out data.
    data: digests and counts."""

    steps: int
    losses: list[float]
    curves: dict[str, list[dict[str, Any]]]
    best: dict[str, float] | None
    seconds: float
    tokens: int
    stopped_early: bool
    data: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        first, last = self.mean_loss()
        ran = f"{self.steps} steps{' (stopped early)' if self.stopped_early else ''}, {self.tokens:,} tokens in {self.seconds:.0f} s"
        held = "".join(
            f"; held-out {row['loss']:.3f} at step {row['step']}" for row in self.curves.get("eval", [])[-1:]
        )
        return f"{ran}; loss {first:.3f} → {last:.3f}{held}"

    def mean_loss(self) -> tuple[float, float]:
        """The loss over all counted tokens of the first and of the last ten steps, fewer in a short run."""
        rows = self.curves.get("train", [])
        window = max(1, min(10, len(rows) // 2))
        parts = (rows[:window], rows[-window:])
        first, last = (
            sum(r["loss"] * r["counted"] for r in part) / max(sum(r["counted"] for r in part), 1) for part in parts
        )
        return first, last


@dataclass
class State:
    """What changes from step to step, beside tensors. memory: most bytes so far above those in use before training; it and the
    seconds are of all processes that the run has had."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    memory: int = 0
    best: dict[str, float] | None = None
    since_best: int = 0
    stopped: bool = False
