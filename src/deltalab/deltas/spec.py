"""Specs of deltas: what a user asks for, and the hooks by which the rest of the package asks a method.

A class here is abstract; a method's own file holds the final one.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import pydantic
from torch import Tensor, nn

from deltalab.core.shapes import Float
from deltalab.core.spec import Spec
from deltalab.deltas.base import Delta
from deltalab.deltas.select import select
from deltalab.deltas.site import Kind, Site
from deltalab.quant.base import Quantising


class Start(NamedTuple):
    """What a fresh adapter may start from.

    seed: of `adapt`. calibration: batches of model inputs (dicts), if given. quantising: what of the base is about to be
    quantised; a start may say from what, and the base is that from then on.
    """

    seed: int
    calibration: Sequence[Mapping[str, Tensor]] | None = None
    quantising: Quantising | None = None


class DeltaSpec(Spec, abc.ABC):
    """What every method's spec has: where it goes. The method's own fields come after.

    targets: a preset (`q,v`, `attention`, `mlp`, `all-linear`), or module names and patterns, see `select`.
    layers: block indices to adapt, negative ones from the end; None for all.

    The hooks that take `deltas` (module path -> delta) see every module that one spec built in a model: that is where
    modules share tensors, a budget, or a schedule.
    """

    method: str
    targets: str | list[str] = "q,v"
    layers: list[int] | None = None

    peft_type: ClassVar[str | None] = None
    """The `peft_type` of this method's adapter files; None if peft has no such method."""
    peft_keys: ClassVar[frozenset[str]] = frozenset()
    """The keys of peft's config that `from_peft` reads; any other that is set is refused by name."""
    peft_lacks: ClassVar[frozenset[str]] = frozenset()
    """What most configs of peft have and this method's has not: `bias`, `layers_to_transform`."""
    peft_on: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    """The kinds of weight that peft's form of the method can sit on."""
    peft_biases: ClassVar[str] = "lora_only"
    """The value of peft's `bias` by which the biases of the adapted linears train."""
    peft_fuses: ClassVar[bool] = False
    """Whether peft, loading a file, takes the linears that a mixture once had for the experts of today."""
    sits_on: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    """The kinds of weight that the method can sit on."""
    alike: ClassVar[bool] = False
    """Whether `build` goes by a site's shape, kind, dtype and quantiser alone, and not by its path."""

    @pydantic.field_validator("targets")
    @classmethod
    def _some(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and not all(value)):
            raise ValueError("name at least one preset, module name or pattern")
        return value

    def chosen(self, model: nn.Module) -> list[str]:
        """The paths that `targets` and `layers` mean in `model`, in model order. Raises: UserError as `select`."""
        return select(model, self.targets, self.layers).names

    @abc.abstractmethod
    def build(self, site: Site) -> Delta:
        """The module for one site; its parameters are set by `init` afterwards. On the meta device: shapes alone."""

    @classmethod
    def factored(cls, ranks: Mapping[str, int]) -> Self | None:
        """The spec of deltas that are ΔW = B A of these ranks, by path, and that `hold` any; None where a method is not that."""
        return None

    def each(self, paths: Sequence[str]) -> dict[str, Self]:
        """Module path -> the spec for that module alone, where a field says different things to different modules.

        Raises: UserError if a pattern in such a field matches none of them.
        """
        return dict.fromkeys(paths, self)

    def trains(self, model: nn.Module, paths: Sequence[str]) -> list[str]:
        """Names of the model's own parameters that train beside the deltas (`bias` of LoRA)."""
        return []

    def join(self, deltas: Mapping[str, Delta]) -> None:
        """All modules are built: let them share what they share."""

    @property
    def calibrates(self) -> bool:
        """Whether a fresh adapter needs batches of inputs to begin, `Start.calibration`."""
        return False

    @property
    def filled(self) -> bool:
        """Whether a file holds all that a delta has, so that one that is loaded needs no `init` before."""
        return False

    @property
    def looks(self) -> bool:
        """Whether a fresh adapter's start depends on the weights as they are before they are quantised with it."""
        return False

    def settle(self, model: nn.Module, paths: list[str], start: Start) -> tuple[Self, list[str]]:
        """What a fresh adapter's spec and modules come to once it has seen the base: where a start decides on ranks."""
        return self, paths

    def begin(self, model: nn.Module, deltas: Mapping[str, Delta], start: Start) -> None:
        """A fresh adapter begins, after every `init`, the deltas not yet on the model: a start that looks at weights or
        activations. The base is not written to: a start that takes part of a weight counts its change from there.
        """

    def begin_again(self, model: nn.Module, deltas: Mapping[str, Delta]) -> None:
        """Before `from_peft` of each: what peft's file leaves to be made again from the weights, as peft does on loading.

        Raises: UserError if that cannot be done.
        """

    def penalty(self, deltas: Mapping[str, Delta]) -> Float[Tensor, ""] | None:
        """What is added to the loss, differentiable; None for nothing."""
        return None

    def after_step(self, deltas: Mapping[str, Delta], t: int | None, total: int | None) -> None:
        """After optimizer step t (1 … total), while the gradients are still there: budgets and schedules.

        t None: the step after the last one, which a method with a schedule keeps among its deltas' buffers.
        """

    def require_ready(self, deltas: Mapping[str, Delta]) -> None:
        """Raises: UserError if what would be saved now is not the method (a schedule that never ran)."""

    def to_peft(self) -> dict[str, Any]:
        """The method's part of `adapter_config.json`. Raises: NotImplementedError if peft has no such method."""
        raise NotImplementedError

    @classmethod
    def common_peft(cls, parts: dict[str, dict[str, Any]], deltas: Mapping[str, Delta]) -> dict[str, Any] | None:
        """One config for modules whose own are `parts` (path -> `to_peft`), or None if peft has no way to say it."""
        first, *rest = parts.values()
        return first if all(part == first for part in rest) else None

    @classmethod
    def whole_peft(cls, config: dict[str, Any], paths: list[str]) -> dict[str, Any]:
        """The config of a file, its targets `paths` among it, in the words that peft has for this method."""
        return config

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        """Whether a peft config is of this method; its `peft_type` alone says so unless two methods share one."""
        return cls.peft_type is not None and config.get("peft_type") == cls.peft_type

    @classmethod
    def from_peft(cls, config: dict[str, Any], paths: list[str]) -> Self:
        """The spec of a peft config whose targets are `paths`. Raises: UserError naming what is not supported."""
        raise NotImplementedError

    @classmethod
    def peft_paths(cls, model: nn.Module, config: dict[str, Any]) -> list[str] | None:
        """The paths that a peft config of this method means, where peft has words of its own for them; else None.

        Raises: UserError if they are not there.
        """
        return None

    @classmethod
    def peft_place(cls, model: nn.Module, paths: list[str]) -> dict[str, Any] | None:
        """`peft_paths` the other way: the keys of a config; None where there are no such keys.

        Asked of a method that peft puts round sub-layers.
        """
        return None

    def shared_to_peft(self, deltas: Mapping[str, Delta]) -> dict[str, Tensor]:
        """Tensors of the file that belong to no single module, by their key after `base_model.`."""
        return {}

    def shared_from_peft(self, deltas: Mapping[str, Delta], tensors: Mapping[str, Tensor]) -> None:
        """Take over what `shared_to_peft` gave, keys and shapes checked."""


class ParameterSpec(Spec, abc.ABC):
    """Which of the model's own parameters train: the third kind of delta, with no module of its own."""

    @abc.abstractmethod
    def parameters(self, model: nn.Module) -> list[str]:
        """Their names, in model order. Raises: UserError if there is none."""
