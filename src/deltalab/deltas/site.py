"""One place that a delta is built for."""

from typing import Literal, NamedTuple

import torch
from torch import nn

Kind = Literal["linear", "embedding", "experts", "attention", "mlp"]
"""Where a delta can sit: on a weight (of a linear, Conv1D included; of an embedding; of experts held as one 3-D
parameter) or round a whole sub-layer of a block, its attention or its MLP."""


HEADS = 11 << 10
"""Heads of an attention that a delta is built for without one, to see what trains: a number that no model has."""


class Site(NamedTuple):
    """One place that a delta is built for. shape: (out, in), (experts, out, in), or of a sub-layer (hidden, hidden).
    dtype: of the delta's parameters.

    group: inputs that share a scale where the weight is group-quantised. module: a sub-layer itself. quantised: whether the
    weight is kept as codes, or will be.
    """

    path: str
    shape: tuple[int, ...]
    kind: Kind
    dtype: torch.dtype
    device: torch.device
    group: int | None = None
    module: nn.Module | None = None
    quantised: bool = False
