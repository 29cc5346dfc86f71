"""The groups of weights: where they lie, how large they came out, how far they overlap, and the scores that chose them."""

from typing import Any

from deltalab.report.panels import Grid, Line, Lines, Panel, Plot
from deltalab.report.values import GROUP_COLOURS, Record, Section, Table, capital, number, percent

CHOSEN = ("safety", "utility", "safety-only")
"""Groups that scores chose, whose overlaps are told matrix by matrix."""
FACTS = {
    "score": "score", "positions": "positions", "samples": "samples", "tokens": "counted tokens", "skipped": "samples without a position",
    "reduction": "reduction", "dtype": "stored as", "data": "digest of the data", "model": "digest of the model",
    "template": "digest of the template",
}  # fmt: skip
SCORED = {"safety": "safety", "utility": "utility", "select": "to select", "measure": "to measure"}


def section(record: Record) -> Section:
    """Figures and tables of the groups."""
    tables = [_sizes(record), *_overlap_tables(record), *_scores(record)]
    panels = [*_kinds(record), *_overlaps(record)]
    plot = Plot(
        "groups",
        "Where the groups are",
        "Which matrices the groups fall into, and how far they overlap." + _ceilings(record),
        panels,
    )
    return Section("groups", "The groups of weights", [plot] if panels else [], tables)


def _ceilings(record: Record) -> str:
    if not record["overlaps"]:
        return ""
    return " Independent: the overlap of independent groups of these sizes. Halves: of the same group made from two halves of its samples."


def _kinds(record: Record) -> list[Panel]:
    groups = {name: group for name, group in record["groups"].items() if group.get("kinds") and name != "complement"}
    if not groups:
        return []
    kinds = list(dict.fromkeys(kind for group in groups.values() for kind in group["kinds"]))
    values = [[group["kinds"].get(kind) for kind in kinds] for group in groups.values()]
    top = max((value for row in values for value in row if value is not None), default=1.0) or 1.0
    short = [kind.removesuffix("_proj") for kind in kinds]
    return [Grid("groups-kinds", "Share of each kind of matrix, %", list(groups), short, values, top)]


def _overlaps(record: Record) -> list[Panel]:
    """Every pair, and by layer the pair of the two scores."""
    if not record["overlaps"]:
        return []
    names = list(dict.fromkeys(name for one in record["overlaps"] for name in (one["a"], one["b"])))
    pairs = {frozenset((one["a"], one["b"])): one["jaccard"] for one in record["overlaps"]}
    table = [[pairs.get(frozenset((a, b))) if a != b else None for b in names] for a in names]
    top = max((value for value in pairs.values() if value), default=1.0)
    panels: list[Panel] = [Grid("groups-overlap", "Overlap of two groups, Jaccard %", names, names, table, top)]
    return panels + [_by_layer(one) for one in record["overlaps"][:1] if _layers(one)]


def _layers(one: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in one.get("table", ()) if row["level"] == "layer" and row["name"].isdigit()]


def _by_layer(one: dict[str, Any]) -> Lines:
    rows = _layers(one)
    shown = {
        "jaccard": ("overlap", "orange"), "floor": ("independent", "grey"),
        "ceiling_a": (f"halves, {one['a']}", GROUP_COLOURS.get(one["a"], "green")),
        "ceiling_b": (f"halves, {one['b']}", GROUP_COLOURS.get(one["b"], "green")),
    }  # fmt: skip
    lines = [
        Line(label, [100 * row[key] for row in rows], colour)
        for key, (label, colour) in shown.items() if all(row[key] is not None for row in rows)
    ]  # fmt: skip
    return Lines(
        "overlap-layers",
        capital(f"{one['a']} and {one['b']}, by layer"),
        [int(row["name"]) for row in rows],
        "layer",
        "Jaccard, %",
        lines,
    )


def _sizes(record: Record) -> Table:
    rows = []
    for name, group in record["groups"].items():
        shares = list(group.get("per_matrix", {}).values())
        within = f"{percent(min(shares), 2)} … {percent(max(shares), 2)}" if shares else "—"
        label = group["label"] if name != "matched" else "matched random"
        rows.append(
            (label, percent(_asked(record, name), 2), percent(group["fraction"], 2), within, f"{group['entries']:,}")
        )
    head = ("group", "asked for", "got", "least and most of a matrix", "entries")
    return Table("groups", "Sizes", head, rows, "Shares of the scored weights.")


def _asked(record: Record, name: str) -> float | None:
    """The share that the spec asks for; groups that are made from others have none of their own."""
    spec = record["spec"].get("groups") or record["spec"].get("group") or {}
    share: float | None = spec.get("q") if name in ("safety", "utility") else None
    return share


def _overlap_tables(record: Record) -> list[Table]:
    if not record["overlaps"]:
        return []
    rows = [(f"{one['a']} and {one['b']}", *_three(one["jaccard"], one["independent"], *one.get("ceilings", (None, None))))
            for one in record["overlaps"]]  # fmt: skip
    head = ("", "Jaccard", "independent", "halves of the first", "halves of the second")
    parts = [
        (f"{one['a']} and {one['b']}: {_part(row)}", percent(row["a"], 2), percent(row["b"], 2),
         *_three(row["jaccard"], row["floor"], row["ceiling_a"], row["ceiling_b"]))
        for one in record["overlaps"] if one["a"] in CHOSEN and one["b"] in CHOSEN
        for row in one.get("table", ())
    ]  # fmt: skip
    out = [
        Table(
            "overlaps",
            "Overlaps",
            head,
            rows,
            "Independent groups of these sizes are the floor, halves of one group's samples the ceiling.",
        )
    ]
    if parts:
        shares = ("", "share of the first", "share of the second")
        whole = (*shares, *head[1:])
        out.append(Table("overlap-parts", "Overlaps by layer and by kind of matrix", whole, parts, folded=True))
    return out


def _part(row: dict[str, Any]) -> str:
    return f"layer {row['name']}" if row["level"] == "layer" else str(row["name"])


def _three(*values: float | None) -> tuple[str, ...]:
    return tuple("—" if value is None else f"{value:.3f}" for value in values)


def _scores(record: Record) -> list[Table]:
    """What the scores were computed on, and how."""
    scores = record.get("scores")
    if not scores:
        return []
    keys = [key for key in FACTS if any(one.get(key) is not None for one in scores.values())]
    rows = [(FACTS[key], *(_fact(one.get(key)) for one in scores.values())) for key in keys]
    return [Table("scores-made", "How the scores were made", ("", *(SCORED.get(name, name) for name in scores)), rows)]


def _fact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "—"
    return f"{value:,}" if isinstance(value, int) else number(value) if isinstance(value, float) else str(value)
