"""deltalab: fine-tune a language model with a small delta, and measure what it costs and what it moves.

Public names are loaded when they are first used, so `import deltalab` does not import torch.
"""

import importlib
import sys
import types
from typing import Any

from deltalab.deltas import METHODS

__version__ = "0.1.0"

_PUBLIC = {
    "deltalab.core.errors": ["UserError"],
    "deltalab.models.load": ["load"],
    "deltalab.models.generate": ["generate"],
    "deltalab.models.export": ["export"],
    "deltalab.models.bank": ["AdapterBank"],
    "deltalab.deltas": [*METHODS, "Train"],
    "deltalab.deltas.adapt": [
        "adapt",
        "trainable",
        "delta_weight",
        "disabled",
        "unload",
        "adapters",
        "set_active",
    ],
    "deltalab.deltas.merge": ["merged"],
    "deltalab.deltas.combine": ["combine"],
    "deltalab.deltas.schedule": ["step", "penalty"],
    "deltalab.deltas.measures": ["measures", "gathered"],
    "deltalab.deltas.peft_format": ["save_adapter", "load_adapter"],
    "deltalab.deltas.select": ["select"],
    "deltalab.measure.merging": ["merge_price"],
    "deltalab.train": ["train"],
    "deltalab.train.callback": ["TrainerCallback"],
}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    where = "deltalab.deltas" if name in METHODS else _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'deltalab' has no attribute '{name}'")
    return getattr(importlib.import_module(where), name)


def __dir__() -> list[str]:
    return __all__


class _Namesake(types.ModuleType):
    """A submodule with the name of the public function in it: `dl.train(…)` and `deltalab.train.loop` both work."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _WHERE and isinstance(value, types.ModuleType):  # the import system binds a submodule here
            value.__class__ = _Namesake
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
