"""A budget of ranks that falls while training, as AdaLoRA's does: when, how far, and which triplets have to go.

Works on deltas with parameters A (r, in), E (r, 1), B (out, r), the change being B diag(E) A. `register` gives them the
buffers that a run needs to go on where it stopped.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float

PARTS = ("A", "E", "B")


class Schedule(NamedTuple):
    """Pruning begins after step `first` and ends with step `last` of `total`."""

    first: int
    last: int
    total: int

    @classmethod
    def of(cls, tinit: int | float, tfinal: int | float, total: int) -> "Schedule | None":
        """From the steps before and after, each a number or a fraction of all; None if no step is between them."""
        first, last = steps(tinit, total), total - steps(tfinal, total)
        return cls(first, last, total) if first < last else None

    def left(self, t: int) -> float:
        """How much of what goes is still there after step t: from 1 down to 0, by the cube of the time that is left."""
        return (1 - (t - self.first) / (self.last - self.first)) ** 3 if t < self.last else 0.0


def schedule(tinit: int | float, tfinal: int | float, own: int | None, told: int | None, known: int) -> Schedule:
    """The schedule of a run. own: total steps by the spec; told: by the loop; known: by an earlier call, or zero.

    Raises: UserError if nobody says it, or it does not fit.
    """
    if own and told and own > told:
        raise UserError(
            f"the schedule is {own} steps long, and this training has {told}: it would not end.",
            next=f"total_step={told}, or leave total_step out",
        )
    total = own or told or known
    if not total:
        raise UserError(
            "the schedule needs the number of optimizer steps, and nobody has said it.",
            next="deltalab.step(model, total=1000), or total_step=1000 in the spec",
        )
    found = Schedule.of(tinit, tfinal, total)
    if found is None:
        raise UserError(
            f"there is no step to prune in: tinit {tinit}, tfinal {tfinal}, {total} steps.",
            next="lower tinit and tfinal, for example tinit=0.1, tfinal=0.3, or train longer",
        )
    return found


def steps(given: int | float, total: int) -> int:
    """A number of steps, or a fraction of all of them."""
    return given if isinstance(given, int) else round(given * total)


def register(delta: nn.Module) -> None:
    """Buffers: mask (r,), the triplets that the last pruning left; clock (step, `last`, `total`); start, the E that it
    began with; and for each part the moving averages of its sensitivity and of how that varies.
    """
    E: Tensor = delta.get_parameter("E")
    delta.register_buffer("mask", torch.ones(len(E), dtype=torch.bool, device=E.device))
    delta.register_buffer("clock", torch.zeros(3, dtype=torch.int64, device=E.device))
    delta.register_buffer("start", torch.zeros_like(E))
    for part in PARTS:
        for average in ("sensitivity", "variation"):
            delta.register_buffer(f"{average}_{part}", torch.zeros_like(delta.get_parameter(part)))


def after_step(
    deltas: Mapping[str, nn.Module], schedule: Schedule, t: int | None, every: int, betas: tuple[float, float], r: int
) -> None:
    """Observe the sensitivities after step t, prune where the schedule says so, and keep the state of the run.

    t None: the step after the last one. every: steps from one pruning to the next. r: mean rank in the end.
    Raises: UserError if the gradients are gone.
    """
    before, last_before, _ = next(iter(deltas.values())).get_buffer("clock").tolist()
    t = before + 1 if t is None else t
    over = t >= schedule.last
    if over:
        now = not last_before or before < last_before
    else:
        if all(delta.get_parameter("E").grad is None for delta in deltas.values()):
            raise UserError("a budget of ranks looks at the gradients after a step, and there are none.",
                            next="call deltalab.step(model) after optimizer.step() and before optimizer.zero_grad()")  # fmt: skip
        for delta in deltas.values():
            observe(delta, betas)
        now = schedule.first < t and t % every == 0
    if now:
        prune(deltas, r * len(deltas), schedule.left(t))
    for delta in deltas.values():
        if now or over:
            apply(delta)
        if over:
            forget(delta)
        delta.get_buffer("clock").copy_(torch.tensor([t, schedule.last, schedule.total]))


def require_ended(deltas: Mapping[str, nn.Module], r: int) -> None:
    """Raises: UserError if the deltas trained and the schedule did not end: that would be another method."""
    first = next(iter(deltas.values()))
    t, last, _ = first.get_buffer("clock").tolist()
    entries = {path: delta.get_parameter("E") for path, delta in deltas.items()}
    trained = any(not torch.equal(E, deltas[path].get_buffer("start")) for path, E in entries.items())
    over = sum(map(len, entries.values())) > r * len(deltas)
    grown = any(E[~deltas[path].get_buffer("mask")].any() for path, E in entries.items())
    if trained and over and (grown or not ended(first)):
        short = f"it stopped at step {t} of {last}" if last else "it never began"
        raise UserError(
            "AdaLoRA was trained, and its schedule did not run to the end: the ranks are not what they should be.",
            found="training went on without it" if ended(first) else short,
            next="after each optimizer.step() call deltalab.step(model, t, total), or train with deltalab.train, or with transformers.Trainer and a deltalab.TrainerCallback()",
        )


def ended(delta: nn.Module) -> bool:
    """Whether the last pruning is done."""
    t, last, _ = delta.get_buffer("clock").tolist()
    return bool(last) and t >= last


def observe(delta: nn.Module, betas: tuple[float, float]) -> None:
    """One more step in the moving averages of |p · ∂L/∂p| and of its distance from its average (eqs. 9 and 10)."""
    for part in PARTS:
        p = delta.get_parameter(part)
        sensitivity, variation = delta.get_buffer(f"sensitivity_{part}"), delta.get_buffer(f"variation_{part}")
        with torch.no_grad():
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            sensitivity.copy_(betas[0] * sensitivity + (1 - betas[0]) * now)
            variation.copy_(betas[1] * variation + (1 - betas[1]) * (now - sensitivity).abs())


def forget(delta: nn.Module) -> None:
    """No pruning follows: the averages are not needed any more."""
    for part in PARTS:
        delta.get_buffer(f"sensitivity_{part}").zero_()
        delta.get_buffer(f"variation_{part}").zero_()


def importance(delta: nn.Module) -> Float[Tensor, " r"]:
    """Of each triplet: that of its entry of E, and the means over its row of A and its column of B (eq. 8)."""
    of = {p: delta.get_buffer(f"sensitivity_{p}") * delta.get_buffer(f"variation_{p}") for p in PARTS}
    return of["E"][:, 0] + (of["A"].mean(1) + of["B"].mean(0))


def prune(deltas: Mapping[str, nn.Module], target: int, left: float) -> None:
    """Keep the most important triplets of all deltas together.

    target: how many stay in the end. left: how much of the others stays now. A tie at the threshold falls with it.
    """
    scores = {path: importance(delta) for path, delta in deltas.items()}
    everyone = torch.cat([score.cpu() for score in scores.values()])
    out = len(everyone) - int((len(everyone) - target) * left + target)
    threshold = float(everyone.kthvalue(out).values) if out > 0 else -1.0
    for path, delta in deltas.items():
        delta.get_buffer("mask").copy_(scores[path] > threshold)


def apply(delta: nn.Module) -> None:
    """Set the entries of E that the last pruning took to zero; an optimizer moves them in between."""
    delta.get_parameter("E").data.masked_fill_(~delta.get_buffer("mask")[:, None], 0)
