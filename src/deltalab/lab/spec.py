"""A sweep: one training run, and what varies in it. Every trial is a whole `TrainSpec`, checked before the first one runs."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import pydantic
from pydantic import Field

from deltalab.core.errors import UserError, nearest
from deltalab.core.spec import Spec, build, digest, put
from deltalab.lab.space import SearchSpec
from deltalab.train.spec import TrainSpec

Values = Annotated[list[Any], Field(min_length=1)]
Axis = list[dict[str, Any]]
"""The settings of one axis: each is keys of the spec -> values."""
NAME, TUNE = "name", "tune"
"""Keys of a case that are no settings of its run: what it is called, and what is tuned for it alone."""


class TuneSpec(Spec):
    """Settings that each group gets its own best of, chosen on validation data: the trials of the sweep then run with these.

    values: key -> values, every one with every other. A case may have others of its own, under `tune`. seeds: what a choice is the mean
    over; null for the sweep's first. validation: the share of the training data that a choice is made on, see `TrainSpec`; the trials that
    are reported train on all of it. by: the measure, as the table calls it; null for the first score, or `held_out` where there is none.
    """

    values: dict[str, Values]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    by: str | None = None


class SweepSpec(Spec):
    """base: a training run as `deltalab train` takes it. The rest says what varies, by keys as in overrides (`optim.lr`, `adapt.r`):

    product: key -> values, every one with every other. zip: groups of keys whose values go together, the first with the first:
    `[{adapt.r: [4, 8], adapt.alpha: [8, 16]}]`. cases: settings one by one, each with a `name` if it likes:
    `[{name: LoRA, adapt: [...]}, {name: IA3, adapt: [...]}]`. seeds: each trial runs once with each. tune: what each group is given its
    own best of first. search: the same, drawn by Optuna. baseline: the group that the others are compared with.
    """

    base: dict[str, Any]
    product: dict[str, Values] = {}
    zip: list[dict[str, Values]] = []
    cases: list[dict[str, Any]] = []
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (42, 1337, 2024)
    tune: TuneSpec | None = None
    search: SearchSpec | None = None
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
            *(self.search.space if self.search else ()),
        ]
        if self.tune is not None and self.search is not None:
            raise ValueError("tune and search: one of them")
        own = [item[TUNE] for item in self.cases if TUNE in item]
        if own and self.tune is None:
            raise ValueError("a case has `tune`, and the sweep has none")
        if any(not isinstance(values, dict) for values in own):
            raise ValueError("tune of a case: keys -> values")
        keys += {key for values in (self.tune.values if self.tune else {}, *own) for key in values}
        twice = sorted({key for key in keys if keys.count(key) > 1 and key not in (NAME, TUNE)})
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
    """One run. id: the digest of its whole spec. settings: what is its own, by key. group: that in words; the seed is no part of either.

    tuned: of a trial that a choice is made by, what it tries. number: of one that a search has drawn, Optuna's.
    """

    id: str
    group: str
    settings: Mapping[str, Any]
    spec: TrainSpec
    tuned: Mapping[str, Any] = field(default_factory=dict)
    number: int | None = None

    @property
    def label(self) -> str:
        """The group and the seed; of a trial to choose by, also what it tries."""
        tries = f"{'tuning' if self.number is None else f'#{self.number}'} {words(self.tuned)}: " if self.tuned else ""
        return f"{tries}{self.group}, seed={self.spec.seed}"


def trials(spec: SweepSpec, chosen: Mapping[str, Mapping[str, Any]] | None = None) -> list[Trial]:
    """Every trial of a sweep, in order; two settings that come to the same run are one.

    chosen: of a sweep that is tuned, group -> what was found best; a group that is not there has no trials yet.
    Raises: UserError with the faults of the first trial that has some, and its settings.
    """
    found: dict[str, Trial] = {}
    groups = [name for name, _, _ in _groups(spec)]
    if spec.baseline is not None and spec.baseline not in groups:
        raise UserError(f"baseline: no group is called '{spec.baseline}'.", nearest=nearest(spec.baseline, groups) or groups[:3])  # fmt: skip
    for group, settings, _ in _groups(spec):
        if chosen is not None and group not in chosen:
            continue
        whole = {**settings, **(chosen[group] if chosen else {})}
        for seed in spec.seeds:
            run = run_of(spec, whole, group, seed)
            found.setdefault(id_of(run), Trial(id_of(run), group, whole, run))
    return list(found.values())


def tuning_trials(spec: SweepSpec) -> list[Trial]:
    """The trials that a sweep's settings are chosen by; none if nothing is tuned. Raises: as `trials`."""
    if spec.tune is None:
        return []
    found: dict[str, Trial] = {}
    for group, settings, values in _groups(spec):
        for row in itertools.product(*values.values()):
            tuned = dict(zip(values, row, strict=True))
            for seed in spec.tune.seeds or spec.seeds[:1]:
                run = run_of(
                    spec, {**settings, **tuned, "validation": spec.tune.validation, "costs": False}, group, seed
                )
                found.setdefault(id_of(run), Trial(id_of(run), group, settings, run, tuned))
    return list(found.values())


def _groups(spec: SweepSpec) -> Iterator[tuple[str, dict[str, Any], dict[str, list[Any]]]]:
    """Each group's name, its settings, and the values that are tried for it."""
    for named in itertools.product(*map(_named, spec.axes())):
        parts = [part for _, part in named]
        settings = {key: value for part in parts for key, value in part.items() if key != TUNE}
        own = next((part[TUNE] for part in parts if TUNE in part), None)
        name = ", ".join(filter(None, (name for name, _ in named))) or "base"
        yield name, settings, own or (spec.tune.values if spec.tune else {})


def _named(axis: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """The settings of an axis by their words; what is called alike is told apart by that in which it differs."""
    all_ = [(words(part), dict(_leaves({key: part[key] for key in part if key not in (NAME, TUNE)}))) for part in axis]
    alike: dict[str, list[dict[str, Any]]] = {}
    for name, own in all_:
        alike.setdefault(name, []).append(own)
    out = []
    for part, (name, own) in zip(axis, all_, strict=True):
        differ = [key for key in own if any(other.get(key) != own[key] for other in alike[name])]
        told = ", ".join(f"{key.rpartition('.')[2]}={own[key]}" for key in differ)
        out.append((f"{name} ({told})" if told else name, part))
    return out


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value inside of lists and mappings, by its dotted path."""
    if not isinstance(value, (dict, list)) or not value:
        yield path, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(part, f"{path}.{key}" if path else str(key))


def words(part: Mapping[str, Any]) -> str:
    """The settings of one axis in words: their name, or each key's last part and its value."""
    own = {key.rpartition(".")[2]: value for key, value in part.items() if key != TUNE}
    return str(part[NAME]) if NAME in part else ", ".join(f"{key}={short(value)}" for key, value in own.items())


def short(value: Any) -> str:
    """A value in a table: numbers as they are, a delta by its method."""
    if isinstance(value, list):
        return " + ".join(short(item) for item in value)
    if isinstance(value, dict):
        return str(value.get("method") or value.get("task") or value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def id_of(run: TrainSpec) -> str:
    """A trial's id: the digest of what its spec says; fields that a later version brings leave it as it is."""
    return digest(run.told())


def run_of(spec: SweepSpec, settings: Mapping[str, Any], group: str, seed: int) -> TrainSpec:
    """The base with these settings and this seed. Raises: UserError with the faults of the trial."""
    values = copy.deepcopy(spec.base)
    # what replaces more comes first, so that `adapt.r` changes the delta that `adapt` names
    for key in sorted(settings, key=lambda key: key.count(".")):
        if key != NAME:
            put(values, key, copy.deepcopy(settings[key]))
    try:
        return build(TrainSpec, {**values, "seed": seed}, f"the trial '{group}'")
    except UserError as error:
        raise UserError(error.asked, found=error.found, nearest=error.nearest, next=error.next or "mend it in base, or where it varies") from None  # fmt: skip
