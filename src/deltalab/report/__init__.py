"""Floor 5: the report of a record, or of a sweep. It reads the folder and nothing else, so it can be built again at any time."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deltalab import __version__
from deltalab.core.errors import UserError
from deltalab.core.files import write_json, write_text
from deltalab.core.records import read_record

if TYPE_CHECKING:
    from deltalab.report.contents import Contents

Curves = dict[str, list[dict[str, Any]]]


class Report(NamedTuple):
    """Where the report's files lie. verdict: what it found, in words."""

    page: Path
    text: Path
    json: Path
    figures: list[Path]
    verdict: str


def build_report(
    record: str | Path, output: str | Path | None = None, *, baseline: str | None = None, measure: str | None = None
) -> Report:  # fmt: skip
    """Build the page, the text, the JSON and the figures of the record, or the sweep, in a folder.

    record: the folder, or its `record.json`. output: where to write, by default beside the record. Of a sweep, baseline: the
    group that the others are tested against; measure: what they are ranked by, the first score if not given.
    Raises: UserError if there is no record, or one that has no report; for a sweep without a finished trial.
    """
    from deltalab.report.figures import save
    from deltalab.report.page import page
    from deltalab.report.text import text, verdicts

    folder = Path(record).parent if Path(record).suffix == ".json" else Path(record)
    found = _contents(folder, baseline, measure)
    output = Path(output) if output is not None else folder
    figures = [path for plot in found.plots() for path in save(plot, output / "figures")]
    write_text(output / "report.txt", text(found))
    write_json(output / "report.json", found.plain())
    write_text(output / "report.html", page(found, __version__))
    return Report(output / "report.html", output / "report.txt", output / "report.json", figures, verdicts(found))


def _contents(folder: Path, baseline: str | None, measure: str | None) -> "Contents":
    from deltalab.report.contents import contents
    from deltalab.report.sweeps import sweep_contents

    if (folder / "sweep.json").is_file():
        return sweep_contents(folder, baseline, measure)
    if baseline is not None or measure is not None:
        raise UserError(
            f"'{folder}' is no sweep, and only a sweep has a baseline or a measure to rank by.",
            next="leave --baseline and --measure out",
        )
    return contents(read_record(folder) | {"curves": curves_of(folder)})


def curves_of(folder: Path) -> Curves:
    """The curves beside a record, name → rows; none is fine."""
    files = sorted((folder / "curves").glob("*.jsonl"))
    return {path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in files}
