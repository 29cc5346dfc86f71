"""What a report says, before it is laid out: the same contents become the page, the text and the JSON."""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

from deltalab.core.errors import UserError
from deltalab.report import ablation, drift, freezing, groups, outcomes, runs, scores, steps, training
from deltalab.report.panels import Plot
from deltalab.report.values import Record, Section, Table, Tile, seeds, set_name, tuned
from deltalab.report.verdicts import Told, told


class Contents(NamedTuple):
    """A whole report."""

    title: str
    subtitle: str
    verdicts: list[Told]
    tiles: list[Tile]
    sections: list[Section]
    facts: list[Table]
    spec: str
    command: str
    source: str = "record.json"  # what it was built from

    def plots(self) -> list[Plot]:
        """All figures, in order."""
        return [plot for section in self.sections for plot in section.plots]

    def plain(self) -> dict[str, Any]:
        """JSON types; figures by the numbers that they draw."""
        return {
            "title": self.title,
            "subtitle": self.subtitle,
            "verdicts": [one.plain() for one in self.verdicts],
            "tiles": [_deep(tile) for tile in self.tiles],
            "sections": [
                {
                    "id": section.id,
                    "name": section.name,
                    "tables": [_deep(table) for table in section.tables],
                    "figures": [_figure(plot) for plot in section.plots],
                }
                for section in self.sections
            ],
            "facts": [_deep(table) for table in self.facts],
            "spec": yaml.safe_load(self.spec),
            "command": self.command,
        }


def _figure(plot: Plot) -> dict[str, Any]:
    panels = [{"kind": type(panel).__name__, **_deep(panel)} for panel in plot.panels]
    return {**_deep(plot), "panels": panels}


def _deep(value: Any) -> Any:
    """NamedTuples to dicts, all the way down; what is no number, or without end, to null."""
    if hasattr(value, "_asdict"):
        return {key: _deep(item) for key, item in value._asdict().items()}
    if isinstance(value, (list, tuple)):
        return [_deep(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return json.loads(json.dumps(value, default=float))


def contents(record: Record) -> Contents:
    """The contents of a record's report.

    Raises: UserError for a kind of record that has no report, or a record that lacks what its kind has.
    """
    kind = record.get("kind")
    if kind not in KINDS:
        raise UserError(
            f"there is no report for a record of kind {kind!r}.", found=f"kinds with a report: {', '.join(KINDS)}"
        )
    try:
        return KINDS[kind](record)
    except (KeyError, IndexError, TypeError, StopIteration) as error:
        raise UserError(
            "the record is incomplete.",
            found=f"{type(error).__name__}: {error}",
            next="run the study again in a new folder",
        ) from error


def _drift(record: Record) -> Contents:
    parts = (outcomes, steps, drift, ablation, freezing, groups, runs)
    return _study(record, "Drift", outcomes.tiles(record), [part.section(record) for part in parts])


def _score_dynamics(record: Record) -> Contents:
    parts = (scores, outcomes, steps, freezing, groups, runs)
    tiles = scores.tiles(record) + outcomes.tiles(record)
    return _study(record, "Score dynamics", tiles, [part.section(record) for part in parts])


def _study(record: Record, what: str, tiles: list[Tile], sections: list[Section | None]) -> Contents:
    """What the reports of studies share."""
    first = next(iter(tuned(record).values()))["training"]
    numbered = f"seed {record['seeds'][0]}" if seeds(record) == 1 else f"seeds {', '.join(map(str, record['seeds']))}"
    subtitle = (
        f"{record['model']['parameters']:,} parameters · {first['trained']:,} trained, {first['steps']} steps · {numbered} · "
        f"{sum(record['stages'].values()):.0f} s on {record['machine']['cpus']} CPUs · {record['written'][:10]}"
    )
    return Contents(
        f"{what} of {_name(record['model']['name'])}",
        subtitle,
        told(record),
        tiles,
        [section for section in sections if section],
        _facts(record),
        _yaml(record),
        f"deltalab study {record['kind']} spec.yaml",
    )


def _train(record: Record) -> Contents:
    sections = [Section("training", "Training", training.plots(record), training.tables(record))]
    model = str(record["spec"].get("model", "a model"))
    subtitle = f"seed {record['spec'].get('seed', 0)} · {record['machine']['cpus']} CPUs · {record['written'][:10]}"
    return Contents(
        f"Training of {_name(model)}",
        subtitle,
        [],
        training.tiles(record),
        sections,
        _facts(record),
        _yaml(record),
        "deltalab train spec.yaml",
    )


KINDS: dict[str, Callable[[Record], Contents]] = {
    "drift": _drift,
    "score-dynamics": _score_dynamics,
    "train": _train,
}
"""Kind of a record → its contents."""


def _name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


DATA = {
    "safety": "scored for safety", "utility": "scored for utility", "tune": "tuned on", "select": "scored to select",
    "measure": "scored to measure",
}  # fmt: skip
"""Data sets of a study in words."""


def _facts(record: Record) -> list[Table]:
    machine = record["machine"]
    rows = [(name, str(version)) for name, version in record["versions"].items()]
    rows += [
        ("source", str(record.get("git") or "installed package")),
        ("machine", f"{machine['system']} {machine['arch']}, {machine['cpus']} CPUs"),
        ("spec digest", record["digest"]),
        ("written", record["written"]),
    ]
    if "digest" in record.get("model", {}):
        rows.append(("model digest", record["model"]["digest"]))
    return [Table("versions", "Versions", ("", ""), rows), *_data(record), *_disk(record)]


def _data(record: Record) -> list[Table]:
    data = record.get("data")
    if not data:
        return []
    if record["kind"] == "train":
        rows = [("training", data["digest"]), ("held out", data["held_out_digest"])]
        return [Table("data", "Data", ("", "digest"), rows)]
    named = [(DATA.get(name, set_name(name)), one) for name, one in data.items()]
    return [Table("data", "Data", ("", "samples", "tokens", "digest"), [_data_row(*pair) for pair in named])]


def _data_row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    tokens = f"{one['tokens']:,}" if "tokens" in one else "—"
    return name, f"{one['n']:,}", tokens, str(one["digest"])


def _disk(record: Record) -> list[Table]:
    sizes = record.get("sizes") if record["kind"] != "train" else None
    rows = [(name, f"{size / 1e6:.2f}") for name, size in (sizes or {}).items()]
    return [Table("sizes", "Sizes on disk", ("", "MB"), rows, folded=len(rows) > 10)] if rows else []


def _yaml(record: Record) -> str:
    spec = {key: value for key, value in record["spec"].items() if key != "output"}
    return str(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True, width=88))
