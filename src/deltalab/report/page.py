"""The report as one self-contained HTML page: inline style, inline SVG, no script, nothing asked of a network."""

from importlib.resources import files
from typing import Any

import jinja2

from deltalab.report.contents import Contents
from deltalab.report.figures import inline
from deltalab.report.panels import Plot
from deltalab.report.values import Table
from deltalab.report.verdicts import Told, apart, matrix

FINE = " Adjusted by Holm"
"""Where the small print of a verdict begins."""


def page(contents: Contents, version: str) -> str:
    """The page's HTML."""
    here = files("deltalab.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(here.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    counter = iter(range(10_000))
    parts = [
        {
            "id": section.id,
            "name": section.name,
            "plots": [_figure(plot, counter) for plot in section.plots],
            "tables": [_aligned(table) for table in section.tables],
        }
        for section in contents.sections
    ]
    alone, tabled = apart(contents.verdicts)
    sections = [*((section.id, section.name) for section in contents.sections), ("reproduce", "Spec and versions")]
    return template.render(
        title=contents.title,
        subtitle=contents.subtitle,
        style=here.joinpath("style.css").read_text(encoding="utf-8"),
        verdicts=[_verdict(one, contents) for one in alone],
        tabled=[_verdict(one, contents) for one in tabled],
        outcomes=matrix(tabled),
        tiles=contents.tiles,
        sections=sections,
        parts=parts,
        facts=[_aligned(table) for table in contents.facts],
        spec=contents.spec,
        command=contents.command,
        version=version,
        source=contents.source,
    )


def _figure(plot: Plot, counter: Any) -> dict[str, Any]:
    svgs = [inline(panel, next(counter)) for panel in plot.panels]
    pairs = plot.columns == 2 and len(svgs) > 2
    return {
        "title": plot.title,
        "caption": plot.caption,
        "svgs": svgs,
        "width": 3 if pairs else min(3, len(svgs), plot.columns),
        "pairs": pairs,
    }


def _verdict(one: Told, contents: Contents) -> dict[str, Any]:
    """A verdict with its sentence apart from its small print, which must not break before a per cent sign."""
    said, _, fine = one.sentence.replace(" %", "\u00a0%").partition(FINE)
    link = any(section.id == one.section for section in contents.sections)
    return {
        "title": one.title,
        "outcome": one.outcome,
        "tone": one.tone,
        "section": one.section,
        "link": link,
        "said": said,
        "fine": (FINE + fine).strip() if fine else "",
    }


def _aligned(table: Table) -> dict[str, Any]:
    """The table with, for each column, whether it holds words (left) or numbers (right)."""
    words = [any(row[i][:1].isalpha() for row in table.rows) for i in range(len(table.head))]
    return {**table._asdict(), "words": words}
