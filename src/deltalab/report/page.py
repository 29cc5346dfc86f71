"""The report as one self-contained HTML page: inline style, inline SVG, no script, nothing asked of a network."""

from importlib.resources import files
from typing import Any

import jinja2

from deltalab.report.contents import TONES, Contents
from deltalab.report.figures import inline
from deltalab.report.values import Table


def page(contents: Contents, version: str) -> str:
    """The page's HTML."""
    here = files("deltalab.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(here.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    counter = iter(range(10_000))
    parts = []
    for section in contents.sections:
        plots = [{"title": plot.title, "caption": plot.caption,
                  "svgs": [inline(panel, next(counter)) for panel in plot.panels]} for plot in section.plots]  # fmt: skip
        parts.append(
            {
                "id": section.id,
                "name": section.name,
                "plots": plots,
                "tables": [_aligned(table) for table in section.tables],
            }
        )
    return template.render(
        title=contents.title, subtitle=contents.subtitle, style=here.joinpath("style.css").read_text(encoding="utf-8"),
        verdicts=[{**verdict, "tone": TONES.get(verdict["outcome"], "fact")} for verdict in contents.verdicts], tiles=contents.tiles,
        sections=[*((s.id, s.name) for s in contents.sections), ("reproduce", "Spec and versions")], parts=parts, facts=[_aligned(table) for table in contents.facts],
        spec=contents.spec, command=contents.command, version=version,
    )  # fmt: skip


def _aligned(table: Table) -> dict[str, Any]:
    """The table with, for each column, whether it holds words (left) or numbers (right)."""
    words = [any(row[i][:1].isalpha() for row in table.rows) for i in range(len(table.head))]
    return {**table._asdict(), "words": words}
