"""What a search looks through, and how: a part of a sweep's spec."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, FiniteFloat, PositiveInt

from deltalab.core.spec import Spec

Number = int | FiniteFloat
RESERVED = ("seed", "output", "validation", "name", "tune")


class Range(Spec):
    """Numbers from low to high, both included: whole ones if both are. step: between neighbours. log: drawn evenly in the logarithm."""

    low: Number
    high: Number
    step: Number | None = None
    log: bool = False

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"an empty range: low {self.low} is not below high {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log: for a range above zero, without a step")
        if self.step is not None:
            parts = (self.high - self.low) / self.step if self.step > 0 else 0.5
            if abs(parts - round(parts)) > 1e-8 or (self.whole and isinstance(self.step, float)):
                raise ValueError(f"step {self.step} does not lead from {self.low} to {self.high}")
        return self

    def __str__(self) -> str:
        how = ", logarithmic" if self.log else f" in steps of {self.step}" if self.step else ""
        return f"{self.low} to {self.high}{how}"

    @property
    def whole(self) -> bool:
        """Whether its numbers are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def grid(self) -> list[Number] | None:
        """All of its numbers; None where they are not counted."""
        step = self.step or (1 if self.whole else None)
        if step is None or self.log:
            return None
        return [self.low + i * step for i in range(round((self.high - self.low) / step) + 1)]


class SearchSpec(Spec):
    """Optuna draws each trial's values of the keys in `space`, as `sampler` learns from the trials before.

    space: key -> a range, or a list of values. trials: in all, of each group of the sweep. measure: `score.<task>.<measure>`, or null for
    the held-out loss. sampler: tpe, gp (a Gaussian process), random, or grid (every combination, in a drawn order). pruner: which trials end
    at a held-out evaluation: none; median, those worse than the median of the trials before; halving or hyperband.
    storage: null for a file in the sweep's folder, or the URL of a database. validation: the share of the training data that is searched
    on, see `TrainSpec`. then: the best setting of each group runs with all seeds, on the test data, which the search does not see.
    """

    space: Annotated[dict[str, Range | Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]
    trials: PositiveInt = 20
    measure: str | None = None
    sampler: Literal["tpe", "gp", "random", "grid"] = "tpe"
    pruner: Literal["none", "median", "halving", "hyperband"] = "median"
    storage: str | None = None
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    then: bool = True

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if own := [key for key in self.space if key in RESERVED]:
            raise ValueError(f"space: {own[0]} is not searched for")
        if self.sampler == "grid" and None in self.grids().values():
            key = next(key for key, values in self.grids().items() if values is None)
            raise ValueError(f"sampler: a grid needs values that can be counted, and {key} has no step")
        return self

    def grids(self) -> dict[str, list[Any] | None]:
        """Key -> all of its values; None where they are not counted."""
        return {key: values.grid() if isinstance(values, Range) else values for key, values in self.space.items()}

    def corners(self) -> Iterator[dict[str, Any]]:
        """Settings that between them take both ends of every range and every value of every list."""
        ends = {key: [v.low, v.high] if isinstance(v, Range) else v for key, v in self.space.items()}
        first = {key: values[0] for key, values in ends.items()}
        yield first
        yield from ({**first, key: value} for key, values in ends.items() for value in values[1:])
