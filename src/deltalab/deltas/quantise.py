"""Quantise the linears of a model's blocks, one matrix at a time, before or together with its first adapter.

Embeddings and the output layer stay as they are. An adapter that starts together with the quantisation is built and
begins on the full-precision weights: a start may take a part of W into the delta, or fit W − Ŵ, and says what is to be
quantised then. What comes out is the base: no copy of the weights before is kept, and `unload` gives the quantised model.
An adapter whose start took a part of W belongs to that base alone, and is refused on another.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.memory import give_back
from deltalab.core.shapes import Float
from deltalab.deltas.adapt import planned, start
from deltalab.deltas.attach import attach, detach
from deltalab.deltas.save import Saves
from deltalab.deltas.select import block_linears, model_name
from deltalab.deltas.sites import is_quantised, place
from deltalab.deltas.spec import Start
from deltalab.deltas.weights import Planned, adaptation, attached, is_adapted, mark_of
from deltalab.quant.base import Quantiser, Quantising


def quantise(
    model: nn.Module, quantiser: Quantiser, adapt: Any = None, *, seed: int = 0,
    calibration: Sequence[Mapping[str, Tensor]] | None = None, streamed: Collection[str] = (),
) -> nn.Module:  # fmt: skip
    """Quantise every linear of the blocks, in place, and put the delta `adapt` on, if any; returns the model.

    adapt, seed, calibration: as of `deltalab.deltas.adapt.adapt`. streamed: paths that were quantised as they were read.
    Raises: UserError if the model is adapted or quantised already, a matrix does not divide into groups or is not finite, own weights
    that train would be quantised, or as `adapt`. Then the model is as it was.
    """
    if is_adapted(model):
        raise UserError(f"{model_name(model)} is adapted, so it is too late to quantise it.",
                        next="deltalab.unload(model) first, or deltalab.load(name, quantize=..., adapt=...)")  # fmt: skip
    there = {path: m for path, m in block_linears(model, "quantising").items() if path not in streamed}
    done = [path for path, linear in there.items() if is_quantised(linear)]
    if done:
        raise UserError(
            f"{model_name(model)} is quantised already.", found=f"{len(done)} linears, the first is {done[0]}"
        )
    about = Quantising(quantiser, there)
    require_fit(about)
    for path, linear in there.items():
        require_finite(path, linear.weight)  # type: ignore[arg-type]
    if adapt is not None:
        plan = planned(model, adapt)
        require_left(about, plan)
        start(model, plan, fresh=Start(seed, calibration, about))
    deltas, told = attached(model), set(about.told)
    for path in list(there):
        if path in deltas:
            detach(there[path])
        model.set_submodule(path, about.pop(path))
        del there[path]  # nothing else holds the weight that was loaded
        give_back()
        if path in deltas:
            attach(place(model, path), deltas[path])
        if path in told:
            adaptation(model).prepared[path] = mark_of(place(model, path).W)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = Saves(model)  # type: ignore[assignment]
    return model


def require_fit(about: Quantising) -> None:
    """Raises: UserError, naming the linear, if a matrix does not divide into groups."""
    for path in about.linears:
        try:
            about.group(path)
        except UserError as error:
            raise UserError(f"'{path}' cannot be quantised: {error.asked}", found=error.found, nearest=error.nearest,
                            next=error.next) from None  # fmt: skip


def require_finite(path: str, W: Float[Tensor, "rows columns"]) -> None:
    """Raises: UserError if an entry is not finite."""
    if not bool(W.isfinite().all()):
        raise UserError(f"'{path}' cannot be quantised: it holds values that are not finite.")


def require_left(about: Quantising, plan: Planned) -> None:
    """Raises: UserError if a weight that is about to be quantised is meant to train itself."""
    own = [path for path in about.linears if f"{path}.weight" in plan.names]
    if own:
        raise UserError(f"'{own[0]}' is meant to train itself, and codes do not train.", found=f"{len(own)} such linears",
                        next="leave them out of Train, or load without quantize")  # fmt: skip
