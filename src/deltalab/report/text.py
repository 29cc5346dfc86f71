"""The report as plain text: the same verdicts, figures in words, and tables."""

import textwrap

from deltalab.report.contents import Contents
from deltalab.report.panels import describe
from deltalab.report.values import Table

WIDTH = 100


def text(contents: Contents) -> str:
    """The whole report, lines of at most 100 characters but for wide tables."""
    out = [contents.title, "=" * len(contents.title), contents.subtitle, "", verdicts(contents)]
    out += ["", *(f"{tile.label}: {tile.value} ({tile.note})" for tile in contents.tiles)]
    for section in contents.sections:
        out += ["", "", section.name, "-" * len(section.name)]
        for plot in section.plots:
            out += ["", f"{plot.title}. {plot.caption}".replace("\n", " ")]
            out += [
                textwrap.fill(describe(panel), WIDTH, initial_indent="  ", subsequent_indent="  ")
                for panel in plot.panels
            ]
        out += [table(t) for t in section.tables]
    out += ["", "", "Spec", "----", contents.spec.rstrip(), "", f"run it again: {contents.command}"]
    out += [table(t) for t in contents.facts]
    return "\n".join(out) + "\n"


def verdicts(contents: Contents) -> str:
    """Each verdict as a paragraph: its name and outcome, then the sentence."""
    return "\n".join(
        textwrap.fill(f"* {one.title}: {one.outcome}. {one.sentence}", WIDTH, subsequent_indent="  ")
        for one in contents.verdicts
    )


def table(t: Table) -> str:
    """A table in columns: the first to the left, the others to the right."""
    rows = [t.head, *t.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(t.head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "  ".join("-" * w for w in widths)
    body = [f"\n{t.title}", lines[0], rule, *lines[1:]] if any(t.head) else [f"\n{t.title}", *lines]
    return "\n".join([*body, *([t.note] if t.note else [])])
