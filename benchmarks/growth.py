"""How the cost of a training step grows: time, saved activations and peak memory against tokens, rank, layers, adapters.

    .venv/bin/python -m benchmarks growth

Hidden 512 in bf16, LoRA r 8 on every linear of the blocks, 4 layers, 4 × 256 tokens, where none of these is what grows. Tokens grow
as more sequences of 256 and as one longer sequence. Adapters are those of a bank: one token for each of 64 rows, fp32. An
exponent is the slope of the logarithms by least squares: of time in each round, with the median and quartiles over rounds.
With one thread it also draws docs/images/growth.svg and writes the points to docs/results/growth.json.
"""

import io
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import deltalab as dl
from benchmarks import bank, sides
from benchmarks.harness import MOST, ROOT, Asked, Ratio, Row, in_child, peak_above, timed
from benchmarks.sides import Case
from deltalab.core.files import write_json, write_text
from deltalab.measure.activations import saved_bytes

ROUNDS, WARM_UP, MIB = 5, 1, 2**20
SIDES = ("ours", "peft")
TIME, SAVED, PEAK, ADAPTERS = (
    "time, ms",
    "saved activations, MiB",
    "peak memory above the model, MiB",
    "memory of adapters, MiB",
)
IMAGE, POINTS = ROOT / "docs" / "images" / "growth.svg", ROOT / "docs" / "results" / "growth.json"


@dataclass
class Curve:
    """One quantity of one side against what grows. slopes: the exponent, of each round where it was timed."""

    axis: str
    quantity: str
    side: str
    points: dict[int, float]
    slopes: list[float] = field(default_factory=list)

    def exponent(self) -> Ratio:
        if len(self.slopes) < 2:
            one = self.slopes[0] if self.slopes else slope(self.points)
            return Ratio(one, one, one)
        low, middle, high = statistics.quantiles(self.slopes, n=4, method="inclusive")
        return Ratio(middle, low, high)


def slope(points: Mapping[int, float]) -> float:
    """p of y ~ xᵖ."""
    logs = [(math.log(x), math.log(y)) for x, y in points.items()]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def axes(quick: bool) -> dict[str, dict[int, Case]]:
    """What grows -> its values, and the case of each."""
    case = Case("S", torch.bfloat16)
    if quick:
        small = replace(case, layers=1, sequences=1, tokens=32)
        return {"rank": {r: replace(small, r=r) for r in (4, 8)}}
    return {
        "tokens, in sequences of 256": {n: replace(case, sequences=n // 256) for n in (256, 512, 1024, 2048, 4096)},
        "tokens, in one sequence": {n: replace(case, sequences=1, tokens=n) for n in (256, 512, 1024, 2048, 4096)},
        "rank": {r: replace(case, r=r) for r in (4, 8, 16, 32, 64, 128, 256)},
        "layers": {n: replace(case, layers=n) for n in (1, 2, 4, 8, 16)},
    }


def peak(axis: str, value: int, side: str, quick: bool) -> float:
    """MiB of two steps above the model, of this process."""
    case = axes(quick)[axis][value]
    made = {"ours": sides.ours, "peft": sides.theirs}[side](case)

    def work() -> None:
        made.step()
        made.step()

    return peak_above(work) / MIB


def of_steps(axis: str, cases: Mapping[int, Case], asked: Asked) -> list[Curve]:
    """Time, saved activations and peak memory of both sides."""
    times: dict[str, dict[int, list[float]]] = {side: {} for side in SIDES}
    saved: dict[str, dict[int, float]] = {side: {} for side in SIDES}
    for value, case in cases.items():
        made = {"ours": sides.ours(case), "peft": sides.theirs(case)}
        for name, side in made.items():
            saved[name][value] = saved_bytes(side.model, side.loss) / MIB
        found = timed({name: side.step for name, side in made.items()}, asked.turns(ROUNDS, 2), WARM_UP)
        for name, taken in found.items():
            times[name][value] = taken
    peaks = {
        side: {value: in_child(peak, axis, value, side, asked.quick, threads=asked.threads) for value in cases}
        for side in SIDES
    }
    curves = [of_times(axis, side, times[side]) for side in SIDES]
    return curves + [Curve(axis, what, side, points[side]) for what, points in ((SAVED, saved), (PEAK, peaks)) for side in SIDES]  # fmt: skip


def of_times(axis: str, side: str, times: Mapping[int, Sequence[float]]) -> Curve:
    """Medians, and the exponent of each round."""
    each = [dict(zip(times, turn, strict=True)) for turn in zip(*times.values(), strict=True)]
    points = {value: 1e3 * statistics.median(taken) for value, taken in times.items()}
    return Curve(axis, TIME, side, points, [slope(turn) for turn in each])


@torch.no_grad()
def of_adapters(asked: Asked) -> list[Curve]:
    """One token for each of 64 rows, by so many different adapters; and the memory that a bank has for them."""
    counts, wide = ((1, 2), 4) if asked.quick else ((1, 4, 16, 64), 64)
    axis = f"adapters of {wide} rows"
    ids = torch.randint(5, 2048, (wide, 1), generator=torch.Generator().manual_seed(0))
    times: dict[str, dict[int, list[float]]] = {side: {} for side in SIDES}
    memory: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        every = bank.adapters(Path(folder), counts[-1], "S")
        for count in counts:
            some = dict(list(every.items())[:count])
            names = [list(some)[i % count] for i in range(wide)]
            random.Random(0).shuffle(names)
            mine, other = dl.AdapterBank(bank.base("S"), some), bank.in_peft(bank.base("S"), some)

            def ours(mine: dl.AdapterBank = mine, names: list[str] = names) -> None:
                with mine.rows(names):
                    mine.model(input_ids=ids)

            def theirs(other: Any = other, names: list[str] = names) -> None:
                other(input_ids=ids, adapter_names=names)

            found = timed({"ours": ours, "peft": theirs}, asked.turns(3 * ROUNDS, 2), WARM_UP + 1)
            for name, taken in found.items():
                times[name][count] = taken
            memory[count] = mine.nbytes / MIB
    return [*(of_times(axis, side, times[side]) for side in SIDES), Curve(axis, ADAPTERS, "ours", memory)]


def rows(asked: Asked) -> Iterator[Row]:
    curves: list[Curve] = []
    work: dict[str, Callable[[], list[Curve]]] = {
        axis: lambda axis=axis, cases=cases: of_steps(axis, cases, asked)  # type: ignore[misc]
        for axis, cases in axes(asked.quick).items()
    }
    work["adapters"] = lambda: of_adapters(asked)
    for axis, measure in work.items():
        if not asked.wants("growth", axis):
            continue
        # a bank has no gradients; what trains has them
        with torch.no_grad() if axis == "adapters" else nullcontext():
            found = measure()
        curves += found
        for curve in found:
            what = f"growth with {curve.axis}"
            yield Row(what, curve.quantity, f"exponent, {curve.side}", curve.exponent(),
                      {str(x): y for x, y in curve.points.items()}, curve.quantity.rpartition(", ")[2], direction=MOST)  # fmt: skip
    if asked.threads == 1 and not asked.quick and not asked.only:
        write_json(POINTS, [as_json(curve) for curve in curves])
        draw(curves, IMAGE)


def as_json(curve: Curve) -> dict[str, Any]:
    return {"axis": curve.axis, "quantity": curve.quantity, "side": curve.side, "exponent": vars(curve.exponent()),
            "points": [[x, round(y, 3)] for x, y in curve.points.items()]}  # fmt: skip


def draw(curves: Sequence[Curve], file: Path) -> None:
    """A panel for each quantity and what it grows with, both on logarithms, the exponents in the legend."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "growth", "svg.fonttype": "none", "font.size": 8}
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    across = list(dict.fromkeys(curve.axis for curve in curves))
    down = {axis: list(dict.fromkeys(c.quantity for c in curves if c.axis == axis)) for axis in across}
    height = max(map(len, down.values()))
    figure, panels = plt.subplots(height, len(across), figsize=(2.6 * len(across), 2.2 * height), squeeze=False)
    for column, axis in enumerate(across):
        for row in range(height):
            panel = panels[row][column]
            if row >= len(down[axis]):
                panel.axis("off")
                continue
            for curve in [c for c in curves if (c.axis, c.quantity) == (axis, down[axis][row])]:
                label = f"{curve.side}: exponent {curve.exponent().median:.2f}"
                colour = {"ours": "#0b6e8f", "peft": "#c2571a"}[curve.side]
                panel.loglog(list(curve.points), list(curve.points.values()), marker="o", ms=3, lw=1.2, color=colour, label=label)  # fmt: skip
            panel.set_title(down[axis][row], fontsize=8)
            panel.set_xlabel(axis)
            values = sorted({x for c in curves if c.axis == axis for x in c.points})
            panel.set_xticks(values, [str(x) for x in values])
            panel.minorticks_off()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            panel.legend(fontsize=6.5, frameon=False)
            panel.grid(alpha=0.25, lw=0.5)
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    write_text(file, "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")
