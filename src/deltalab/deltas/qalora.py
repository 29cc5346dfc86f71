"""QA-LoRA: a low-rank change that a group-quantised weight can take in exactly.

    y = W x + s · B (A pool(x)),   pool(x)_k = mean of x over group k,   s = α / r      (Xu et al. 2023, arXiv:2309.14717)

    ΔW[i, j] = (s / g) · (B A)[i, k(j)],   k(j) the group of g inputs that j lies in

ΔW is constant within a group, so Ŵ + ΔW = scale · code + (offset + ΔW): merging adds to the offsets, and codes and scales
stay as they are. A (r, in / g) is g times smaller than LoRA's. The paper pools with the plain mean, as here; peft's
`use_qalora` multiplies it by the number of groups and does not merge, so the two are not exchanged.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.base import Base, Dropout, Factors, WeightDelta
from deltalab.deltas.lowrank import LowRankSpec, kaiming, low_rank
from deltalab.deltas.site import Site
from deltalab.quant.groups import default_group, require_group


class QALoRA(LowRankSpec):
    """Low-rank adaptation of group means.

    group_size: inputs in a group; None for the quantiser's, and on a linear that is not group-quantised for the largest
    that divides its inputs into two groups or more, at most 32.
    """

    method: Literal["qalora"] = "qalora"
    group_size: int | None = Field(None, ge=1)

    peft_type: ClassVar[str | None] = None
    peft_keys: ClassVar[frozenset[str]] = frozenset()

    def build(self, site: Site) -> "QALoRADelta":
        return QALoRADelta(site, self.r, self.scale, self.dropout, self.group(site))

    def group(self, site: Site) -> int:
        """g on this weight.

        Raises: UserError if it does not divide the inputs, or the change could not be merged into offsets: it is no
        multiple of the quantiser's, or the weight is quantised without groups.
        """
        inputs = site.shape[-1]
        if site.quantised and site.group is None:
            raise UserError(
                f"QALoRA merges into the offsets of groups, and '{site.path}' is quantised without any.",
                next="quantize='int4-group', or LoRA on this base",
            )
        if self.group_size is None:
            return default_group(inputs) if site.group is None else site.group
        require_group(inputs, self.group_size)
        if site.group is not None and self.group_size % site.group:
            raise UserError(
                f"QALoRA with groups of {self.group_size} does not fit '{site.path}', quantised in groups of {site.group}.",
                next=f"leave group_size out, or a multiple of {site.group}",
            )
        return self.group_size

    def to_peft(self) -> dict[str, Any]:
        raise NotImplementedError


class QALoRADelta(WeightDelta):
    """ΔW = (s / g) · B A, each column g times."""

    A: Float[nn.Parameter, "r groups"]
    B: Float[nn.Parameter, "out r"]

    def __init__(self, site: Site, r: int, s: float, dropout: float, g: int) -> None:
        super().__init__()
        out, in_ = site.shape
        self.s, self.g = s, g
        self.A = nn.Parameter(torch.empty(r, in_ // g, dtype=site.dtype, device=site.device))
        self.B = nn.Parameter(torch.empty(out, r, dtype=site.dtype, device=site.device))
        self.drop = Dropout(dropout) if dropout else nn.Identity()

    def init(self, generator: torch.Generator) -> None:
        kaiming(self.A, generator)
        nn.init.zeros_(self.B)

    def forward(self, x: Float[Tensor, "*lead in"], base: Base) -> Float[Tensor, "*lead out"]:
        y = base(x)
        means = self.drop(x).unflatten(-1, (-1, self.g)).mean(-1)  # (*lead, in / g)
        return y + (self.s * low_rank(means, self.A, self.B)).to(y.dtype)

    def change(self, W: Tensor) -> Float[Tensor, "out in"]:
        groups = self.s / self.g * (self.B @ self.A)  # one value a group, repeated as it is: bitwise constant there
        return self.kept(groups.repeat_interleave(self.g, dim=-1))

    def factors(self) -> Factors:
        return Factors(self.A.repeat_interleave(self.g, dim=-1) / self.g, self.B, self.s)

    def extra_repr(self) -> str:
        return f"r={self.A.shape[0]}, s={self.s:g}, g={self.g}"
