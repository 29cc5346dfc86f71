"""How the inputs of a model's linears are distributed: their mean and scatter, streamed over batches."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from deltalab.capture import inputs, undisturbed
from deltalab.core.shapes import Float
from deltalab.deltas.base import shape_of, wide

AT_ONCE = 1 << 32
"""Bytes of scatter matrices held at a time; more modules than fit take another pass over the batches."""


class Moments:
    """Count, mean and scatter Σ (x − mean)(x − mean)ᵀ of vectors, batch by batch (Chan et al. 1979), in fp32 or wider."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = torch.zeros(())

    def add(self, x: Float[Tensor, "n in"]) -> None:
        """Take in n vectors."""
        if not len(x):
            return
        x = x.to(wide(x.dtype))
        mean, total = x.mean(0), self.count + len(x)
        x = x - mean
        if not self.count:
            self.count, self.mean, self.scatter = total, mean, x.mT @ x
            return
        away = mean - self.mean
        self.scatter += x.mT @ x + (self.count * len(x) / total) * torch.outer(away, away)
        self.mean += away * (len(x) / total)
        self.count = total


def moments(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Tensor]]
) -> Iterator[tuple[str, Moments]]:
    """(path, moments of the inputs) of each linear in `modules`, over the tokens that count in `batches`.

    Those are the ones that the attention mask shows, and of these the ones with a label where labels are given.
    """
    device = next(model.parameters()).device
    for part in _parts(modules):
        found = {path: Moments() for path in part}
        counted: list[Tensor | None] = [None]

        def take(
            path: str, x: Tensor, found: dict[str, Moments] = found, counted: list[Tensor | None] = counted
        ) -> None:
            rows = x.reshape(-1, x.shape[-1])
            mask = counted[0]
            found[path].add(rows if mask is None or len(mask) != len(rows) else rows[mask.to(rows.device)])

        with undisturbed(model), torch.no_grad(), inputs(part, take):
            for batch in batches:
                counted[0] = _counted(batch)
                model(**{key: value.to(device) for key, value in batch.items()})
        yield from found.items()


def _counted(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens of a batch count, flat; None for all."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is None or labels is None or mask.shape != labels.shape:  # an encoder's inputs have no labels of their own
        return None if mask is None else mask.flatten().bool()
    return mask.flatten().bool() & (labels.flatten() != -100)


def _parts(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """The modules, as many at a time as AT_ONCE has room for the moments of."""
    part: dict[str, nn.Module] = {}
    room = AT_ONCE
    for path, module in modules.items():
        size = 4 * shape_of(module)[1] ** 2
        if part and room < size:
            yield part
            part, room = {}, AT_ONCE
        part[path] = module
        room -= size
    if part:
        yield part
