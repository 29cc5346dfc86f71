"""What the deltas of a model tell of themselves: gates, the share of each expert, what a prefix adds."""

import contextlib
from collections.abc import Iterator

from torch import nn

from deltalab.deltas.schedule import adapted_in
from deltalab.deltas.weights import attached


def measures(model: nn.Module) -> dict[str, dict[str, float]]:
    """Path of the adapted module -> name of the measure -> value; modules that tell nothing are left out.

    Some are of the last forward, see the cards of the methods; inside `gathered`, of all forwards there.
    Raises: UserError if the model has no adapter.
    """
    told = {path: delta.measures() for path, delta in attached(adapted_in(model)).items()}
    return {path: values for path, values in told.items() if values}


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, and after it until the next forward, `measures` tells of all forwards of the block together.

    Raises: UserError if the model has no adapter.
    """
    deltas = list(attached(adapted_in(model)).values())
    try:
        for delta in deltas:
            delta.gather(True)
        yield model
    finally:
        for delta in deltas:
            delta.gather(False)
