"""docs/results/performance.md from results: the tables between its two marks; the words around them stay."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Check, Ratio, Row
from benchmarks.results import read
from deltalab.core.errors import UserError
from deltalab.core.files import write_text

PAGE = ROOT / "docs" / "results" / "performance.md"
BEGIN, END = "<!-- tables: made by python -m benchmarks table -->", "<!-- end of the tables -->"
HEAD = ("what", "setting", "threads", "of", "ratio", "target", "reached", "medians", "sides apart")


def write(folder: Path, page: Path = PAGE) -> Path:
    """The tables of the results in `folder` into the page.

    Raises: UserError if there are no results but quick ones, or the page has no place for the tables.
    """
    found = [result for result in read(folder) if not result["quick"]]
    if not found:
        raise UserError(f"there are no results in '{folder}'.", found="none, or of --quick runs, whose figures mean nothing",
                        next=".venv/bin/python -m benchmarks all --out FOLDER")  # fmt: skip
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"'{page}' has no place for the tables.", next=f"a line '{BEGIN}' and one '{END}'")
    before, _, rest = text.partition(BEGIN)
    write_text(page, f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{rest.partition(END)[2]}")
    return page


def tables(found: Sequence[dict[str, Any]]) -> str:
    """All rows with a target first, then those of each benchmark that have none, then what they were measured on."""
    parts, counted = [], [(result, row) for result in found for row in map(row_of, result["rows"])]
    goals = [(result, row) for result, row in counted if row.target is not None]
    reached = sum(bool(row.reached) for _, row in goals)
    if goals:
        parts += [f"## Against the targets\n\n{reached} of {len(goals)} rows reach theirs.", table(goals)]
    for name in dict.fromkeys(result["benchmark"] for result in found):
        rest = [(result, row) for result, row in counted if result["benchmark"] == name and row.target is None]
        about = next(result["about"] for result in found if result["benchmark"] == name)
        if rest:
            parts += [f"## {name}\n\n{about}", table(rest)]
    return "\n\n".join([*parts, "## Measured on", machines(found)])


def table(rows: Sequence[tuple[dict[str, Any], Row]]) -> str:
    """Markdown; columns that no row fills are left out."""
    lines = [cells(result, row) for result, row in rows]
    kept = [i for i in range(len(HEAD)) if any(line[i] for line in lines)]
    shown = [[line[i] for i in kept] for line in [list(HEAD), ["---"] * len(HEAD), *lines]]
    return "\n".join("|---" * len(kept) + "|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in shown)


def cells(result: dict[str, Any], row: Row) -> list[str]:
    """One row, as it is printed."""
    sides = [name for name in row.of.split(" / ") if name in row.medians] or list(row.medians)
    medians = ", ".join(f"{name} {row.medians[name]:.4g}" for name in sides)
    apart = ", ".join(f"{check.name} {check.error:.0e}{'' if check.passed else ' (too far)'}" for check in row.checks)
    ratio = str(row.ratio) + (f" ({row.note})" if row.note else "")
    target = "" if row.target is None else f"{'≥' if row.direction == 'at least' else '≤'} {row.target:g}"
    reached = "" if row.reached is None else "yes" if row.reached else "**no**"
    threads = str(result["machine"]["threads"])
    return [text.replace("|", "\\|") for text in (row.what, row.setting, threads, row.of, ratio, target, reached, f"{medians} {row.unit}" if medians else "", apart)]  # fmt: skip


def machines(found: Sequence[dict[str, Any]]) -> str:
    """Each machine and its versions, with the commands that were run there and when."""
    groups: dict[str, list[str]] = {}
    for result in found:
        here = result["machine"]
        versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
        text = f"{here['processor']}, {here['cores']} cores, {here['memory']}, device {here['device']}, {here['system']}; {versions}"
        groups.setdefault(text, []).append(f"$ {result['command']}      # {result['date'][:10]}, revision {here['revision']}")  # fmt: skip
    return "\n\n".join(f"{text}:\n\n```console\n" + "\n".join(commands) + "\n```" for text, commands in groups.items())


def row_of(found: dict[str, Any]) -> Row:
    """A row as it was before it went to JSON."""
    plain = {key: value for key, value in found.items() if key not in ("reached", "same", "ratio", "checks")}
    return Row(**plain, ratio=Ratio(**found["ratio"]), checks=[Check(**check) for check in found["checks"]])
