"""IA³: activations are rescaled by a trained vector; nothing else is added.

    y = l ⊙ (W x + b)  of keys and values      (Liu et al. 2022, arXiv:2205.05638, §3.3)
    y = W (l ⊙ x) + b  of the last linear of an MLP

As weights: W' = diag(l) W with b' = l ⊙ b, and W' = W diag(l). l starts at one, so the adapted model starts as the base.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.core.spec import build
from deltalab.deltas.base import Base, Delta, WeightDelta
from deltalab.deltas.select import ends_mlp, pattern_matches
from deltalab.deltas.site import Kind, Site
from deltalab.deltas.sites import looked_at
from deltalab.deltas.spec import DeltaSpec


class IA3(DeltaSpec):
    """A trained scale of every selected weight's output, or of its input where it is a feed-forward one.

    targets: keys, values and the last linear of each MLP unless said otherwise; of a fused linear all of its output.
    feedforward: names or patterns of the modules whose input is scaled; None for the last linears of the MLPs, by the
    names that models give them.
    """

    method: Literal["ia3"] = "ia3"
    targets: str | list[str] = "k,v,down"
    feedforward: list[str] | None = None

    peft_type: ClassVar[str | None] = "IA3"
    peft_keys: ClassVar[frozenset[str]] = frozenset({"feedforward_modules", "init_ia3_weights"})
    peft_lacks: ClassVar[frozenset[str]] = frozenset({"bias", "layers_to_transform"})
    sits_on: ClassVar[frozenset[Kind]] = frozenset({"linear", "experts"})

    def build(self, site: Site) -> "IA3Delta":
        return IA3Delta(site, self.scales_input(site.path))

    def scales_input(self, path: str) -> bool:
        """Whether the module at `path` is a feed-forward one."""
        if self.feedforward is None:
            return ends_mlp(path)
        return any(pattern_matches(pattern, path) for pattern in self.feedforward)

    def each(self, paths: Sequence[str]) -> dict[str, Self]:
        """As it is: a module is known by its path. Raises: UserError if a pattern of `feedforward` matches none."""
        for pattern in self.feedforward or []:
            if not any(pattern_matches(pattern, path) for path in paths):
                raise UserError(
                    f"the pattern '{pattern}' of IA3's feedforward matches none of its modules.",
                    found=f"{len(paths)} modules, the first is {paths[0]}",
                )
        return super().each(paths)

    def to_peft(self) -> dict[str, Any]:
        return {"init_ia3_weights": True}

    @classmethod
    def common_peft(cls, parts: dict[str, dict[str, Any]], deltas: Mapping[str, Delta]) -> dict[str, Any] | None:
        feedforward = [path for path, delta in deltas.items() if cast(IA3Delta, delta).of_input]
        return {"init_ia3_weights": True, "feedforward_modules": feedforward}

    @classmethod
    def whole_peft(cls, config: dict[str, Any], paths: list[str]) -> dict[str, Any]:
        """peft wants the feed-forward modules to be among the targets, by the same names."""
        feedforward, targets = config["feedforward_modules"], config["target_modules"]
        named = [name for name in targets if any(path.endswith(name) for path in feedforward)]
        if [path for path in paths if _in_peft(named, path)] == feedforward:
            return {**config, "feedforward_modules": named}
        return {**config, "target_modules": paths}

    @classmethod
    def from_peft(cls, config: dict[str, Any], paths: list[str]) -> Self:
        if config.get("init_ia3_weights") is False and not config.get("inference_mode"):  # peft's word for a saved one
            raise UserError("init_ia3_weights=False is not supported: the scales would start at random.")
        wanted = config.get("feedforward_modules")
        feedforward = None if wanted is None else [path for path in paths if _in_peft(wanted, path)]
        return build(cls, {"targets": paths, "feedforward": feedforward}, "the adapter's config")


class IA3Delta(WeightDelta):
    """W' = diag(l) W, or W diag(l) with `of_input`; of experts, each its own.

    An output's scale takes the bias with it, so it is scaled in the merged model too. Not so under `keep`, which lets
    entries of W change and nothing else, and in experts, whose biases their module adds by itself.
    """

    l: Float[nn.Parameter, "*e n"]  # noqa: E741 - the paper's letter

    def __init__(self, site: Site, of_input: bool) -> None:
        super().__init__()
        *experts, out, in_ = site.shape
        self.of_input = of_input
        self.l = nn.Parameter(torch.empty(*experts, in_ if of_input else out, dtype=site.dtype, device=site.device))

    def init(self, generator: torch.Generator) -> None:
        nn.init.ones_(self.l)

    def forward(self, x: Tensor, base: Base) -> Float[Tensor, "*lead out"]:
        return base(self.scaled(x)) if self.of_input else self.scaled(base(x))

    def scaled(self, x: Float[Tensor, "*lead n"]) -> Float[Tensor, "*lead n"]:
        """l ⊙ x as x + (l − 1) ⊙ x: near one, a 16-bit l would step by .8 %."""
        return torch.addcmul(x, x, (self.l - 1).to(x.dtype))

    def change(self, W: Tensor) -> Float[Tensor, "*e out in"]:
        return self.kept((self.l - 1).unsqueeze(-2 if self.of_input else -1) * looked_at(W, "IA3"))

    def adapted_bias(self, bias: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        return bias if self.of_input or self.keep is not None else self.scaled(bias)

    def to_peft(self) -> dict[str, Tensor]:
        return {"ia3_l": self.l.unsqueeze(-2 if self.of_input else -1)}  # (1, in) or (out, 1)

    def extra_repr(self) -> str:
        return f"{self.l.shape[-1]} {'inputs' if self.of_input else 'outputs'}"


def _in_peft(wanted: str | Sequence[str], path: str) -> bool:
    """Whether peft's `feedforward_modules` means a module: an expression for its path, or ends of it."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path.endswith(name) for name in wanted)
