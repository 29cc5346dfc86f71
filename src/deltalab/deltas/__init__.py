"""Floor 2: the deltas. `METHODS` is the table of contents: one line a method, loaded when it is first asked for."""

import importlib
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from deltalab.core.spec import Spec
    from deltalab.deltas.adalora import AdaLoRA as AdaLoRA
    from deltalab.deltas.bottleneck import Bottleneck as Bottleneck
    from deltalab.deltas.dora import DoRA as DoRA
    from deltalab.deltas.ia3 import IA3 as IA3
    from deltalab.deltas.lora import LoRA as LoRA
    from deltalab.deltas.lora_experts import LoRAExperts as LoRAExperts
    from deltalab.deltas.masks import Train as Train
    from deltalab.deltas.prefix import ZeroInitPrefix as ZeroInitPrefix
    from deltalab.deltas.qalora import QALoRA as QALoRA
    from deltalab.deltas.spec import DeltaSpec
    from deltalab.deltas.vera import VeRA as VeRA

METHODS = {
    "LoRA": "deltalab.deltas.lora",
    "AdaLoRA": "deltalab.deltas.adalora",
    "DoRA": "deltalab.deltas.dora",
    "QALoRA": "deltalab.deltas.qalora",
    "IA3": "deltalab.deltas.ia3",
    "VeRA": "deltalab.deltas.vera",
    "Bottleneck": "deltalab.deltas.bottleneck",
    "ZeroInitPrefix": "deltalab.deltas.prefix",
    "LoRAExperts": "deltalab.deltas.lora_experts",
}
"""Public name of the spec -> module that holds it. A new method is one file and one line here."""

_OTHER = {"Train": "deltalab.deltas.masks"}


def methods() -> dict[str, type["DeltaSpec"]]:
    """Every delta method: public name -> spec class."""
    return {name: getattr(importlib.import_module(module), name) for name, module in METHODS.items()}


def specs() -> dict[str, type["Spec"]]:
    """Everything that may stand in a spec's `adapt` list: the methods, and `Train`."""
    return {**methods(), **{name: getattr(importlib.import_module(module), name) for name, module in _OTHER.items()}}


def any_spec() -> Any:
    """The type of one entry of a spec's `adapt` list: a union of all `specs`, told apart by `method`."""
    import pydantic

    return Annotated[reduce(or_, specs().values()), pydantic.Field(discriminator="method")]


def __getattr__(name: str) -> Any:
    if name == "AnySpec":
        return any_spec()
    where = {**METHODS, **_OTHER}
    if name not in where:
        raise AttributeError(f"module 'deltalab.deltas' has no attribute '{name}'")
    return getattr(importlib.import_module(where[name]), name)
