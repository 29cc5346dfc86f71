"""VeRA: a low-rank change whose matrices are random and shared; only two vectors a module train.

    y = W x + b ⊙ (B (d ⊙ (A x)))      (Kopiczko et al. 2023, arXiv:2310.11454, eq. 2)

A (r, in) and B (out, r) are drawn from a seed and never train; every module of the group reads its corner of one pair as
large as the largest of them. d (r,) starts at a small constant, b (out,) at zero, so the adapted model starts as the base.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from deltalab.core.shapes import Float
from deltalab.core.spec import build
from deltalab.deltas.base import Base, Delta, Dropout, Factors, WeightDelta, through
from deltalab.deltas.site import Kind, Site
from deltalab.deltas.spec import DeltaSpec


class VeRA(DeltaSpec):
    """Trained scalings of one shared random low-rank change.

    r: rank of the change; it costs r + out parameters a module, so it is chosen far larger than LoRA's.
    dropout: probability that an entry of the delta's input is dropped in training.
    d_initial: what d starts at. projection_seed: what A and B are drawn from, together with the largest in and out of
    the modules. save_projection: whether A and B are written beside the vectors; if not, the file relies on the reader's
    torch drawing the same numbers.
    """

    method: Literal["vera"] = "vera"
    r: int = Field(256, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    d_initial: float = Field(0.1, allow_inf_nan=False)
    projection_seed: int = Field(0, ge=0)
    save_projection: bool = True

    peft_type: ClassVar[str | None] = "VERA"
    peft_keys: ClassVar[frozenset[str]] = frozenset(
        {"r", "vera_dropout", "d_initial", "projection_prng_key", "save_projection", "init_weights"}
    )
    peft_biases: ClassVar[str] = "vera_only"
    sits_on: ClassVar[frozenset[Kind]] = frozenset({"linear", "experts"})

    def build(self, site: Site) -> "VeRADelta":
        return VeRADelta(site, self)

    def join(self, deltas: Mapping[str, Delta]) -> None:
        """One pair of projections, as large as the largest module, for all."""
        own = _veras(deltas)
        in_, out = max(delta.in_ for delta in own), max(delta.out for delta in own)
        largest = Projections(self.projection_seed, self.r, in_, out)
        largest.on(own[0].d.device, own[0].d.dtype)  # drawn now: a compiled forward has no generators
        for delta in own:
            delta.shared = largest

    def to_peft(self) -> dict[str, Any]:
        return {"r": self.r, "vera_dropout": self.dropout, "d_initial": self.d_initial, "init_weights": True,
                "projection_prng_key": self.projection_seed, "save_projection": self.save_projection}  # fmt: skip

    @classmethod
    def common_peft(cls, parts: dict[str, dict[str, Any]], deltas: Mapping[str, Delta]) -> dict[str, Any] | None:
        """None also where two groups have each their own projections: peft's file has room for one pair."""
        one_pair = len({id(delta.shared) for delta in _veras(deltas)}) == 1
        return super().common_peft(parts, deltas) if one_pair else None

    @classmethod
    def from_peft(cls, config: dict[str, Any], paths: list[str]) -> Self:
        names = {"r": "r", "dropout": "vera_dropout", "d_initial": "d_initial",
                 "projection_seed": "projection_prng_key", "save_projection": "save_projection"}  # fmt: skip
        fields = {own: config[theirs] for own, theirs in names.items() if theirs in config}
        return build(cls, {"targets": paths, **fields}, "the adapter's config")

    def shared_to_peft(self, deltas: Mapping[str, Delta]) -> dict[str, Tensor]:
        first = _veras(deltas)[0]
        A, B = first.shared.on(first.d.device, torch.float32)
        return {"vera_A": A, "vera_B": B} if self.save_projection else {}

    def shared_from_peft(self, deltas: Mapping[str, Delta], tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            return
        read = _veras(deltas)[0].shared.unless_drawn(tensors["vera_A"], tensors["vera_B"])
        for delta in _veras(deltas):
            delta.shared = read


class Projections:
    """A (r, in) and B (out, r), drawn on the CPU when first asked for, and kept once for each device and dtype.

    A value: it never changes, so copies of a model share it. It is no module and holds no parameter, so neither moving a
    model nor its state dict multiplies it; pickled, it is its seed and sizes, and its tensors only if they came from a file.
    """

    def __init__(self, seed: int, r: int, in_: int, out: int, read: tuple[Tensor, Tensor] | None = None) -> None:
        self.seed, self.r, self.in_, self.out, self.read = seed, r, in_, out, read
        self._kept: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """A and B there."""
        key = (device, dtype)
        if key not in self._kept:
            A, B = self.read or self._drawn(device)
            self._kept[key] = A.to(device, dtype), B.to(device, dtype)
        return self._kept[key]

    def unless_drawn(self, A: Float[Tensor, "r in"], B: Float[Tensor, "out r"]) -> "Projections":
        """Self where A and B are what the seed gives, else projections that hold them."""
        drawn = self._drawn(torch.device("cpu"))
        if torch.equal(A, drawn[0]) and torch.equal(B, drawn[1]):
            return self
        return Projections(self.seed, self.r, self.in_, self.out, (A.cpu(), B.cpu()))

    def _drawn(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Kaiming's uniform, on ±√(6 / fan in): as peft draws them, A first. On the meta device: shapes alone."""
        shapes = (self.r, self.in_), (self.out, self.r)
        if device.type == "meta":
            return torch.empty(shapes[0], device=device), torch.empty(shapes[1], device=device)
        generator = torch.Generator().manual_seed(self.seed)
        bounds = [math.sqrt(6 / fan_in) for _, fan_in in shapes]
        A, B = (
            torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            for shape, bound in zip(shapes, bounds, strict=True)
        )
        return A, B

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


class VeRADelta(WeightDelta):
    """ΔW = diag(b) B diag(d) A, with A and B the corner of the shared projections that fits this module."""

    d: Float[nn.Parameter, "*e r"]
    b: Float[nn.Parameter, "*e out"]

    def __init__(self, site: Site, spec: VeRA) -> None:
        super().__init__()
        *experts, self.out, self.in_ = site.shape
        self.d_initial = spec.d_initial
        self.shared = Projections(spec.projection_seed, spec.r, self.in_, self.out)  # its own until `join`
        self.d = nn.Parameter(torch.empty(*experts, spec.r, dtype=site.dtype, device=site.device))
        self.b = nn.Parameter(torch.empty(*experts, self.out, dtype=site.dtype, device=site.device))
        self.drop = Dropout(spec.dropout) if spec.dropout else nn.Identity()

    def init(self, generator: torch.Generator) -> None:
        nn.init.constant_(self.d, self.d_initial)
        nn.init.zeros_(self.b)

    def corner(self, device: torch.device, dtype: torch.dtype) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """A and B of this module."""
        A, B = self.shared.on(device, dtype)
        return A[:, : self.in_], B[: self.out]

    def forward(self, x: Tensor, base: Base) -> Float[Tensor, "*lead out"]:
        y = base(x)
        A, B = self.corner(x.device, x.dtype)
        low = through(self.drop(x), A)  # (*lead, r)
        high = F.linear(low * self.d.to(low.dtype), B.to(low.dtype))
        return y + (high * self.b.to(high.dtype)).to(y.dtype)

    def change(self, W: Tensor) -> Float[Tensor, "*e out in"]:
        A, B, _ = self.factors()
        return self.kept(B @ A)

    def factors(self) -> Factors:
        A, B = self.corner(self.d.device, self.d.dtype)
        return Factors(self.d.unsqueeze(-1) * A, self.b.unsqueeze(-1) * B, 1.0)

    def to_peft(self) -> dict[str, Tensor]:
        return {"vera_lambda_d": self.d, "vera_lambda_b": self.b}

    def extra_repr(self) -> str:
        return f"r={self.d.shape[-1]}, projections {self.shared.r} × ({self.shared.in_}, {self.shared.out})"


def _veras(deltas: Mapping[str, Delta]) -> list[VeRADelta]:
    return [delta for delta in deltas.values() if isinstance(delta, VeRADelta)]
