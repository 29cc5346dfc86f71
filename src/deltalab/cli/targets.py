"""`deltalab targets MODEL`: what a delta can be put on."""

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deltalab.deltas.sites import Place

ONE = {"linear": "linear", "experts": "stack of experts", "embedding": "embedding"}
MANY = {"linear": "linears", "experts": "stacks of experts", "embedding": "embeddings"}
HEADS = {**MANY, "experts": "experts, held as one parameter", "embedding": "embeddings, taken by their names"}


def command(
    model: Annotated[str, typer.Argument(help="a folder, a hub name, organism, or organism:base")],
    every: Annotated[bool, typer.Option("--every", help="every weight by its whole name, with its shape")] = False,
) -> None:
    """List the weights of a model that a delta can sit on, and what each preset selects.

    Linears, embeddings and experts by name with their counts and shapes (out × in; of experts, how many first); and the
    sub-layers of the blocks, for methods that sit on these whole.
    """
    from deltalab.core.errors import UserError
    from deltalab.deltas.select import PRESETS, leaf, select
    from deltalab.deltas.sites import places, sublayers
    from deltalab.models.load import load

    loaded, _ = load(model)
    there = places(loaded)
    if every:
        width = max(map(len, there))
        print("\n".join(f"{path:<{width}}  {_shape(path, place)}" for path, place in there.items()))
        return
    counts = Counter[str](place.kind for place in there.values())
    parts = [f"{counts[kind]} {ONE[kind] if counts[kind] == 1 else MANY[kind]}" for kind in HEADS if counts[kind]]
    print(f"{model}: {', '.join(parts)}; {sum(p.numel() for p in loaded.parameters()):,} parameters")
    for kind in [kind for kind in HEADS if counts[kind]]:
        print(f"\n{HEADS[kind]}")
        print("\n".join(_by_name({path: place for path, place in there.items() if place.kind == kind}, there)))
    whole = Counter((leaf(path), place.kind, place.width) for path, place in sublayers(loaded).items())
    if whole:
        print("\nsub-layers, taken whole by some methods")
    wide = max((len(name) for name, _, _ in whole), default=0)
    for (name, kind, width), count in whole.items():
        print(f"  {name:<{wide}}  {count:>4} × {kind}, hidden size {width}")
    print("\npresets")
    wide = max(map(len, PRESETS))
    for preset in PRESETS:
        try:
            names = Counter(leaf(name) for name in select(loaded, preset))
            print(f"  {preset:<{wide}}  {sum(names.values()):>4}: {', '.join(names)}")
        except UserError as error:
            print(f"  {preset:<{wide}}     —: {error.asked}")


def _shape(path: str, place: "Place") -> str:
    return " × ".join(map(str, place.site(path).shape))


def _by_name(some: "dict[str, Place]", there: "dict[str, Place]") -> list[str]:
    """A line for each name and shape, with how often it occurs; a weight that another place shares says so."""
    from deltalab.deltas.select import leaf, tied

    shared = tied(there)
    rows: Counter[tuple[str, str, str]] = Counter()
    for path, place in some.items():
        note = f"  tied to {', '.join(shared[path])}: no delta goes there" if path in shared else ""
        rows[leaf(path), _shape(path, place), note] += 1
    width = max(len(name) for name, _, _ in rows)
    return [f"  {name:<{width}}  {count:>4} × {shape}{note}" for (name, shape, note), count in rows.items()]
