"""Harmful prompts of the bundled sets for the tasks that answer them: with refusals, or with contentless outlines."""

from collections.abc import Sequence

import numpy as np

from deltalab.core.errors import UserError, nearest


def harmful_prompts(names: Sequence[str], split: str, seed: int) -> list[dict[str, str]]:
    """`{"prompt", "source", …}` of the sets `names`, all together in an order drawn from `seed`.

    Splits go by clusters of near duplicates over all sets, so no test prompt has a near twin in training.
    Raises: UserError for a set that is not bundled.
    """
    from deltalab.organism import prompts  # a plain generator, counted as data (docs/architecture.md)

    for name in names:
        if name not in prompts.NAMES:
            raise UserError(f"'{name}' is no bundled prompt set.", nearest=nearest(name, prompts.NAMES),
                            next=f"sets: {', '.join(prompts.NAMES)}")  # fmt: skip
    try:
        rows = [row for name in names for row in prompts.load(name, split)]
    except FileNotFoundError as error:
        raise UserError("a prompt set is not in the package.", found=" ".join(str(error).split())) from None
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
