"""How much two groups overlap: Jaccard by layer, by kind of matrix and overall, between its floor and its ceiling.

    J = |A ∩ B| / |A ∪ B|         floor, two independent groups of these sizes:  f_a f_b / (f_a + f_b − f_a f_b)

with f the actual shares; at equal shares q the floor is (q/2) / (1 − q/2). The ceiling is the Jaccard of two groups made
alike from the two halves of one data set: what sampling alone lets two groups share. As each half holds half of the
data, groups made from all of it would agree a little better.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from deltalab.core.errors import UserError
from deltalab.deltas.select import leaf
from deltalab.safety.group import Group, layer_in


class Counts(NamedTuple):
    """entries: of the matrices; a, b: in the two groups; both: in A ∩ B. They add up over matrices."""

    entries: int
    a: int
    b: int
    both: int

    @property
    def jaccard(self) -> float | None:
        """|A ∩ B| / |A ∪ B|; None if both are empty."""
        either = self.a + self.b - self.both
        return self.both / either if either else None

    @property
    def floor(self) -> float | None:
        """The Jaccard of independent groups of these sizes; None if both are empty."""
        x, y = self.a / self.entries, self.b / self.entries
        return x * y / (x + y - x * y) if x + y else None


class Row(NamedTuple):
    """One part of a model. level: `overall`, `layer`, `kind` or `matrix`. ceiling_a, ceiling_b: None where no halves
    were given."""

    level: str
    name: str
    counts: Counts
    ceiling_a: float | None
    ceiling_b: float | None


class Overlap:
    """The overlap of groups `a` and `b`; see `overlap`."""

    def __init__(self, a: str, b: str, rows: list[Row]) -> None:
        self.a, self.b, self.rows = a, b, rows

    @property
    def jaccard(self) -> float | None:
        """Over all matrices."""
        return self.rows[0].counts.jaccard

    @property
    def floor(self) -> float | None:
        """Over all matrices."""
        return self.rows[0].counts.floor

    def table(self, level: str | None = None) -> list[dict[str, Any]]:
        """JSON rows, all or of one level: level, name, entries, share of a and b, jaccard, floor, ceiling_a, ceiling_b."""
        return [
            {
                "level": row.level,
                "name": row.name,
                "entries": row.counts.entries,
                "a": row.counts.a / row.counts.entries,
                "b": row.counts.b / row.counts.entries,
                "jaccard": row.counts.jaccard,
                "floor": row.counts.floor,
                "ceiling_a": row.ceiling_a,
                "ceiling_b": row.ceiling_b,
            }
            for row in self.rows
            if level in (None, row.level)
        ]

    def __str__(self) -> str:
        """The table without single matrices."""
        halves = [
            name for name in ("ceiling_a", "ceiling_b") if any(getattr(row, name) is not None for row in self.rows)
        ]
        names = {"ceiling_a": f"halves of {self.a}", "ceiling_b": f"halves of {self.b}"}
        heads = [self.a, self.b, "Jaccard", "floor", *(names[half] for half in halves)]
        lines = [["", *heads]]
        for row in self.table():
            if row["level"] != "matrix":
                values = [f"{100 * row['a']:.2f} %", f"{100 * row['b']:.2f} %"]
                values += [_three(row[key]) for key in ("jaccard", "floor", *halves)]
                lines.append([f"{row['level']} {row['name']}".strip(), *values])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            line[0].ljust(widths[0])
            + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
            for line in lines
        )


def overlap(
    a: Group, b: Group, halves_a: tuple[Group, Group] | None = None, halves_b: tuple[Group, Group] | None = None
) -> Overlap:
    """Jaccard of two groups over the matrices of both: overall, by layer, by kind of matrix, by matrix.

    halves_a, halves_b: groups made as `a` and as `b` from the two halves of their data, for the ceilings.
    Raises: UserError if the groups share no matrix, or matrices of one name have two shapes.
    """
    counts = _counted(a, b)
    ceilings = [None if halves is None else _levels(_counted(*halves)) for halves in (halves_a, halves_b)]
    rows = []
    for key, total in _levels(counts).items():
        ceiling = [None if table is None or key not in table else table[key].jaccard for table in ceilings]
        rows.append(Row(*key, total, *ceiling))
    return Overlap(a.name, b.name, rows)


def jaccard(a: Group, b: Group) -> float:
    """|A ∩ B| / |A ∪ B| over the matrices of both; 0 for two empty groups."""
    return overlap(a, b).jaccard or 0.0


def _counted(a: Group, b: Group) -> dict[str, Counts]:
    """Each matrix's counts: the masks are looked at once."""
    counts = {}
    for path in a:
        if path in b:
            if a.shapes[path] != b.shapes[path]:
                raise UserError(
                    f"groups '{a.name}' and '{b.name}' are of two models: '{path}' has two shapes.",
                    found=f"{a.shapes[path]} and {b.shapes[path]}",
                )
            out, in_ = a.shapes[path]
            both = int((a.mask(path) & b.mask(path)).sum())
            counts[path] = Counts(out * in_, a.counts[path], b.counts[path], both)
    if not counts:
        raise UserError(f"groups '{a.name}' and '{b.name}' share no matrix.", next="compare groups of one model")
    return counts


def _levels(counts: Mapping[str, Counts]) -> dict[tuple[str, str], Counts]:
    """(level, name) → counts added up, overall first."""
    parts: dict[tuple[str, str], list[Counts]] = defaultdict(list)
    for level, name_of in (("overall", _whole), ("layer", layer_in), ("kind", leaf), ("matrix", str)):
        for path, count in counts.items():
            parts[level, name_of(path)].append(count)
    return {key: Counts(*(sum(column) for column in zip(*part, strict=True))) for key, part in parts.items()}


def _three(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def _whole(path: str) -> str:
    return ""
