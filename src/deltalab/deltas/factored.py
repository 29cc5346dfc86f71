"""Low-rank changes that are known already, put on a model as an adapter: what is left of merging or combining others."""

from collections.abc import Mapping

from torch import nn

from deltalab.deltas import methods
from deltalab.deltas.adapt import start
from deltalab.deltas.base import Factors, WeightDelta
from deltalab.deltas.spec import DeltaSpec
from deltalab.deltas.weights import Group, Planned, attached


def factored_spec(ranks: Mapping[str, int]) -> DeltaSpec:
    """The spec of deltas ΔW = B A of these ranks, by path: that of the first method which is such a change and no more."""
    return next(spec for method in methods().values() if (spec := method.factored(ranks)) is not None)


def put_factors(model: nn.Module, changes: Mapping[str, Factors], *, adapter: str = "default") -> nn.Module:
    """Adapt `model` with ΔW = s · B A at these paths, in place, trainable as after `adapt`; returns the model.

    Raises: UserError as `adapt`.
    """
    spec = factored_spec({path: change.A.shape[-2] for path, change in changes.items()})
    start(model, Planned([Group(spec, list(changes))], [], set()), adapter=adapter)
    for path, delta in attached(model).items():
        if isinstance(delta, WeightDelta):
            delta.hold(changes[path])
    return model
