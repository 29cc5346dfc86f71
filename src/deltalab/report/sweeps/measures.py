"""Which group is best in what was measured: verdicts, tables with tests, and pictures of differences and of a numeric axis."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from deltalab.lab.compare import ALPHA, Line
from deltalab.lab.spec import NAME, TUNE
from deltalab.report.panels import Effects, Mark, Plot, Point, Scatter
from deltalab.report.sweeps.gather import LOSSES, Gathered, measure_name, unit
from deltalab.report.values import LONG, Section, Table, Tile, capital, number, p_value
from deltalab.report.verdicts import Told

NAMED = 4
"""Groups that a sentence names; of more it says how many."""
ROWS = 12
"""Groups in a figure of rows; of more, the best."""
NARROW = "\u00a0"
"""A space at which no line ends."""
DECADES = 8.0
"""How many times the smallest value of a numeric axis its largest has to be for a logarithmic one."""


def section(found: Gathered) -> Section:
    """The tables of all measures, and their figures."""
    plots = [plot for plot in (_axis(found), _differences(found)) if plot.panels]
    return Section("measures", "Which is better", plots, [_table(found, measure) for measure in found.lines])


# ---- in words -----------------------------------------------------------------------------------------------------


def verdicts(found: Gathered) -> list[Told]:
    """The best group, and what became of the others beside the baseline."""
    out = [_best(found)]
    if len(found.groups) > 1 and found.best != found.baseline:
        out.append(_baseline(found))
    return out


def _best(found: Gathered) -> Told:
    line, others = found.ranked[0], found.to_best
    if found.alike:
        sentence = f"All {len(found.ranked)} groups have the same {measure_name(found.main)}: {fixed(line.mean)}."
        return Told(f"best {measure_name(found.main)}", "", "all alike", sentence, {"kind": "measures", "tone": "fact", "measure": found.main, "mean": line.mean})  # fmt: skip
    sentence = f"Best by {measure_name(found.main)}: {line.group}, {fixed(line.mean)}{_limits(line)} ({_seeds(line)}). "
    sentence += _others(others) if others else "There is no other group to compare it with."
    if others and any(other.difference for other in others):
        sentence += " The best was picked by these same numbers, which flatters its lead."
    if len(line.seeds) == 1:
        sentence += " One seed: how another training would come out is not measured."
        if line.interval:
            sentence += " The interval is over its examples alone."
    sentence += _holm(sum(other.difference is not None for other in others))
    numbers = {"kind": "measures", "tone": "fact", "measure": found.main, "group": line.group, "mean": line.mean, "interval": line.interval,
               "others": [_plain(other) for other in others]}  # fmt: skip
    return Told(f"best {measure_name(found.main)}", "", line.group, sentence, numbers)


def _others(lines: Sequence[Line]) -> str:
    """What the others are beside the best one."""
    parts = _parts(
        sorted(lines, key=lambda line: -line.mean if line.rises else line.mean),
        ("within noise", "worse", "better", ""),
        " of it",
    )
    if len(parts) > 1:
        return f"Of the {len(lines)} others {', '.join(parts)}."
    who = {1: "The other", 2: "Both others"}.get(len(lines), f"All {len(lines)} others")
    return f"{who} {parts[0].removeprefix(f'{len(lines)} ')}."


def _baseline(found: Gathered) -> Told:
    lines = [line for line in found.ranked if line.group != found.baseline]
    parts = _parts(lines, ("better", "worse", "within noise", ""))
    sentence = f"Beside the baseline {found.baseline}, by {measure_name(found.main)}, {', '.join(parts)}."
    sentence += _holm(found.tests[found.main])
    counts = Counter(line.verdict() or "not tested" for line in lines)
    outcome = ", ".join(
        f"{counts[word]} {word}" for word in ("better", "worse", "within noise", "not tested") if counts[word]
    )
    tone = "good" if counts["better"] else "open"
    name = f"against the baseline{f', {found.task}' * bool(found.task)}"
    return Told(name, "", outcome, sentence, {"kind": "measures", "tone": tone, "baseline": found.baseline, "lines": [_plain(line) for line in lines]})  # fmt: skip


def _parts(lines: Sequence[Line], order: Sequence[str], of: str = "") -> list[str]:
    """How many groups have each verdict, and which: `2 are worse (A: −0.3 […], p < 0.001; B: …)`."""
    parts = []
    for verdict in order:
        some = [line for line in lines if line.verdict() == verdict]
        told = [f"{line.group}: {_difference(line)}" if verdict in ("better", "worse") else line.group for line in some]
        if len(told) > NAMED:
            told = [*told[: NAMED - 1], f"and {len(told) - NAMED + 1} more"]
        said = {"": "could not be tested", "within noise": f"within noise{of}"}.get(verdict, verdict)
        verb = "" if not verdict else "is " if len(some) == 1 else "are "
        parts += [f"{len(some)} {verb}{said} ({'; '.join(told)})"] if some else []
    return parts


def tiles(found: Gathered) -> list[Tile]:
    """The best, and the cheapest that is as good as far as the data tell."""
    line = found.ranked[0]
    if found.alike:
        return []
    out = [Tile(capital(f"best {measure_name(found.main)}"), fixed(line.mean), f"{line.group}{';' * bool(line.interval)}{_limits(line)}")]  # fmt: skip
    near = [found.best, *(other.group for other in found.to_best if other.verdict() == "within noise")]
    sizes = {group: found.mean(group, "trained") for group in near}
    known = {group: size for group, size in sizes.items() if size is not None}
    if len(near) > 1 and len(set(known.values())) > 1:
        small = min(known, key=lambda group: known[group])
        out.append(Tile("Smallest within noise of the best", f"{known[small]:,.0f}", f"trained parameters: {small}"))
    return out


def _difference(line: Line) -> str:
    assert line.difference is not None
    far = line.difference.interval
    p = p_value(line.difference.corrected).replace(" ", NARROW)
    limits = f"[{signed(far.low)},{NARROW}{signed(far.high)}]"
    return f"{signed(far.value)} {limits}, p{NARROW}{p if p.startswith('<') else f'={NARROW}{p}'}"


def fixed(value: float) -> str:
    """Three decimals, so that a column reads well; of large and tiny numbers three digits."""
    return f"{value:.3f}".replace("-", "−") if 0.01 <= abs(value) < 100 or value == 0 else number(value)


def signed(value: float) -> str:
    """The same with a sign, but for nothing."""
    shown = f"{value:+.3f}" if abs(value) < 100 else f"{value:+.3g}"
    return shown.replace("-", "−") if float(shown) else "0"


def interval_note(found: Gathered) -> str:
    """What a value and its bar are."""
    has = any(line.interval for line in found.ranked)
    if found.seeds > 1:
        return f"Means over seeds{' with 95 % intervals' if has else ''}"
    return "One seed; 95 % intervals over its examples alone" if has else "One seed: no intervals"


def _limits(line: Line) -> str:
    return f" [{fixed(line.interval.low)},{NARROW}{fixed(line.interval.high)}]" if line.interval else ""


def _seeds(line: Line) -> str:
    return f"{len(line.seeds)} seeds" if len(line.seeds) > 1 else "one seed"


def _holm(tests: int) -> str:
    return f" Adjusted by Holm over {tests} tests." if tests > 1 else ""


def _plain(line: Line) -> dict[str, Any]:
    found = line.difference
    return {"group": line.group, "mean": line.mean, "verdict": line.verdict(),
            "difference": None if found is None else list(found.interval), "p": None if found is None else found.p,
            "adjusted": None if found is None else found.corrected, "tested_on": None if found is None else found.how}  # fmt: skip


# ---- tables and figures -------------------------------------------------------------------------------------------


def _table(found: Gathered, measure: str) -> Table:
    lines = found.lines[measure]
    tested = any(line.difference for line in lines)
    known = any(line.interval for line in lines)
    head = ["", "seeds", "mean [95 %]" if known else "mean", "difference [95 %]", "p, Holm", "verdict", "tested on"]
    columns = len(head) if tested else 3
    rows = [tuple(_cells(found, line)[:columns]) for line in lines]
    better = "More" if lines[0].rises else "Less"
    note = f"{better} is better."
    if tested:
        note += f" Differences are to {found.baseline}; p-values are corrected over the {found.tests[measure]} tests of {'the scores' if measure not in LOSSES else 'losses'}, α\u00a0=\u00a0{ALPHA}."  # fmt: skip
    note += _error(lines, found)
    return Table(measure, capital(unit(measure)), tuple(head[:columns]), rows, note, folded=len(rows) > LONG and measure != found.main)  # fmt: skip


def _error(lines: Sequence[Line], found: Gathered) -> str:
    """What the intervals are, where that is not over seeds."""
    if not any(len(line.seeds) == 1 for line in lines):
        return ""
    if any(line.interval for line in lines if len(line.seeds) == 1):
        return " A group of one seed has an interval over examples alone, and none over seeds."
    return " A group of one seed has no interval."


def _cells(found: Gathered, line: Line) -> list[str]:
    cells = [line.group, str(len(line.seeds)), f"{fixed(line.mean)}{_limits(line)}"]
    if line.difference is None:
        return [*cells, "—", "—", "baseline" if line.group == found.baseline else "no test", "—"]
    far = line.difference.interval
    said = f"{signed(far.value)} [{signed(far.low)}, {signed(far.high)}]"
    return [*cells, said, p_value(line.difference.corrected), line.verdict().replace(" ", NARROW), line.difference.how]


TONE = {"better": "green", "worse": "orange", "within noise": "grey"}


def _differences(found: Gathered) -> Plot:
    """Each group's difference to the baseline, in every measure that was tested."""
    shown, panels = found.shown(ROWS), []
    for measure, lines in found.lines.items():
        marks = [Mark(line.group, far.value, TONE[line.verdict()], far.low, far.high, note=signed(far.value))
                 for line in lines if line.group in shown and line.difference for far in [line.difference.interval]]  # fmt: skip
        if marks:
            panels.append(Effects(f"difference-{measure}", capital(measure_name(measure)), f"difference to {found.baseline}", marks, 0.0))  # fmt: skip
    caption = (
        f"Each group less the baseline {found.baseline}. {interval_note(found)}. Green: better, orange: worse, grey: within noise, "
        f"after Holm's correction; the interval is not corrected.{found.left_out(ROWS)}"
    )
    return Plot("differences", "Differences to the baseline", caption, panels, min(3, len(panels)) or 1)


def _axis(found: Gathered) -> Plot:
    """The main measure over the one numeric setting that varies, if there is no other."""
    key, values = numeric_axis(found)
    points = sorted((values[line.group], line) for line in found.ranked if line.group in values) if key else []
    if len(points) < 2:
        return Plot("axis", "", "", [])
    xs = [x for x, _ in points]
    logx = min(xs) > 0 and max(xs) / min(xs) >= DECADES
    drawn = [Point(line.group, x, line.mean, *(line.interval[1:] if line.interval else (None, None)), named=False) for x, line in points]  # fmt: skip
    panel = Scatter("axis", capital(unit(found.main)), key, unit(found.main), drawn, [(p.x, p.y) for p in drawn], False, logx, xs if len(xs) <= 9 else ())  # fmt: skip
    return Plot("axis", f"{capital(measure_name(found.main))} over {key}", f"{interval_note(found)}; {'more' if found.rises else 'less'} is better.", [panel], 1)  # fmt: skip


def numeric_axis(found: Gathered) -> tuple[str, dict[str, float]]:
    """The key of the one numeric setting that varies, and its value in each group that has it; nothing where more varies.

    Settings that go together (r and alpha of a zip) are one axis, called by the first.
    """
    axes = [axis for axis in found.spec.axes() if len(axis) > 1]
    if found.task:  # what tells the parts of a sweep from each other varies in none of them
        axes = [axis for axis in axes if not all(key.partition(".")[0] == "data" for part in axis for key in part)]
    if len(axes) != 1:
        return "", {}
    for key in (key for key in axes[0][0] if key not in (NAME, TUNE)):
        values = [part[key] for part in axes[0] if key in part]
        if len(values) > 1 and len(set(map(str, values))) == len(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values):  # fmt: skip
            of_group = {trial.group: float(trial.settings[key]) for trial in found.trials if key in trial.settings}
            with_it = [other.rpartition(".")[2] for other in axes[0][0] if other not in (key, NAME, TUNE)]
            name = key.rpartition(".")[2] + (f" ({', '.join(with_it)} with it)" if with_it else "")
            return name, of_group
    return "", {}
