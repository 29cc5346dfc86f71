"""How a delta sits on a weight: it becomes a child `delta` of the module that holds the weight, and that module's class
becomes a subclass that asks it.

A linear or an embedding hands its delta the input and its own forward. Experts, whose forward reads 3-D parameters as it
likes, are shown the adapted weights in place of them: that works with every implementation of the experts' forward, and
costs one adapted copy of each stack while the forward runs, in training until its backward is done. With a delta that
depends on the input, experts have no adapted weights to show, and are computed one by one (experts.py). A sub-layer
hands its delta the hidden states and its own forward, the other arguments and results beside.

The module keeps its place, its parameters, their names and ties, so state-dict keys, hooks, deepcopy and
`save_pretrained` go on working, and taking the delta off again leaves no trace.
"""

import functools
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.deltas.base import LINEARS, Base, Delta, WeightDelta
from deltalab.deltas.experts import one_by_one, require_usual
from deltalab.deltas.fused import low_rank_linear
from deltalab.deltas.sites import ExpertDeltas, Place, base_modules

NOTHING = object()


class Adapted(nn.Module):
    """Mixed in before `adapts`, the class of a linear, or before nn.Embedding under a class derived from it."""

    adapts: ClassVar[type[nn.Module]]
    delta: Delta

    def forward(self, x: Tensor) -> Tensor:
        delta = self.delta
        if not delta.enabled:
            return super().forward(x)
        y = low_rank_linear(self, x)
        if y is not None:
            return y
        base = Base(super().forward, self)
        return delta(x, base) if delta.keep is None else delta.masked(x, base)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes made on the fly have no importable name: pickle and deepcopy make the class again instead."""
        return _blank, (type(self).adapts,), self.__getstate__()


class AdaptedSublayer(Adapted):
    """Mixed in before the class of an attention or an MLP. Its forward's first argument is the hidden states, given by
    place or by name; if it returns a sequence, they come first in that."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = super(Adapted, self).forward
        if not self.delta.enabled:
            return own(*args, **kwargs)
        own = self.delta.within(own)
        name = "" if args else _first_parameter(type(self).adapts)
        beside: list[Any] = []

        def base(x: Tensor) -> Tensor:
            result = own(x, *args[1:], **kwargs) if args else own(**{**kwargs, name: x})
            several = isinstance(result, (tuple, list))
            beside[:] = result[1:] if several else [NOTHING]
            return cast(Tensor, result[0] if several else result)

        y = self.delta(args[0] if args else kwargs[name], Base(base, self))
        return y if beside and beside[0] is NOTHING else (y, *beside)


class AdaptedExperts(nn.Module):
    """Mixed in before a class of experts; `delta` holds one delta a parameter, by the parameter's name."""

    adapts: ClassVar[type[nn.Module]]
    shows: ClassVar[tuple[str, ...]]
    delta: ExpertDeltas

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shown: dict[str, Tensor] = {}
        sees: dict[str, Delta] = {}
        for name, delta in self.delta.items():
            if not isinstance(delta, WeightDelta):
                sees |= {name: cast(Delta, delta)} if delta.enabled else {}
            elif delta.enabled:
                held = Place(self, name, "experts")
                W = held.parameter
                shown[name] = held.oriented(delta.adapted(held.oriented(W)).to(W.dtype))
        self.__dict__["_shown"] = shown
        try:
            return one_by_one(self, sees, *args, **kwargs) if sees else super().forward(*args, **kwargs)
        finally:
            del self.__dict__["_shown"]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).adapts, self.shows), self.__getstate__()


@functools.cache
def adapted_class(cls: type[nn.Module], shows: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of a module's class that asks its delta; the same one each time. shows: the experts' parameters.

    An embedding of a class of its own (scaled, with an offset) asks where that class looks up its rows, so whatever it
    does before and after is done to the adapted rows too.
    """
    bases: tuple[type[nn.Module], ...] = (Adapted, cls)
    body: dict[str, Any] = {"adapts": cls, "__doc__": cls.__doc__}
    if shows:
        bases = (AdaptedExperts, cls)
        body |= {"shows": shows, **{name: property(functools.partial(_shown, name)) for name in shows}}
    elif issubclass(cls, nn.Embedding) and cls is not nn.Embedding:
        bases = (cls, adapted_class(nn.Embedding, ()))
    elif not issubclass(cls, (*LINEARS, nn.Embedding)):
        bases = (AdaptedSublayer, cls)
    return type(f"Adapted{cls.__name__}", bases, body)


def attach(place: Place, delta: Delta) -> None:
    """Put `delta` on a place.

    Raises: UserError for a module whose forward is not its class's, or an embedding that looks up rows in its own way.
    """
    module = place.module
    if "forward" in module.__dict__:
        raise UserError(
            f"the forward of a {type(module).__name__} was replaced, so a delta there would not be asked.",
            found="some tools do that to move weights between devices (`device_map`) or to trace",
            next="adapt the model before they do, or load it on one device",
        )
    delta.train(module.training)
    if place.kind == "experts":
        if not isinstance(delta, WeightDelta):
            require_usual(module, place.name)
        if not isinstance(module, AdaptedExperts):
            module.add_module("delta", ExpertDeltas())
        cast(ExpertDeltas, module.delta)[place.name] = delta
        cls = getattr(type(module), "adapts", type(module))
        module.__class__ = adapted_class(cls, tuple(module.delta))  # type: ignore[arg-type]
        return
    if place.kind == "embedding" and not _looks_up_as_usual(type(module)):
        raise UserError(
            f"{type(module).__name__} does not look up rows as nn.Embedding does, so no delta goes there.",
            next="leave the embeddings out, or train them themselves: Train('embed_tokens')",
        )
    module.add_module("delta", delta)
    module.__class__ = adapted_class(type(module), ())


def detach(module: nn.Module) -> None:
    """Take the delta off, of experts all of them."""
    module.__class__ = type(module).adapts  # type: ignore[attr-defined]
    del module._modules["delta"]


def delta_on(place: Place) -> Delta | None:
    """The delta that a place has, if any."""
    module = place.module
    if isinstance(module, AdaptedExperts):
        return cast("Delta | None", module.delta._modules.get(place.name))
    return module.delta if isinstance(module, Adapted) else None


def adapted_modules(model: nn.Module) -> list[nn.Module]:
    """Every module with a delta, in model order."""
    return [module for _, module in base_modules(model) if isinstance(module, (Adapted, AdaptedExperts))]


def attached_to(model: nn.Module) -> Iterator[tuple[str, str, Delta]]:
    """(path of the weight, name of the delta among the model's modules, delta), in model order."""
    for name, module in base_modules(model):
        if isinstance(module, Adapted):
            yield name, f"{name}.delta" if name else "delta", module.delta
        elif isinstance(module, AdaptedExperts):
            for key, delta in module.delta.items():
                yield f"{name}.{key}", f"{name}.delta.{key}", cast(Delta, delta)


@functools.cache
def _first_parameter(cls: type[nn.Module]) -> str:
    """The name of the first argument of a class's forward."""
    _, first, *_ = inspect.signature(cls.forward).parameters
    return first


def _shown(name: str, experts: nn.Module) -> Tensor:
    """What a parameter of adapted experts reads as: the adapted weight inside their forward, itself outside."""
    shown: dict[str, Tensor] = experts.__dict__.get("_shown", {})
    return shown[name] if name in shown else cast(Tensor, experts._parameters[name])


def _looks_up_as_usual(cls: type[nn.Module]) -> bool:
    """Whether a class of embeddings leaves the look-up to nn.Embedding's forward, where the delta is asked."""
    own = [c.__dict__["forward"] for c in cls.__mro__[: cls.__mro__.index(nn.Embedding)] if "forward" in c.__dict__]
    named = [getattr(forward, "__code__", None) for forward in own]
    return all(code is not None and {"super", "forward"} <= set(code.co_names) for code in named)


def _blank(cls: type[nn.Module], shows: tuple[str, ...] = ()) -> nn.Module:
    made = adapted_class(cls, shows)
    return made.__new__(made)
