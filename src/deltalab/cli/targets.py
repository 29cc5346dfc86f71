"""`deltalab targets MODEL`: what a delta can be put on."""

from collections import Counter
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="a folder, a hub name, organism, or organism:base")],
    every: Annotated[bool, typer.Option("--every", help="every module by its whole name, with its shape")] = False,
) -> None:
    """List the linears of a model by name with their counts and shapes, and what each preset selects."""
    from deltalab.core.errors import UserError
    from deltalab.deltas.base import weight_of
    from deltalab.deltas.select import PRESETS, leaf, select
    from deltalab.deltas.sites import linears
    from deltalab.models.load import load

    loaded, _ = load(model)
    found = linears(loaded)
    shapes = {name: tuple(weight_of(module).shape) for name, module in found.items()}
    if every:
        width = max(map(len, shapes))
        print("\n".join(f"{name:<{width}}  {out} × {in_}" for name, (out, in_) in shapes.items()))
        return
    print(f"{model}: {len(found)} linears, {sum(p.numel() for p in loaded.parameters()):,} parameters\n\ntargets")
    counts = Counter((leaf(name), shape) for name, shape in shapes.items())
    width = max(len(name) for name, _ in counts)
    for (name, (out, in_)), count in counts.items():
        print(f"  {name:<{width}}  {count:>4} × {out} × {in_}")
    print("\npresets")
    for preset in PRESETS:
        try:
            names = Counter(leaf(name) for name in select(loaded, preset))
            print(f"  {preset:<{width}}  {sum(names.values()):>4}: {', '.join(names)}")
        except UserError as error:
            print(f"  {preset:<{width}}     —: {error.asked}")
