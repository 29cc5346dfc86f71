"""`deltalab groups make|combine|compare|describe`: groups of weights as folders."""

from pathlib import Path
from typing import Annotated

import typer

UNIT = "what the group is made of: entry, row, column, mlp-unit or head"


def make(
    output: Annotated[Path, typer.Argument(help="folder of the new group")],
    scores: Annotated[Path, typer.Argument(help="folder of scores, made by deltalab score")],
    q: Annotated[float, typer.Option(help="share with the highest scores: 0.05 is five per cent")] = 0.05,
    per: Annotated[
        str | None, typer.Option(help="of each row, matrix, or global; row for entries, else matrix")
    ] = None,
    unit: Annotated[str, typer.Option(help=UNIT)] = "entry",
    minus: Annotated[Path | None, typer.Option(help="a second folder of scores, whose top is taken away")] = None,
    p: Annotated[float, typer.Option(help="the share of it with the highest scores")] = 0.02,
    model: Annotated[str, typer.Option(help="the scored model, for units and for scores rebuilt from weights")] = "",
    name: Annotated[str | None, typer.Option(help="the group's name; the folder's if not given")] = None,
) -> None:
    """Choose the entries or units with the highest scores, all of them or without those of a second score."""
    from typing import cast, get_args

    from deltalab.core.errors import UserError, nearest
    from deltalab.models.load import load
    from deltalab.safety.groups import Per, difference, top
    from deltalab.safety.scores import Scores
    from deltalab.safety.units import units_of

    if per is not None and per not in get_args(Per):
        raise UserError(f"--per '{per}' is unknown.", nearest=nearest(per, get_args(Per)), next="row, matrix or global")
    if unit != "entry" and not model:
        raise UserError(f"{unit} units are known from the model.", next="give --model")
    loaded = load(model)[0] if model else None
    units = units_of(loaded, unit) if loaded is not None else None
    called, chosen, within = name or output.name, Scores.load(scores, loaded), cast(Per | None, per)
    if minus is None:
        group = top(chosen, q, within, called, units)
    else:
        group = difference(chosen, Scores.load(minus, loaded), p, q, within, called, units)
    group.save(output)
    print(group.table())
    if units is not None and units.note:
        print(units.note)
    print(f"written: {output}")


def combine(
    how: Annotated[str, typer.Argument(help="union, intersection, minus or complement")],
    output: Annotated[Path, typer.Argument(help="folder of the new group")],
    groups: Annotated[list[Path], typer.Argument(help="folders of groups; two for minus, one for complement")],
    name: Annotated[str | None, typer.Option(help="the group's name; the folder's if not given")] = None,
) -> None:
    """Join, intersect or subtract groups, or take all entries that are not in one."""
    from deltalab.core.errors import UserError, nearest
    from deltalab.safety.groups import Group, complement, intersection, minus, union

    most = {"union": None, "intersection": None, "minus": 2, "complement": 1}
    if how not in most:
        raise UserError(f"groups cannot be combined by '{how}'.", nearest=nearest(how, most), next=", ".join(most))
    if most[how] not in (None, len(groups)):
        raise UserError(f"{how} takes {most[how]} group{'s' if most[how] == 2 else ''}.", found=f"{len(groups)} given")
    given, called = [Group.load(folder) for folder in groups], name or output.name
    match how:
        case "union":
            group = union(given, called)
        case "intersection":
            group = intersection(given, called)
        case "minus":
            group = minus(given[0], given[1], called)
        case _:
            group = complement(given[0], called)
    group.save(output)
    print(f"{group.table()}\nwritten: {output}")


def compare(
    a: Annotated[Path, typer.Argument(help="folder of a group")],
    b: Annotated[Path, typer.Argument(help="folder of another")],
    halves_a: Annotated[
        tuple[Path, Path] | None, typer.Option(help="two groups made like the first from halves of its data")
    ] = None,
    halves_b: Annotated[tuple[Path, Path] | None, typer.Option(help="the same for the second")] = None,
) -> None:
    """Show how much two groups overlap, by layer and kind of matrix, beside what independent groups would."""
    from deltalab.safety.groups import Group
    from deltalab.safety.overlap import overlap

    def both(folders: tuple[Path, Path] | None) -> tuple[Group, Group] | None:
        return None if not folders else (Group.load(folders[0]), Group.load(folders[1]))

    print(overlap(Group.load(a), Group.load(b), both(halves_a), both(halves_b)))


def describe(
    groups: Annotated[list[Path], typer.Argument(help="folders of groups")],
    every: Annotated[bool, typer.Option("--every", help="every matrix, not layers and kinds")] = False,
) -> None:
    """Show how large groups are, asked and actual, by layer and kind of matrix, and how they were made."""
    from deltalab.safety.groups import Group

    for folder in groups:
        group = Group.load(folder)
        print(group if every else group.table())


command = {"make": make, "combine": combine, "compare": compare, "describe": describe}
