"""What the tools that tune share: results kept as they come, and the search for a learning rate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]


class Lines:
    """Results by key, one JSON line each in `file`: what is there is not made again."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        lines = file.read_text().splitlines() if file.is_file() else []
        self.done: dict[tuple[Any, ...], dict[str, Any]] = {
            tuple(entry["key"]): entry for entry in map(json.loads, lines)
        }

    def add(self, key: tuple[Any, ...], found: dict[str, Any]) -> dict[str, Any]:
        """Keep what was found."""
        entry = {"key": key, **found}
        with self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.done[key] = entry
        return entry


def best_rate(value: Callable[[float], Any], guess: float) -> float:
    """From `guess` up and down in half decades to a rate of which no neighbour's value is greater."""
    best = RATES.index(guess)
    while True:
        near = [i for i in (best - 1, best, best + 1) if 0 <= i < len(RATES)]
        top = max(near, key=lambda i: value(RATES[i]))
        if top == best:
            return RATES[best]
        best = top
