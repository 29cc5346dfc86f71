"""What modules are called beside each other, by their paths alone."""

import re
from collections import Counter
from collections.abc import Iterable

LONG = 3
"""Parts of a path that a name shows whole."""


def layer_in(path: str) -> int | None:
    """The number of the layer that a module's path names; None outside of layers."""
    number = re.search(r"(?:^|\.)(\d+)\.", path)
    return int(number[1]) if number else None


def kinds_of(paths: Iterable[str]) -> dict[str, str]:
    """Path -> the kind of its module, the same in all layers (and experts): its last name, with as many of those before it as
    tell it from other modules of that name, numbers left out; of more than three the first and the last.

    model.layers.0.mlp.up_proj is up_proj; BERT's three dense are attention.output.dense, intermediate.dense, layer.output.dense.
    """
    plain = {path: tuple(part for part in path.split(".") if not part.isdigit()) for path in paths}
    shared = Counter(kind[-n:] for kind in set(plain.values()) for n in range(1, len(kind) + 1))
    names = {
        kind: next((kind[-n:] for n in range(1, len(kind)) if shared[kind[-n:]] == 1), kind)
        for kind in set(plain.values())
    }
    return {
        path: ".".join(name if len(name) <= LONG else (name[0], "…", name[-1]))
        for path, kind in plain.items()
        for name in [names[kind]]
    }
