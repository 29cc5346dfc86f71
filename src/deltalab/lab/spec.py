"""A sweep: one training run, and what varies in it. Every trial is a whole `TrainSpec`, checked before the first one runs."""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

import pydantic
from pydantic import Field

from deltalab.core.errors import UserError, nearest
from deltalab.core.spec import Spec, build, put
from deltalab.train.spec import TrainSpec

Values = Annotated[list[Any], Field(min_length=1)]
Axis = list[dict[str, Any]]
"""The settings of one axis: each is keys of the spec -> values."""
NAME = "name"


class SweepSpec(Spec):
    """base: a training run as `deltalab train` takes it. The rest says what varies, by keys as in overrides (`optim.lr`, `adapt.r`):

    product: key -> values, every one with every other. zip: groups of keys whose values go together, the first with the first:
    `[{adapt.r: [4, 8], adapt.alpha: [8, 16]}]`. cases: settings one by one, each with a `name` if it likes:
    `[{name: LoRA, adapt: [...]}, {name: IA3, adapt: [...]}]`. seeds: each trial runs once with each.
    baseline: the group that reports test the others against; the first one if not given.
    """

    base: dict[str, Any]
    product: dict[str, Values] = {}
    zip: list[dict[str, Values]] = []
    cases: list[dict[str, Any]] = []
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (42, 1337, 2024)
    baseline: str | None = None
    output: str | None = None

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        for group in self.zip:
            lengths = {key: len(values) for key, values in group.items()}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"zip: values that go together are as many: {', '.join(f'{k} has {n}' for k, n in lengths.items())}")  # fmt: skip
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one stands there twice")
        if {"seed", "output"} & self.base.keys():
            raise ValueError("base: the sweep sets seed and output")
        keys = [
            *self.product,
            *(key for group in self.zip for key in group),
            *{key for item in self.cases for key in item},
        ]
        twice = sorted({key for key in keys if keys.count(key) > 1 and key != NAME})
        if twice:
            raise ValueError(f"{twice[0]} varies in two places")
        return self

    def axes(self) -> list[Axis]:
        """What varies, each with every other."""
        found: list[Axis] = [[dict(item) for item in self.cases]] if self.cases else []
        found += [[dict(zip(group, row, strict=True)) for row in zip(*group.values(), strict=True)] for group in self.zip if group]  # fmt: skip
        return found + [[{key: value} for value in values] for key, values in self.product.items()]


@dataclass(frozen=True)
class Trial:
    """One run. id: the digest of its whole spec. settings: what is its own, by key. group: that in words; the seed is no part of either."""

    id: str
    group: str
    settings: Mapping[str, Any]
    spec: TrainSpec

    @property
    def label(self) -> str:
        """The group and the seed."""
        return f"{self.group}, seed={self.spec.seed}"


def trials(spec: SweepSpec) -> list[Trial]:
    """Every trial of a sweep, in order; two settings that come to the same run are one.

    Raises: UserError with the faults of the first trial that has some, and its settings.
    """
    found: dict[str, Trial] = {}
    for parts in itertools.product(*spec.axes()):
        settings = {key: value for part in parts for key, value in part.items()}
        group = ", ".join(filter(None, map(_words, parts))) or "base"
        for seed in spec.seeds:
            run = _run(spec, settings, group, seed)
            found.setdefault(run.digest(), Trial(run.digest(), group, settings, run))
    groups = list(dict.fromkeys(trial.group for trial in found.values()))
    if spec.baseline is not None and spec.baseline not in groups:
        raise UserError(
            f"baseline: no group is called '{spec.baseline}'.", nearest=nearest(spec.baseline, groups) or groups[:3]
        )
    return list(found.values())


def _words(part: Mapping[str, Any]) -> str:
    """The settings of one axis in words: their name, or each key's last part and its value."""
    own = {key.rpartition(".")[2]: value for key, value in part.items()}
    return str(part[NAME]) if NAME in part else ", ".join(f"{key}={short(value)}" for key, value in own.items())


def short(value: Any) -> str:
    """A value in a table: numbers as they are, a delta by its method."""
    if isinstance(value, list):
        return " + ".join(short(item) for item in value)
    if isinstance(value, dict):
        return str(value.get("method") or value.get("task") or value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _run(spec: SweepSpec, settings: Mapping[str, Any], group: str, seed: int) -> TrainSpec:
    values = copy.deepcopy(spec.base)
    # what replaces more comes first, so that `adapt.r` changes the delta that `adapt` names
    for key in sorted(settings, key=lambda key: key.count(".")):
        if key != NAME:
            put(values, key, copy.deepcopy(settings[key]))
    try:
        return build(TrainSpec, {**values, "seed": seed}, f"the trial '{group}'")
    except UserError as error:
        raise UserError(error.asked, found=error.found, nearest=error.nearest, next=error.next or "mend it in base, or where it varies") from None  # fmt: skip
