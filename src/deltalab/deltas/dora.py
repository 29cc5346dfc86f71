"""DoRA: a weight's direction changes by a low-rank matrix, its rows' lengths by a vector of their own.

    W' = m ⊙ V / ‖V‖,   V = W + s · B A,   ‖·‖ of each row      (Liu et al. 2024, arXiv:2402.09353, eq. 5)

m starts as ‖W‖ and B at zero, so the adapted model starts as the base. The backward takes ‖V‖ for a constant (§4.3
there). Neither V nor B A is formed in the forward: with ‖W‖² remembered,

    ‖V‖² = ‖W‖² + 2 s · rowsum(W Aᵀ ⊙ B) + s² · rowsum(B (A Aᵀ) ⊙ B)
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.base import Base, Delta, Dropout, WeightDelta, acting, wide
from deltalab.deltas.lowrank import LowRankSpec, kaiming, low_rank
from deltalab.deltas.site import Kind, Site
from deltalab.deltas.sites import looked_at, place
from deltalab.deltas.spec import Start
from deltalab.kernels import triton
from deltalab.kernels.linear import LowRank

NEUTRAL = (False, "gaussian", "orthogonal", "eva")
"""Values of peft's `init_lora_weights` that leave the base weight alone: of an adapter that is saved they say nothing."""


class DoRA(LowRankSpec):
    """A low-rank change of every row's direction, and a trained length of each row."""

    method: Literal["dora"] = "dora"

    peft_keys: ClassVar[frozenset[str]] = LowRankSpec.peft_keys | {"use_dora"}
    peft_on: ClassVar[frozenset[Kind]] = frozenset({"linear", "embedding"})
    sits_on: ClassVar[frozenset[Kind]] = frozenset({"linear", "embedding", "experts"})

    def build(self, site: Site) -> "DoRADelta":
        return DoRADelta(site, self.r, self.scale, self.dropout)

    @torch.no_grad()
    def begin(self, model: nn.Module, deltas: Mapping[str, Delta], start: Start) -> None:
        """Each m is set to the lengths of the weight's rows, of one that is being quantised to those that it will have.

        Raises: UserError for a weight that is kept in another quantiser's codes.
        """
        for path, delta in deltas.items():
            W = place(model, path).W
            if start.quantising is not None and path in start.quantising:
                W = start.quantising.quantiser.round_trip(W).to(W.dtype)
            delta = cast(DoRADelta, delta)
            delta.m.copy_(delta.norm(W))

    def to_peft(self) -> dict[str, Any]:
        return {**super().to_peft(), "use_dora": True}

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "LORA" and bool(config.get("use_dora"))

    @classmethod
    def from_peft(cls, config: dict[str, Any], paths: list[str]) -> Self:
        begun = config.get("init_lora_weights", True)
        if begun is not True and not (config.get("inference_mode") and begun in NEUTRAL):  # peft's word for a saved one
            raise UserError(
                f"init_lora_weights={begun!r} is not supported together with use_dora.",
                next="init_lora_weights=True, or merge a trained adapter into its base model with peft",
            )
        return super().from_peft(config, paths)


class DoRADelta(WeightDelta):
    """W' = m ⊙ V / ‖V‖ with V = W + s · B A; of experts, each its own."""

    A: Float[nn.Parameter, "*e r in"]
    B: Float[nn.Parameter, "*e out r"]
    m: Float[nn.Parameter, "*e out"]

    def __init__(self, site: Site, r: int, s: float, dropout: float) -> None:
        super().__init__()
        *experts, out, in_ = site.shape
        self.kind, self.s = site.kind, s
        self.A = nn.Parameter(torch.empty(*experts, r, in_, dtype=site.dtype, device=site.device))
        self.B = nn.Parameter(torch.empty(*experts, out, r, dtype=site.dtype, device=site.device))
        self.m = nn.Parameter(torch.empty(*experts, out, dtype=site.dtype, device=site.device))
        self.drop = Dropout(dropout) if dropout else nn.Identity()
        self._squares: tuple[Any, Tensor] | None = None

    def init(self, generator: torch.Generator) -> None:
        if self.kind == "embedding":  # a row of A is one token's: as LoRA does there, it is A that starts at zero
            nn.init.zeros_(self.A)
            with torch.no_grad():
                self.B.copy_(torch.randn(self.B.shape, generator=generator, dtype=self.B.dtype))
        else:
            kaiming(self.A, generator)
            nn.init.zeros_(self.B)
        nn.init.ones_(self.m)  # until `begin`, which sees W

    def forward(self, x: Tensor, base: Base) -> Float[Tensor, "*lead out"]:
        """W x + ΔW drop(x): where anything is dropped, that takes a second product with W, as in the authors' code."""
        y = base(x)
        dropped = self.drop(x)
        straight = y if dropped is x or not self.training else base(dropped)
        if base.bias is not None:
            straight = straight - base.bias
        turned = (self.s * low_rank(dropped, self.A, self.B)).to(y.dtype)
        stretch = (self.ratio(base.W) - 1).to(y.dtype)  # exactly 0 at the start
        return y + turned + stretch * (straight + turned)

    def form(self, weight: Callable[[], Tensor]) -> LowRank | None:
        """None where anything is dropped: the stretch is then of another product with W."""
        if self.kind != "linear" or acting(self.drop):
            return None
        return LowRank(self.A, self.B, self.s, stretch=self.ratio(weight(), rounded=True))

    def change(self, W: Tensor) -> Float[Tensor, "*e out in"]:
        low = self.s * self.B @ self.A
        return self.kept(low + (self.ratio(W) - 1).unsqueeze(-1) * (W + low))

    def ratio(self, W: Tensor, *, rounded: bool = False) -> Float[Tensor, "*e out"]:
        """m / ‖V‖; its gradient is that of m alone."""
        return self.m / self.constant(self.norm(W, rounded=rounded))

    @torch.no_grad()
    def norm(self, W: Tensor, *, rounded: bool = False) -> Float[Tensor, "*e out"]:
        """‖V‖ of each row, in fp32 or wider, never 0. rounded: W Aᵀ, where the change is, in W's own dtype.

        Raises: UserError for a quantised weight.
        """
        W = looked_at(W, "DoRA")
        dtype = torch.promote_types(wide(W.dtype), self.A.dtype)
        if dtype is torch.float32 and W.ndim == 2 and len(self.A) <= triton.RANK and triton.available(W):
            from deltalab.kernels.triton.dora_norm import row_squares

            whole = row_squares(W, self.A, self.B, self.s)
        else:
            A, B = self.A.to(dtype), self.B.to(dtype)
            product = W.dtype if rounded else dtype
            cross = ((W.to(product) @ A.mT.to(product)).to(dtype) * B).sum(-1)
            square = ((B @ (A @ A.mT)) * B).sum(-1)
            whole = self.squares(W, dtype) + 2 * self.s * cross + self.s**2 * square
        return whole.clamp_min(0).sqrt().clamp_min(torch.finfo(dtype).tiny)  # a row of zeros stays one

    def squares(self, W: Tensor, dtype: torch.dtype) -> Float[Tensor, "*e out"]:
        """‖W‖² of each row, remembered until W is another tensor or has been written to."""
        kept = W if W._base is None else W._base
        mortal = not isinstance(kept, nn.Parameter) or W.is_inference()  # made for this call, or writes are not counted
        if mortal or torch.compiler.is_compiling():
            return W.to(dtype).square().sum(-1)
        key = (W.data_ptr(), W._version, W.dtype, W.device, dtype)
        if self._squares is None or self._squares[0] != key:
            self._squares = key, W.to(dtype).square().sum(-1)
        return self._squares[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moved or cast, and the weight with it: a new one may lie where the old one did."""
        self._squares = None
        return super()._apply(fn, recurse)

    def to_peft(self) -> dict[str, Tensor]:
        A, B = (
            ("lora_embedding_A", "lora_embedding_B") if self.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        )
        return {A: self.A, B: self.B, "lora_magnitude_vector": self.m}

    def extra_repr(self) -> str:
        return f"r={self.A.shape[-2]}, s={self.s:g}"
