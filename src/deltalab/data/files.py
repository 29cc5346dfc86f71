"""Rows of a data set, from a file, a folder of files, or the hub; a fault names its file and line."""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltalab.core.errors import UserError, nearest

SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".txt")
BUNDLED = Path(__file__).parent / "bundled"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Row:
    """One row: its columns, and where it stands, for messages."""

    values: dict[str, Any]
    where: str

    def text(self, column: str) -> str:
        """The text in `column`.

        Raises: UserError if it is missing or no text.
        """
        if column not in self.values:
            raise UserError(f"{self.where}: column '{column}' is missing.", found=f"columns: {', '.join(self.values)}",
                            nearest=nearest(column, self.values))  # fmt: skip
        value = self.values[column]
        if not isinstance(value, str):
            raise UserError(
                f"{self.where}: column '{column}' holds no text.", found=f"{type(value).__name__} {str(value)[:60]}"
            )
        return value


def read_rows(path: str, *, split: str = "train", names: tuple[str, ...] = ()) -> list[Row]:
    """The rows at `path`: a .json, .jsonl, .tsv or .csv file, a folder, `bundled:NAME`, or a hub name `owner/name[:subset]`.

    In a folder: the file named after `split`, or the first of `names` that is there. On the hub: that split.
    Raises: UserError, naming file and line, if it is missing, empty, cut off or malformed.
    """
    place = bundled(path) or Path(path).expanduser()
    if place.is_dir():
        place = _in_folder(place, (*names, split))
    if place.is_file():
        rows = list(_parse(place))
    elif place.suffix in SUFFIXES or not HUB_NAME.fullmatch(path) or place.parent.is_dir():
        folder = place.parent if place.parent.is_dir() else Path()
        listed = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        there = [name for name in listed if Path(name).suffix in SUFFIXES] or [
            name for name in listed if (folder / name).is_dir()
        ]
        raise UserError(f"data file '{path}' does not exist.", found=f"in {folder.resolve()}: {', '.join(there[:12]) or 'nothing readable'}",
                        nearest=nearest(place.name, there))  # fmt: skip
    else:
        rows = _from_hub(path, split)
    if not rows:
        raise UserError(f"data file '{place}' is empty.", found="no row in it", next="check the path")
    return rows


def bundled(path: str) -> Path | None:
    """The folder of data that comes with the package, of `bundled:NAME`; None for any other path. Raises: UserError for an unknown name."""
    if not path.startswith("bundled:"):
        return None
    there = sorted(place.name for place in BUNDLED.iterdir() if place.is_dir())
    name = path.removeprefix("bundled:")
    if name not in there:
        raise UserError(
            f"no data set '{name}' comes with the package.", found=", ".join(there), nearest=nearest(name, there)
        )
    return BUNDLED / name


def read_text(path: str) -> str:
    """A UTF-8 text file.

    Raises: UserError if it is missing, empty, or no text.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        there = sorted(p.name for p in place.parent.glob("*.txt")) if place.parent.is_dir() else []
        raise UserError(f"text file '{path}' does not exist.", found=f"in {place.parent.resolve()}: {', '.join(there[:12]) or 'no .txt file'}",
                        nearest=nearest(place.name, there))  # fmt: skip
    text = _decoded(place)
    if not text.strip():
        raise UserError(f"text file '{path}' is empty.")
    return text


def _in_folder(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        for suffix in SUFFIXES:
            if (folder / (name + suffix)).is_file():
                return folder / (name + suffix)
    there = sorted(p.name for p in folder.iterdir())
    raise UserError(f"folder '{folder}' has no file for '{names[-1]}'.", found=", ".join(there[:12]) or "an empty folder",
                    nearest=nearest(names[-1], there), next=f"name the file itself, or call it {names[-1]}.jsonl (.json, .tsv, .csv)")  # fmt: skip


def _parse(path: Path) -> Iterator[Row]:
    if path.suffix in (".tsv", ".csv"):
        yield from _parse_table(path, "\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".jsonl":
        for number, line in enumerate(_decoded(path).splitlines(), 1):
            if line.strip():
                yield _row(_json(line, f"{path}, line {number}"), f"{path}, line {number}")
    else:
        values = _json(_decoded(path), str(path))
        if not isinstance(values, list):
            raise UserError(
                f"{path}: the file holds no list of rows.",
                found=type(values).__name__,
                next="a JSON file is a list of objects; one object a line is .jsonl",
            )
        for number, value in enumerate(values, 1):
            yield _row(value, f"{path}, row {number}")


def _parse_table(path: Path, delimiter: str) -> Iterator[Row]:
    # in a .tsv of this kind a quote is a character like any other
    lines = _decoded(path).splitlines(keepends=True)
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if delimiter == "\t" else csv.reader(lines)
    header = next(reader, [])
    for cells in reader:
        where = f"{path}, line {reader.line_num}"
        if not cells:
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{where}: {len(cells)} columns where the header has {len(header)}.", found=delimiter.join(cells)[:80]
            )
        yield Row(dict(zip(header, cells, strict=True)), where)


def _row(value: Any, where: str) -> Row:
    # a bare list of messages is a conversation
    if isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row must be an object.", found=f"{type(value).__name__} {str(value)[:60]}")
    return Row(value, where)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        if not text.strip():
            return []
        raise UserError(
            f"{where}: no valid JSON.", found=str(error), next="the file may be cut off; restore it"
        ) from None


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: no UTF-8 text.", found=str(error)) from None


def _from_hub(name: str, split: str) -> list[Row]:
    """A split of a hub data set, through `datasets`."""
    import datasets

    repository, _, subset = name.partition(":")
    try:
        table = datasets.load_dataset(repository, subset or None, split=split)
    except Exception as error:  # datasets raises many kinds for one cause: it could not be had
        raise UserError(f"data set '{name}' is no local file, and the hub did not give its split '{split}'.",
                        found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                        next="check the name and the network, or give a local path") from error  # fmt: skip
    return [Row(dict(row), f"{name} {split}, row {number}") for number, row in enumerate(table, 1)]
