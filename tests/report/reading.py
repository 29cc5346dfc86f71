"""Finding one's way in a report's contents."""

from deltalab.report import contents


def figures_of(record) -> dict:
    return {plot.name: plot for plot in contents.contents(record).plots()}


def panels_of(record) -> dict:
    return {panel.name: panel for plot in contents.contents(record).plots() for panel in plot.panels}


def tables_of(record) -> dict:
    return {t.name: t for section in contents.contents(record).sections for t in section.tables}


def verdict(record, name) -> dict:
    return next(v for v in record["verdicts"] if v["name"] == name)["numbers"]
