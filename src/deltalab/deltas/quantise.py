"""Quantise the linears of a model's blocks, one matrix at a time, before or together with its first adapter.

Embeddings and the output layer stay as they are. An adapter that starts together with the quantisation is built and
begins on the full-precision weights: a start may take a part of W into the delta, or fit W − Ŵ, and says what is to be
quantised then. What comes out is the base: no copy of the weights before is kept, and `unload` gives the quantised model.
An adapter whose start took a part of W belongs to that base alone, and is refused on another.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.deltas.adapt import planned, start
from deltalab.deltas.attach import attach, detach
from deltalab.deltas.select import block_linears, model_name
from deltalab.deltas.sites import is_quantised, place
from deltalab.deltas.spec import Start
from deltalab.deltas.weights import adaptation, attached, is_adapted, mark_of
from deltalab.quant.base import QuantisedLinear, Quantiser, Quantising


def quantise(
    model: nn.Module, quantiser: Quantiser, adapt: Any = None, *, seed: int = 0,
    calibration: Sequence[Mapping[str, Tensor]] | None = None,
) -> nn.Module:  # fmt: skip
    """Quantise every linear of the blocks, in place, and put the delta `adapt` on, if any; returns the model.

    adapt, seed, calibration: as of `deltalab.deltas.adapt.adapt`.
    Raises: UserError if the model is adapted or quantised already, a matrix does not divide into groups or is not finite, own weights
    that train would be quantised, or as `adapt`. Then the model is as it was.
    """
    if is_adapted(model):
        raise UserError(f"{model_name(model)} is adapted, so it is too late to quantise it.",
                        next="deltalab.unload(model) first, or deltalab.load(name, quantize=..., adapt=...)")  # fmt: skip
    there = block_linears(model, "quantising")
    done = [path for path, linear in there.items() if is_quantised(linear)]
    if done:
        raise UserError(
            f"{model_name(model)} is quantised already.", found=f"{len(done)} linears, the first is {done[0]}"
        )
    about = Quantising(quantiser, there)
    for path, linear in there.items():
        try:
            about.group(path)
        except UserError as error:
            raise UserError(f"'{path}' cannot be quantised: {error.asked}", found=error.found, nearest=error.nearest,
                            next=error.next) from None  # fmt: skip
        if not bool(linear.weight.isfinite().all()):  # type: ignore[operator]
            raise UserError(f"'{path}' cannot be quantised: it holds values that are not finite.")
    if adapt is not None:
        plan = planned(model, adapt)
        own = [path for path in there if f"{path}.weight" in plan.names]
        if own:
            raise UserError(f"'{own[0]}' is meant to train itself, and codes do not train.", found=f"{len(own)} such linears",
                            next="leave them out of Train, or load without quantize")  # fmt: skip
        start(model, plan, fresh=Start(seed, calibration, about))
    deltas, told = attached(model), set(about.told)
    for path in there:
        if path in deltas:
            detach(there[path])
        model.set_submodule(path, about.pop(path))
        if path in deltas:
            attach(place(model, path), deltas[path])
        if path in told:
            adaptation(model).prepared[path] = mark_of(place(model, path).W)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _Saves(model)  # type: ignore[assignment]
    return model


def save_whole(model: nn.Module, *args: Any, **options: Any) -> None:
    """`save_pretrained` of the model's own class.

    Raises: UserError if it holds codes: a loader finds no weights in such a file, and would draw new ones.
    """
    held = [path for path, module in model.named_modules() if isinstance(module, QuantisedLinear)]
    if held:
        raise UserError(
            f"{model_name(model)} is quantised, and save_pretrained has no format for its codes.",
            found=f"{len(held)} linears, the first is {held[0]}",
            next="deltalab.save_adapter(model, folder) before merging; later deltalab.load(name, quantize=...), load_adapter and merged",
        )
    own: Any = type(model)
    own.save_pretrained(model, *args, **options)


class _Saves:
    """`save_pretrained` of a model that was quantised. It is copied and pickled with its model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **options: Any) -> None:
        save_whole(self.model, *args, **options)
