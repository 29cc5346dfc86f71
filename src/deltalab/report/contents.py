"""What a report says, before it is laid out: the same contents become the page, the text and the JSON."""

import json
from typing import Any, NamedTuple

import yaml

from deltalab.core.errors import UserError
from deltalab.report import plots, training, values
from deltalab.report.panels import Plot
from deltalab.report.values import Record, Table, Tile

BAD = ("fell", "drifts more", "no better than random", "broken", "more", "harms")
GOOD = ("kept", "protects", "fewer", "rose")  # "protects a little" is a plain fact
OPEN = ("undecided", "measures disagree")
TONES = {**dict.fromkeys(BAD, "bad"), **dict.fromkeys(GOOD, "good"), **dict.fromkeys(OPEN, "open")}
"""How the outcome of a verdict is coloured; one that is not here is a plain fact."""


class Section(NamedTuple):
    """A heading with its figures and tables."""

    id: str
    name: str
    plots: list[Plot]
    tables: list[Table]


class Contents(NamedTuple):
    """A whole report. `verdicts` are the record's: name, outcome, sentence, numbers."""

    title: str
    subtitle: str
    verdicts: list[dict[str, Any]]
    tiles: list[Tile]
    sections: list[Section]
    facts: list[Table]
    spec: str
    command: str

    def plots(self) -> list[Plot]:
        """All figures, in order."""
        return [plot for section in self.sections for plot in section.plots]

    def plain(self) -> dict[str, Any]:
        """JSON types; figures by the numbers that they draw."""
        return {
            "title": self.title, "subtitle": self.subtitle, "verdicts": self.verdicts, "tiles": [t._asdict() for t in self.tiles],
            "sections": [{"id": s.id, "name": s.name, "tables": [t._asdict() for t in s.tables],
                          "figures": [{**p._asdict(), "panels": [{"kind": type(q).__name__, **_deep(q)} for q in p.panels]} for p in s.plots]} for s in self.sections],
            "facts": [t._asdict() for t in self.facts], "spec": yaml.safe_load(self.spec), "command": self.command,
        }  # fmt: skip


def contents(record: Record) -> Contents:
    """The contents of a record's report.

    Raises: UserError for a kind of record that has no report, or a record that lacks what its kind has.
    """
    kinds = {"drift": _drift, "train": _train}
    kind = record.get("kind")
    if kind not in kinds:
        raise UserError(
            f"there is no report for a record of kind {kind!r}.", found=f"kinds with a report: {', '.join(kinds)}"
        )
    try:
        return kinds[kind](record)
    except (KeyError, IndexError, TypeError, StopIteration) as error:
        raise UserError(
            "the record is incomplete.",
            found=f"{type(error).__name__}: {error}",
            next="run the study again in a new folder",
        ) from error


def _drift(record: Record) -> Contents:
    pictures = {plot.name: plot for plot in plots.plots(record)}
    tables = {table.name: table for table in values.tables(record)}
    sections = [
        Section(
            "outcomes",
            "Refusals and skills, before and after",
            _take(pictures, "outcomes"),
            _take(tables, "behaviour", "log-odds", "skills"),
        ),
        Section(
            "drift",
            "How far the weights moved",
            [
                plot
                for name, plot in pictures.items()
                if name.startswith("drift-") or name in ("against", "distributions")
            ],
            _take(tables, "drift"),
        ),
        Section("freezing", "What was frozen, and whether it held", [], _take(tables, "frozen")),
        Section("groups", "The groups of weights", _take(pictures, "groups"), _take(tables, "groups")),
        Section("training", "Training and times", _take(pictures, "losses", "times"), _take(tables, "training")),
    ]
    first = next(iter(values.tuned(record).values()))
    subtitle = (f"{record['model']['parameters']:,} parameters · {first['training']['trained']:,} trained, {first['training']['steps']} steps · "
                f"seed {record['seed']} · {sum(record['stages'].values()):.0f} s on {record['machine']['cpus']} CPUs · {record['written'][:10]}")  # fmt: skip
    command = "deltalab study drift spec.yaml"
    return Contents(
        f"Drift study of {record['model']['name'].rstrip('/').rpartition('/')[2]}",
        subtitle,
        record["verdicts"],
        values.tiles(record),
        sections,
        _facts(record),
        _yaml(record),
        command,
    )


def _train(record: Record) -> Contents:
    sections = [Section("training", "Training", training.plots(record), training.tables(record))]
    model = record["spec"].get("model", "a model")
    subtitle = f"seed {record['spec'].get('seed', 0)} · {record['machine']['cpus']} CPUs · {record['written'][:10]}"
    return Contents(
        f"Training of {str(model).rstrip('/').rpartition('/')[2]}",
        subtitle,
        [],
        training.tiles(record),
        sections,
        _facts(record),
        _yaml(record),
        "deltalab train spec.yaml",
    )


def _take(items: dict[str, Any], *names: str) -> list[Any]:
    return [items[name] for name in names if name in items]


def _facts(record: Record) -> list[Table]:
    machine = record["machine"]
    rows = [(name, str(version)) for name, version in record["versions"].items()]
    rows += [("source", str(record.get("git") or "installed package")), ("machine", f"{machine['system']} {machine['arch']}, {machine['cpus']} CPUs"),
             ("spec digest", record["digest"]), ("written", record["written"])]  # fmt: skip
    if "model" in record and "digest" in record["model"]:
        rows.append(("model digest", record["model"]["digest"]))
    out = [Table("versions", "Versions", ("", ""), rows)]
    if record["kind"] == "train":
        return [
            *out,
            Table(
                "data",
                "Data",
                ("", "digest"),
                [("training", record["data"]["digest"]), ("held out", record["data"]["held_out_digest"])],
            ),
        ]
    if data := record.get("data"):
        out.append(
            Table(
                "data",
                "Data",
                ("", "samples", "digest"),
                [(name, str(d["n"]), str(d["digest"])) for name, d in data.items()],
            )
        )
    if sizes := record.get("sizes"):
        out.append(
            Table("sizes", "Sizes on disk", ("", "MB"), [(name, f"{size / 1e6:.2f}") for name, size in sizes.items()])
        )
    return out


def _yaml(record: Record) -> str:
    spec = {key: value for key, value in record["spec"].items() if key != "output"}
    return str(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True, width=88))


def _deep(value: Any) -> Any:
    """NamedTuples to dicts, all the way down."""
    if hasattr(value, "_asdict"):
        return {key: _deep(item) for key, item in value._asdict().items()}
    if isinstance(value, (list, tuple)):
        return [_deep(item) for item in value]
    return json.loads(json.dumps(value, default=float))
