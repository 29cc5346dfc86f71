"""What the benchmarks share: sides that take turns, ratios with their spread, saved activations, peak memory, rows.

A benchmark is a file of this folder with a docstring, whose first line `--list` shows, and a function

    def rows(asked: Asked) -> Iterator[Row]

that yields each row as soon as it is measured. `python -m benchmarks NAME` runs it once with one thread and once with two,
each in a process of its own.
"""

import ctypes
import gc
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import environment

ROOT = Path(__file__).parents[1]
LEAST, MOST = "at least", "at most"
Direction = Literal["at least", "at most"]
Sides = Mapping[str, Callable[[], object]]
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Asked:
    """What a benchmark was asked for.

    quick: a few rounds of the smallest case, to see that it runs; the figures mean nothing. threads: of torch, already
    set. folder: where a benchmark may leave files. only: a pattern; a row whose name does not match it is left out.
    rounds: instead of the benchmark's own number.
    """

    quick: bool = False
    threads: int = 1
    folder: Path = Path("runs/benchmarks")
    only: str = ""
    rounds: int | None = None

    def wants(self, *names: str) -> bool:
        """Whether a row of this name and setting is asked for."""
        return re.search(self.only, ", ".join(names)) is not None

    def turns(self, usual: int, quick: int = 3) -> int:
        """How many rounds to take."""
        return self.rounds or (quick if self.quick else usual)


@dataclass(frozen=True)
class Ratio:
    """The median of ratios and their quartiles; all three are the same where something was counted."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.3g}"
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Check:
    """How far the sides' results are apart, and how far they may be."""

    name: str
    error: float
    most: float

    @property
    def passed(self) -> bool:
        return self.error <= self.most  # a NaN does not pass


@dataclass(frozen=True)
class Row:
    """One line of the results.

    what, setting: the work, and its shapes, dtypes and options. of: what the ratio is of, "peft / ours". medians: of each
    side, in `unit`. target, direction: the ratio should be at least, or at most, that; without a target the direction
    says which way is better. checks: that the sides do the same work; a target is reached only if all of them pass.
    """

    what: str
    setting: str
    of: str
    ratio: Ratio
    medians: Mapping[str, float] = field(default_factory=dict)
    unit: str = "ms"
    target: float | None = None
    direction: Direction = "at least"
    checks: Sequence[Check] = ()
    note: str = ""

    @property
    def same(self) -> bool:
        """Whether the sides did the same work, as far as was checked."""
        return all(check.passed for check in self.checks)

    @property
    def reached(self) -> bool | None:
        """None without a target."""
        if self.target is None:
            return None
        value = self.ratio.median
        return self.same and (value >= self.target if self.direction == LEAST else value <= self.target)

    def __str__(self) -> str:
        sides = ", ".join(f"{name} {value:.4g}" for name, value in self.medians.items())
        target = "" if self.target is None else f"; {self.direction} {self.target:g}: {'yes' if self.reached else 'NO'}"
        checks = ", ".join(f"{c.name} {c.error:.1e}{'' if c.passed else f' > {c.most:.0e} NOT THE SAME'}" for c in self.checks)  # fmt: skip
        note = f" ({self.note})" if self.note else ""
        return f"{self.what}, {self.setting}\n    {self.of}: {self.ratio}{target}{note}\n    {sides} {self.unit}" + (
            f"; apart: {checks}" if checks else ""
        )


def timed(sides: Sides, rounds: int, warm_up: int = 2, before: Callable[[str], object] | None = None) -> Seconds:
    """Seconds of each side in each round.

    The sides take turns, another one first in each round. Before a round garbage is collected, so that none falls into a
    side's time. before: called with the side's name, outside of its time.
    """
    names = list(sides)
    seconds: Seconds = {name: [] for name in names}
    for turn in range(warm_up + rounds):
        if turn == warm_up:
            gc.freeze()  # what is there now need not be looked through each time
        gc.collect()
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            if before is not None:
                before(name)
            began = time.perf_counter()
            sides[name]()
            spent = time.perf_counter() - began
            if turn >= warm_up:
                seconds[name].append(spent)
    gc.unfreeze()
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Of two sides' seconds: the ratio within each round, their median and quartiles."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    if len(each) == 1:
        return Ratio(each[0], each[0], each[0])
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(middle, low, high)


def exactly(above: float, below: float) -> Ratio:
    """A ratio of two numbers that were counted."""
    return Ratio(above / below, above / below, above / below)


def milliseconds(seconds: Seconds) -> dict[str, float]:
    """The median of each side."""
    return {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}


def compared(what: str, setting: str, seconds: Seconds, above: str, below: str, **more: Any) -> Row:
    """The row of `above` / `below`, two of the sides; more: the other fields of the row."""
    return Row(
        what, setting, f"{above} / {below}", ratio(seconds[above], seconds[below]), milliseconds(seconds), **more
    )


def apart(got: Tensor | Iterable[Tensor], want: Tensor | Iterable[Tensor]) -> float:
    """|got − want| / |want|, by norm over all tensors, in fp64."""
    pairs = list(zip(_tensors(got), _tensors(want), strict=True))
    far = sum(float((g.detach().double() - w.detach().double()).square().sum()) for g, w in pairs)
    size = sum(float(w.detach().double().square().sum()) for _, w in pairs)
    return (far / size) ** 0.5 if size else (0.0 if far == 0 else float("inf"))


def _tensors(value: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


# What autograd keeps, and what a process takes


def memory_of(what: str) -> int:
    """Bytes, by a line of /proc/self/status: VmRSS, VmHWM, RssAnon."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what + ":")) * 1024


def peak_above(work: Callable[[], object]) -> int:
    """Most bytes that this process has during `work` above what it has now; call it in a process of its own (`in_child`).

    What was freed goes back to the system first. The system counts the peak (VmHWM) where it lets the count be reset,
    otherwise the memory is read every 2 ms.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory_of("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        with sampled("VmRSS") as most:
            work()
        return most[0] - before
    work()
    return memory_of("VmHWM") - before


@contextmanager
def sampled(*what: str, every: float = 0.002) -> Iterator[list[int]]:
    """The most of each of these lines of /proc/self/status, read again and again while the block runs."""
    most, done = [memory_of(name) for name in what], threading.Event()

    def look() -> None:
        most[:] = [max(a, memory_of(name)) for a, name in zip(most, what, strict=True)]

    def watch() -> None:
        while not done.wait(every):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()
        look()


def in_child(function: Callable[..., Any], *args: Any, threads: int = 1) -> Any:
    """What a function of a benchmark returns in a process of its own; arguments and result go as JSON.

    Raises: RuntimeError with the end of what the process said, if it failed.
    """
    call = json.dumps([function.__module__, function.__qualname__, threads, args])
    command = [sys.executable, "-m", "benchmarks.harness", call]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment(threads))
    if ran.returncode:
        raise RuntimeError(f"{function.__qualname__}{args} failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def _child(call: str) -> None:
    module, name, threads, args = json.loads(call)
    torch.set_num_threads(threads)
    print(json.dumps(getattr(importlib.import_module(module), name)(*args)))


if __name__ == "__main__":
    _child(sys.argv[1])
