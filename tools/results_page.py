"""Writes docs/results/NAME.md from finished sweeps: what ran, what was found, what it cost, with figures and tables as files.

    python tools/results_page.py docs/results/lab.md FOLDER…

Each folder is one of `deltalab sweep`; tools/results/NAME.md, with the command that made it and what was cut, comes first.
Figures go to docs/images/lab/, the table of all trials to docs/results/lab/, as CSV.
"""

import re
import shutil
import sys
from pathlib import Path

import deltalab.lab as lab
from deltalab.report import build_report
from deltalab.report.sweeps import sweep_contents
from deltalab.report.values import Table

FIGURES = ("methods*.svg", "pareto*.png", "axis*.svg")
"""Those that a page shows, of a sweep that has them; one of several tasks has them for each."""
LEFT_OUT = ("proofs", "trials", "held_out", "loss")
"""Tables that it does not: they are in the CSV, or follow the others."""


TEXTS = Path(__file__).parent / "results"


def main(page: Path, folders: list[Path]) -> None:
    """The whole page: the introduction, and the sweeps in order."""
    parts = [(TEXTS / "introduction.md").read_text(encoding="utf-8").strip()]
    parts += [section(folder, page) for folder in folders]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def section(folder: Path, page: Path) -> str:
    """One sweep."""
    name, found = folder.name, sweep_contents(folder)
    tables = page.parent / page.stem
    tables.mkdir(exist_ok=True)
    lab.load(folder).to_csv(tables / f"{name}.csv", index=False, float_format="%.6g")
    lines = [f"## {name}", (TEXTS / f"{name}.md").read_text(encoding="utf-8").strip(), found.subtitle]
    lines += [f"- {one.sentence}" for one in found.verdicts]
    lines += [figure(folder, one.name, page) for some in FIGURES for one in sorted((folder / "figures").glob(some))]
    shown = [table for part in found.sections for table in part.tables if table.name.partition("-")[0] not in LEFT_OUT]
    lines += [markdown(table) for table in shown]
    return "\n\n".join(lines)


def figure(folder: Path, name: str, page: Path) -> str:
    """A figure, copied beside the others of the page."""
    images = page.parents[1] / "images" / page.stem
    images.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "figures" / name, images / f"{folder.name}-{name}")
    return f"![{folder.name}: {name.partition('.')[0]}](../images/{page.stem}/{folder.name}-{name})"


def markdown(table: Table) -> str:
    """A table of the report."""

    def row(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells) + " |"

    rows = [row(table.head), "|" + "---|" * len(table.head), *map(row, table.rows)]
    return f"**{table.title}.** {table.note}\n\n" + "\n".join(rows)


if __name__ == "__main__":
    for sweep in sys.argv[2:]:
        build_report(sweep)
    main(Path(sys.argv[1]), [Path(sweep) for sweep in sys.argv[2:]])
