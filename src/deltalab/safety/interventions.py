"""What a model does without a group of its weights: the entries zeroed for the time of a block.

Wei et al. 2024 (arXiv:2402.05162, §4) remove weights to see which ones carry a behaviour. Here the weights themselves are
not written to: a delta takes them away, ΔW = −W at the entries and zero elsewhere, and leaves with the block.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.attach import attach, detach
from deltalab.deltas.base import Base, WeightDelta, weight_of
from deltalab.deltas.select import model_name
from deltalab.deltas.sites import Place, linears
from deltalab.deltas.weights import attached
from deltalab.safety.groups import Group


class Zeroed(WeightDelta):
    """ΔW = −W where `keep` is True: the weight without these entries."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.keep = mask

    def init(self, generator: torch.Generator) -> None:
        """Nothing to set: it has no parameters."""

    def forward(self, x: Tensor, base: Base) -> Float[Tensor, "*lead out"]:
        raise NotImplementedError  # `keep` is always set, so that `masked` is called

    def change(self, W: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return self.kept(-W)


@contextlib.contextmanager
def zeroed(model: nn.Module, group: Group) -> Iterator[nn.Module]:
    """`model` with the group's entries at zero, for the time of the block; afterwards as it was, bit for bit.

    Raises: UserError if the model is adapted, or lacks a matrix of the group.
    """
    if attached(model):
        raise UserError(
            f"{model_name(model)} is adapted, and its weights are zeroed as they were loaded.",
            next="deltalab.unload(model) first, or zero the merged model: deltalab.merged(model)",
        )
    modules = linears(model)
    if missing := [path for path in group if path not in modules]:
        raise UserError(f"group '{group.name}' is of another model: {model_name(model)} has no '{missing[0]}'.")
    done: list[nn.Module] = []
    try:
        for path in group:
            if group.counts[path]:
                attach(
                    Place(modules[path], "weight", "linear"),
                    Zeroed(group.mask(path).to(weight_of(modules[path]).device)),
                )
                done.append(modules[path])
        yield model
    finally:
        for linear in done:
            detach(linear)
