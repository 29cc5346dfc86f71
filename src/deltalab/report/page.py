"""The report as one self-contained HTML page: inline style, inline SVG, no script, nothing asked of a network."""

from importlib.resources import files

import jinja2

from deltalab.report.contents import TONES, Contents
from deltalab.report.figures import inline


def page(contents: Contents, version: str) -> str:
    """The page's HTML."""
    here = files("deltalab.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(here.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    counter = iter(range(10_000))
    parts = []
    for section in contents.sections:
        plots = [{"title": plot.title, "caption": plot.caption, "least": 340 if plot.columns > 2 else 430,
                  "svgs": [inline(panel, next(counter)) for panel in plot.panels]} for plot in section.plots]  # fmt: skip
        parts.append({"id": section.id, "name": section.name, "plots": plots, "tables": section.tables})
    return template.render(
        title=contents.title, subtitle=contents.subtitle, style=here.joinpath("style.css").read_text(encoding="utf-8"),
        verdicts=[{**verdict, "tone": TONES.get(verdict["outcome"], "fact")} for verdict in contents.verdicts], tiles=contents.tiles,
        sections=[*((s.id, s.name) for s in contents.sections), ("reproduce", "Spec and versions")], parts=parts, facts=contents.facts,
        spec=contents.spec, command=contents.command, version=version,
    )  # fmt: skip
