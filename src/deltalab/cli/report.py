"""`deltalab report FOLDER`: the report of a record or a sweep, built again."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="a study's, a training's or a sweep's folder, or a record.json")],
    output: Annotated[Path | None, typer.Option(help="where to write; beside the record if not given")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="of a sweep: the group that the others are tested against")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(help="of a sweep: what groups are ranked by; the first score if not given")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
) -> None:
    """Build the report of a record or a sweep again: report.html, report.txt, report.json and figures/ (PNG, SVG, PDF)."""
    from deltalab.report import build_report

    report = build_report(folder, output, baseline=baseline, measure=measure)
    if report.verdict:
        print(report.verdict + "\n")
    print(
        f"report: {report.page}\ntext:   {report.text}\njson:   {report.json}\nfigures: {len(report.figures)} files in {report.page.parent / 'figures'}"
    )
    if open_page:
        typer.launch(str(report.page))
