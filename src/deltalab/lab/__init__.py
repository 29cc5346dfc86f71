"""Floor 5: many runs as one experiment: a spec with what varies, runs side by side, one table over all of them."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def load(folder: str | Path, *, tuning: bool = False) -> "pd.DataFrame":
    """The finished trials of a sweep as a table, see `deltalab.lab.table.load`."""
    from deltalab.lab.table import load as read

    return read(folder, tuning=tuning)
