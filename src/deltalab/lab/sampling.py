"""A search's spec in Optuna's terms: values, samplers, pruners, and the drawing of a setting."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deltalab.core.spec import digest
from deltalab.lab.journal import optuna
from deltalab.lab.space import Range, SearchSpec


def draw(study: "optuna.Study", search: SearchSpec, seed: int) -> "optuna.trial.FrozenTrial":
    """The next trial of a study, running, with its values. Nothing is written: a process that is killed here has begun no trial.

    The sampler's seed is of the trial's number too: processes that share a study would draw the same otherwise.
    """
    known = study.get_trials(deepcopy=False)
    copy = optuna.create_study(study_name=study.study_name, direction=study.direction, pruner=study.pruner,
                               sampler=_sampler(search, seed, len(known)))  # fmt: skip
    copy.add_trials(known)
    drawn = copy.ask()
    for key, values in search.space.items():
        if not isinstance(values, Range):
            drawn.suggest_categorical(key, _choices(values))
        elif values.whole:
            drawn.suggest_int(key, int(values.low), int(values.high), step=int(values.step or 1), log=values.log)
        else:
            drawn.suggest_float(key, values.low, values.high, step=values.step, log=values.log)
    return copy.get_trials(deepcopy=False)[-1]


def values_of(search: SearchSpec, params: Mapping[str, Any]) -> dict[str, Any]:
    """What was drawn, as the spec has it."""
    return {key: params[key] if isinstance(values, Range) else values[_choices(values).index(params[key])]
            for key, values in search.space.items()}  # fmt: skip


def pruner(search: SearchSpec) -> "optuna.pruners.BasePruner":
    """By its name. Resources are held-out evaluations: the first is 1."""
    kinds: dict[str, type[optuna.pruners.BasePruner]] = {
        "none": optuna.pruners.NopPruner, "median": optuna.pruners.MedianPruner, "hyperband": optuna.pruners.HyperbandPruner,
    }  # fmt: skip
    return kinds[search.pruner]() if search.pruner in kinds else optuna.pruners.SuccessiveHalvingPruner(min_resource=1)


def _sampler(search: SearchSpec, seed: int, number: int) -> "optuna.samplers.BaseSampler":
    if search.sampler == "grid":  # whose order is one for all
        return optuna.samplers.GridSampler({key: _choices(values or []) for key, values in search.grids().items()}, seed)  # fmt: skip
    kinds = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler, "random": optuna.samplers.RandomSampler}  # fmt: skip
    return kinds[search.sampler](seed=int(digest([seed, number])[:8], 16))


def _choices(values: Sequence[Any]) -> list[Any]:
    """A list's values as Optuna takes them: what is more than a number or a word as JSON."""
    return [json.dumps(value) if isinstance(value, (list, dict)) else value for value in values]
