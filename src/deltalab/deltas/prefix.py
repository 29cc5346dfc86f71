"""ZeroInitPrefix: zero-init attention, a few trained prompts beside a layer's tokens, behind a gate that starts closed.

    y = softmax(c·q Kᵀ + mask) V + γ(g)·softmax(c·q K_pᵀ) V_p      (Zhang et al. 2023, arXiv:2303.16199, §3.2)

for each head, before the output projection; c is the layer's own scale, 1/√d. K_p and V_p are what the layer's own frozen
projections make of the prompts P (length, hidden): keys without a position, that no mask hides. The softmaxes are two, so
that the prompts take nothing from the tokens. γ is tanh or the identity, g one number a head or a layer. It starts at zero,
where the adapted model is the base. The term depends on the query: there is no weight that computes it, and it does not merge.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.core.spec import build
from deltalab.deltas.attention import beside_tokens, heads_of, require_routed
from deltalab.deltas.base import Base, Delta
from deltalab.deltas.heads import gated
from deltalab.deltas.select import leaf, model_name
from deltalab.deltas.site import HEADS, Kind, Site
from deltalab.deltas.sites import base_modules, place, sublayers
from deltalab.deltas.spec import DeltaSpec
from deltalab.deltas.sublayers import select_sublayers

PEFT_MODELS = ("llama", "mistral", "gpt2")


class ZeroInitPrefix(DeltaSpec):
    """Gated prompts in the attentions of the blocks.

    targets: `attention`, or attentions by name or pattern. top: so many of them, counted from the last block; None for all.
    length: prompts a layer. gate: γ. gate_per: one number for each `head`, or for the whole `layer`. std: of the prompts
    at the start, drawn from a normal.
    """

    method: Literal["zero_init_prefix"] = "zero_init_prefix"
    targets: str | list[str] = "attention"
    length: Annotated[int, Field(ge=1)] = 10
    top: Annotated[int, Field(ge=1)] | None = None
    gate: Literal["tanh", "linear"] = "tanh"
    gate_per: Literal["head", "layer"] = "head"
    std: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.02

    peft_type: ClassVar[str | None] = "ADAPTION_PROMPT"
    peft_keys: ClassVar[frozenset[str]] = frozenset({"adapter_len", "adapter_layers"})
    peft_lacks: ClassVar[frozenset[str]] = frozenset({"bias", "layers_to_transform", "modules_to_save"})
    peft_on: ClassVar[frozenset[Kind]] = frozenset({"attention"})
    sits_on: ClassVar[frozenset[Kind]] = frozenset({"attention"})

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.top is not None and self.layers is not None:
            raise ValueError("top and layers both choose blocks: name one")
        return self

    def chosen(self, model: nn.Module) -> list[str]:
        """Raises: UserError also for a model whose attentions are no modules of their own, or fewer than `top`."""
        found = select_sublayers(model, self.targets, self.layers)
        if self.targets in ("attention", ["attention"]):
            _require_modules(model, found, type(self).__name__)
        if self.top is not None and self.top > len(found):
            raise UserError(
                f"top={self.top} asks for more attentions than {model_name(model)} has.", found=str(len(found))
            )
        return found if self.top is None else found[-self.top :]

    def build(self, site: Site) -> "ZeroInitPrefixDelta":
        if site.module is None:  # the outline of one, that nothing runs
            return ZeroInitPrefixDelta(site, HEADS, self)
        require_routed(site.path, site.module, type(self).__name__)
        return ZeroInitPrefixDelta(site, heads_of(site.module), self)

    def to_peft(self) -> dict[str, Any]:
        scalar = self.gate == "linear" and self.gate_per == "layer"
        return {"adapter_len": self.length} | ({} if scalar else {"gate": self.gate})

    @classmethod
    def common_peft(cls, parts: dict[str, dict[str, Any]], deltas: Mapping[str, Delta]) -> dict[str, Any] | None:
        """None where the gate is none that peft has: one number a layer, as it is."""
        common = super().common_peft(parts, deltas)
        return None if common is None or "gate" in common else common

    @classmethod
    def peft_place(cls, model: nn.Module, paths: list[str]) -> dict[str, Any] | None:
        kind, name = model.config.model_type, leaf(paths[0])  # type: ignore[union-attr]
        if kind not in PEFT_MODELS or _named(model, name)[-len(paths) :] != paths:
            return None
        _warn_of(model, paths)
        return {"target_modules": name, "adapter_layers": len(paths)}

    @classmethod
    def peft_paths(cls, model: nn.Module, config: dict[str, Any]) -> list[str]:
        """Raises: UserError for a name or a number that the model does not have."""
        name, count = config.get("target_modules"), config.get("adapter_layers")
        odd = [key for key in ("exclude_modules", "layers_to_transform") if config.get(key)]
        if odd:
            raise UserError(f"the adapter's config has {odd[0]}, which an adaption prompt of peft has not.")
        own = [path for path, where in sublayers(model).items() if where.kind == "attention"]
        there = own if name is None else _named(model, str(name))
        if not isinstance(count, int) or not 0 < count <= len(there):
            raise UserError(
                f"the adapter's config asks for the last {count} modules called {name!r} of {model_name(model)}.",
                found=f"{len(there)} of them",
                next="load it on the model that it was trained on",
            )
        return there[-count:]

    @classmethod
    def from_peft(cls, config: dict[str, Any], paths: list[str]) -> Self:
        gate = {"gate": "linear", "gate_per": "layer", "std": 1.0}  # peft's prompts begin at a standard normal
        fields = {"targets": paths, "length": config.get("adapter_len"), **gate}
        return build(cls, fields, "the adapter's config")

    def begin_again(self, model: nn.Module, deltas: Mapping[str, Delta]) -> None:
        _warn_of(model, list(deltas))


class ZeroInitPrefixDelta(Delta):
    """y + γ(g)·softmax(c·q K_pᵀ) V_p, in place of the heads y that the attention function gives."""

    P: Float[nn.Parameter, "length hidden"]
    g: Float[nn.Parameter, " gates"]

    def __init__(self, site: Site, heads: int, spec: ZeroInitPrefix) -> None:
        super().__init__()
        gates = heads if spec.gate_per == "head" else 1
        self.std, self.tanh = spec.std, spec.gate == "tanh"
        self.P = nn.Parameter(torch.empty(spec.length, site.shape[0], dtype=site.dtype, device=site.device))
        self.g = nn.Parameter(torch.empty(gates, dtype=site.dtype, device=site.device))
        self.gathers = False
        self.squares: Tensor | None = None

    def init(self, generator: torch.Generator) -> None:
        drawn = torch.randn(self.P.shape, generator=generator, dtype=self.P.dtype)
        with torch.no_grad():
            self.P.copy_(self.std * drawn)
        nn.init.zeros_(self.g)

    @property
    def opening(self) -> Float[Tensor, " gates"]:
        """γ(g)."""
        return torch.tanh(self.g) if self.tanh else self.g

    def forward(self, x: Float[Tensor, "batch seq hidden"], base: Base) -> Float[Tensor, "batch seq hidden"]:
        return base(x)

    def within(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(beside_tokens, forward, self.P, self.add)

    def add(self, y: Float[Tensor, "batch seq heads d"], term: Tensor) -> Float[Tensor, "batch seq heads d"]:
        """The heads with the gated term; where the gate is zero bitwise y."""
        opening = self.opening.to(y.dtype)[:, None]  # (heads or 1, 1)
        with torch.no_grad():
            wide = torch.promote_types(y.dtype, torch.float32)
            sizes = torch.linalg.vector_norm(term, dim=(0, 1, 3), dtype=wide) * opening[:, 0]
            squares = torch.stack([sizes.square().sum(), torch.linalg.vector_norm(y, dtype=wide).square()])
            self.squares = squares if self.squares is None or not self.gathers else self.squares + squares
        return gated(y, opening, term.to(y.dtype))

    def measures(self) -> dict[str, float]:
        """The gates' mean and largest |γ(g)|; contribution: the added term's norm over that of the heads, once there was a forward."""
        opening = self.opening.detach().abs()
        told = {"gate": float(opening.mean()), "gate_max": float(opening.max())}
        if self.squares is None:
            return told
        term, heads = self.squares.tolist()
        return {**told, "contribution": (term / heads) ** 0.5 if heads else 0.0}

    def gather(self, on: bool) -> None:
        self.gathers = on
        self.squares = None if on else self.squares

    def to_peft(self) -> dict[str, Tensor]:
        return {"adaption_prompt": self.P[None], "adaption_gate": self.g}

    def extra_repr(self) -> str:
        length, hidden = self.P.shape
        return f"{length} × {hidden}, {'tanh' if self.tanh else 'linear'} gates: {len(self.g)}"


def _named(model: nn.Module, name: str) -> list[str]:
    """The modules of this name, as peft finds them, in model order."""
    return [path for path, _ in base_modules(model) if path.endswith("." + name)]


def _require_modules(model: nn.Module, paths: list[str], method: str) -> None:
    there = sublayers(model)
    other = [path for path in paths if path not in there]
    if other:
        raise UserError(
            f"{method} does not go on a {type(model).__name__}: its attention is no module of its own from hidden states to hidden states.",
            found=f"the nearest is '{other[0]}'",
            next="take a method that goes on linears, see deltalab methods",
        )


def _warn_of(model: nn.Module, paths: list[str]) -> None:
    """Where peft, with the same tensors, computes something else than the paper and this module."""
    module = place(model, paths[0]).module
    output = getattr(module, "o_proj", None)
    why = (
        "after the output projection, here before it, as in the paper" if output is None
        else "through the output projection with its bias, which counts twice there, here once" if output.bias is not None
        else ""
    )  # fmt: skip
    if why:
        warnings.warn(
            f"peft adds the prompts' term of this model {why}: the same file computes something else there.",
            stacklevel=2,
        )
