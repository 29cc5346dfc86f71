"""The calibration's counts as tables."""

from collections.abc import Mapping, Sequence

from deltalab.core.stats import Interval
from deltalab.studies.calibration.simulate import Rate, Trap


def markdown(tables: Mapping[str, Sequence[Rate]], trap: Trap) -> str:
    """Every share with its exact limits, a table for each kind of study, and the selection trap."""
    parts = [f"### {name}\n\n{table(rows)}" for name, rows in tables.items()]
    changes = "\n".join(f"| {name.replace('_', ', ')} | {change(i)} |" for name, i in trap._asdict().items())
    return "\n\n".join([*parts, f"### selection\n\n| | relative change |\n|---|---|\n{changes}"]) + "\n"


def table(rows: Sequence[Rate]) -> str:
    """What was said how often, a column for each number of seeds."""
    seeds = sorted({r.seeds for r in rows})
    found = {(r.what, r.seeds): r for r in rows}
    lines = [
        f"| {what} | {' | '.join(share(found[what, n].interval) if (what, n) in found else '–' for n in seeds)} |"
        for what in dict.fromkeys(r.what for r in rows)
    ]
    head = " | ".join(f"{n} seed{'s' if n > 1 else ''}" for n in seeds)
    return "\n".join([f"| | {head} |", f"|---|{'---|' * len(seeds)}", *lines])


def share(i: Interval) -> str:
    """A share in per cent, with limits."""
    return f"{100 * i.value:.1f} % [{100 * i.low:.1f}, {100 * i.high:.1f}]"


def change(i: Interval) -> str:
    """A relative change in per cent, with limits."""
    return f"{100 * i.value:+.2f} % [{100 * i.low:+.2f}, {100 * i.high:+.2f}]".replace("-", "−")
