"""Floor 5: the report of a record. It reads the record's folder and nothing else, so it can be built again at any time."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from deltalab import __version__
from deltalab.core.files import write_json, write_text
from deltalab.core.records import read_record

Curves = dict[str, list[dict[str, Any]]]


class Report(NamedTuple):
    """Where the report's files lie. verdict: what it found, in words."""

    page: Path
    text: Path
    json: Path
    figures: list[Path]
    verdict: str


def build_report(record: str | Path, output: str | Path | None = None) -> Report:
    """Build the page, the text, the JSON and the figures of the record in a folder.

    record: the folder, or its `record.json`. output: where to write, by default beside the record.
    Raises: UserError if there is no record, or one that has no report.
    """
    from deltalab.report.contents import contents
    from deltalab.report.figures import save
    from deltalab.report.page import page
    from deltalab.report.text import text, verdicts

    folder = Path(record).parent if Path(record).suffix == ".json" else Path(record)
    found = contents(read_record(record) | {"curves": _curves(folder)})
    output = Path(output) if output is not None else folder
    figures = [path for plot in found.plots() for path in save(plot, output / "figures")]
    write_text(output / "report.txt", text(found))
    write_json(output / "report.json", found.plain())
    write_text(output / "report.html", page(found, __version__))
    return Report(output / "report.html", output / "report.txt", output / "report.json", figures, verdicts(found))


def _curves(folder: Path) -> Curves:
    """The curves beside a record, name → rows; none is fine."""
    files = sorted((folder / "curves").glob("*.jsonl"))
    return {path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in files}
