"""`deltalab compare RUNS…`: groups of runs beside each other, with intervals over seeds and tests against a baseline."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deltalab.lab.compare import Line

COSTS = {
    "trained": "parameters trained",
    "adapter_bytes": "bytes of the adapter",
    "memory_above": "bytes above what is in use before training",
    "training_seconds": "seconds of training",
}


def command(
    runs: Annotated[list[Path], typer.Argument(help="folders of sweeps or of single runs")],
    baseline: Annotated[
        str | None, typer.Option(help="the group that the others are tested against; the sweep's own if not given")
    ] = None,
    measure: Annotated[
        list[str] | None, typer.Option(help="score.<task>.<measure>, held_out, loss; the tasks' scores if not given")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(min=0.0, help="also say who is at most this share worse than the baseline: 0.03")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="also write the lines to this file")] = None,
) -> None:
    """Mean and interval of each group over its seeds; with a baseline, what is better, worse, or within noise."""
    from dataclasses import asdict

    from deltalab.core.errors import UserError
    from deltalab.core.files import write_json
    from deltalab.lab.compare import (
        at_most_below,
        baseline_of,
        compare,
        cost_of,
        measures_of,
        pareto,
        parts_of,
        runs_of,
    )

    found = runs_of(runs)
    baseline = baseline or baseline_of(runs)
    if margin is not None and baseline is None:
        raise UserError("--margin is against a baseline.", next="--baseline NAME")
    known = measures_of(found)
    wanted = measure or [name for name in known if name.startswith("score.")] or known[:1]
    lines = compare(found, wanted, baseline)
    for name, part in product(wanted, parts_of(found)):
        mine = [line for line in lines if line.measure == name and line.group in part]
        if not mine:
            continue
        print(table(name, mine))
        if margin is not None:
            told = {line.group: at_most_below(line, mine[0], margin) for line in mine[1:]}
            parts = [
                f"{word}: {', '.join(who)}"
                for word in ("shown", "open", "refuted")
                if (who := [group for group, said in told.items() if said == word])
            ]
            print(
                f"  at most {100 * margin:g} % worse than {mine[0].group}: {'; '.join(parts) or 'nothing can be said'}"
            )
        for column, words in COSTS.items():
            if all(run.values.get(column) is not None for run in found):
                print(f"  Pareto, {words}: {', '.join(pareto(mine, cost_of(found, column)))}")
        print()
    if json_ is not None:
        write_json(json_, [asdict(line) | {"verdict": line.verdict()} for line in lines])


def table(measure: str, lines: Sequence["Line"]) -> str:
    """One measure: a line a group."""
    head = ["group", "seeds", "mean", "95 %", "to the baseline", "p, Holm", "", "tested on"]
    rows = [_cells(line) for line in lines]
    if not any(line.difference for line in lines):
        head, rows = head[:4], [row[:4] for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    better = "more" if lines[0].rises else "less"
    return "\n".join([f"{measure} ({better} is better)", *(f"  {row}" for row in text)])


def _cells(line: "Line") -> list[str]:
    interval, found = line.interval, line.difference
    cells = [
        line.group,
        str(len(line.seeds)),
        f"{line.mean:.4g}",
        f"[{interval.low:.4g}, {interval.high:.4g}]" if interval else "",
    ]
    if found is None:
        return [*cells, "", "", "", ""]
    far = found.interval
    return [
        *cells,
        f"{far.value:+.3g} [{far.low:+.3g}, {far.high:+.3g}]",
        f"{found.corrected:.2g}",
        line.verdict(),
        found.how,
    ]
