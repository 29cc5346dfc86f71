"""The report of a sweep: which group is best and how sure that is, what each costs, how it trained, what it changed."""

import re
from pathlib import Path

import yaml

from deltalab.report.contents import Contents
from deltalab.report.sweeps import costs, curves, inside, measures, trials
from deltalab.report.sweeps.gather import Gathered, gather
from deltalab.report.values import Section, Table, Tile
from deltalab.report.verdicts import Told


def sweep_contents(folder: str | Path, baseline: str | None = None, measure: str | None = None) -> Contents:
    """The contents of the report of the sweep in a folder.

    baseline: the group that others are tested against. measure: what they are ranked by; the first score if not given.
    Raises: UserError if there is no sweep, nothing is finished, or for a group or a measure that there is not.
    """
    found = gather(folder, baseline, measure)
    return Contents(
        f"Sweep {found.name}",
        _subtitle(found),
        _verdicts(found),
        [*(tile for part in found.parts for tile in _tiles(part)), *trials.tiles(found)],
        [*(section for part in found.parts for section in _sections(part)), trials.section(found)],
        _facts(found),
        _spec(found),
        "deltalab sweep spec.yaml",
        "the records of its trials",
    )


def _verdicts(found: Gathered) -> list[Told]:
    """What is best comes first, but for what a reader has to know before."""
    told, proofs = trials.verdict(found), trials.proofs(found)
    first = [one for one in (told, proofs) if one.tone in ("open", "bad")]
    best = [one for part in found.parts for one in measures.verdicts(part)]
    return [*first, *best, *(one for one in (told, proofs) if one not in first)]


def _sections(part: Gathered) -> list[Section]:
    """What is said of a part; where a sweep has several, each has its own names."""
    made = [section(part) for section in (measures.section, costs.section, curves.section, inside.section)]
    there = [section for section in made if section]
    return [_called(section, part.task) for section in there] if part.task else there


def _called(section: Section, task: str) -> Section:
    tag = re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")
    plots = [
        plot._replace(name=f"{plot.name}-{tag}", panels=[panel._replace(name=f"{panel.name}-{tag}") for panel in plot.panels])
        for plot in section.plots
    ]  # fmt: skip
    tables = [table._replace(name=f"{table.name}-{tag}") for table in section.tables]
    return Section(f"{section.id}-{tag}", f"{section.name}: {task}", plots, tables)


def _tiles(part: Gathered) -> list[Tile]:
    tiles = [*measures.tiles(part), *costs.tiles(part)]
    return [tile if part.task in tile.label else tile._replace(label=f"{tile.label}, {part.task}") for tile in tiles]


def _subtitle(found: Gathered) -> str:
    seeds = found.spec.seeds
    numbered = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    model = ", ".join(dict.fromkeys(str(one.record["spec"]["model"]).rstrip("/").rpartition("/")[2] for one in found.done))  # fmt: skip
    written = max(str(one.record["written"]) for one in found.done)
    left = len(found.trials) - found.counts["finished"] - found.counts["failed"]
    unfinished = [f"unfinished: {left} trial{'s' * (left > 1)} to go"] if left else []
    groups = len({trial.group for trial in found.trials})
    return " · ".join([*unfinished, model, f"{groups} group{'s' * (groups != 1)}", numbered, f"{len(found.trials)} trials", written[:10]])  # fmt: skip


def _spec(found: Gathered) -> str:
    """The sweep's spec without what is as it is by default."""
    spec = {key: value for key, value in found.spec.model_dump(mode="json", exclude_defaults=True).items() if key != "output"}  # fmt: skip
    return str(yaml.safe_dump({**spec, "seeds": list(found.spec.seeds)}, sort_keys=False, allow_unicode=True, width=88))


def _facts(found: Gathered) -> list[Table]:
    """Versions and machines; where trials ran on several, all of them."""
    records = [one.record for one in found.done]
    names = dict.fromkeys(name for record in records for name in record["versions"])
    rows = [(name, _all(record["versions"].get(name) for record in records)) for name in names]
    machines = [f"{m['system']} {m['arch']}, {m['cpus']} CPUs" for m in (record["machine"] for record in records)]
    rows += [
        ("source", _all(record.get("git") or "installed package" for record in records)), ("machine", _all(machines)),
        ("device", _all(record.get("device") for record in records)), ("threads", _all(record.get("threads") for record in records)),
        ("base, digest", _all(record.get("base") for record in records)), ("sweep's digest", found.spec.digest()),
    ]  # fmt: skip
    return [Table("versions", "Versions", ("", ""), rows)]


def _all(values: object) -> str:
    return " / ".join(dict.fromkeys("—" if value is None else str(value) for value in values))  # type: ignore[attr-defined]
