"""Parameter masks: which of the model's own parameters train, and which entries of a matrix must not move.

Freezing entries takes more than zeroing their gradients: decoupled weight decay and an optimizer's momentum still move
them, and under a weight delta the base is frozen anyway while the merged weight W + ΔW moves. So there are variants:

    exact        gradients zeroed, and the entries put back after each optimizer step; bitwise
    delta_mask   the delta's change is zero there, in training and in the merged model
    none         nothing is held; `proof` still says how far the entries moved
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.shapes import Bool
from deltalab.deltas.adapt import attached, merged_weight
from deltalab.deltas.base import ParameterSpec, WeightDelta, as_stored, weight_of
from deltalab.deltas.select import decoder_blocks, leaf, linears, model_name, pattern_matches

Variant = Literal["none", "exact", "delta_mask"]
WHAT = ("full", "bitfit", "norms", "last-n")


class Train(ParameterSpec):
    """Train some of the model's own parameters: `Train("norms")`.

    what: `full` for all; `bitfit` for all biases (Ben Zaken et al. 2021, arXiv:2106.10199); `norms` for the
    normalisation layers; `last-2` for the last two decoder blocks; or names and patterns of parameters or modules,
    as `select` takes them.
    """

    method: Literal["train"] = "train"
    what: str | list[str] = "full"

    def __init__(self, what: Any = "full", **values: Any) -> None:
        super().__init__(what=what, **values)  # type: ignore[call-arg]

    def parameters(self, model: nn.Module) -> list[str]:
        names = [name for name, _ in model.named_parameters()]
        patterns = self.what if isinstance(self.what, list) else [self.what]
        if not patterns:
            raise UserError("Train names no parameters.", nearest=WHAT)
        chosen = {name for pattern in patterns for name in _named(model, pattern, names)}
        return [name for name in names if name in chosen]


class Freezer:
    """Holds entries of weight matrices where they are. Made by `freeze`.

    Call `install(optimizer)` once the optimizer exists; `proof()` at the end says whether it held; `remove()` lets go.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Bool[Tensor, "out in"]], variant: Variant) -> None:
        self.model, self.variant = model, variant
        self.entries = 0
        self._handles: list[Any] = []
        self._masks: dict[str, Tensor] = {}  # stored as the weight is: transposed for Conv1D
        self._start: dict[str, Tensor] = {}  # the merged weights at these entries, in fp32 or wider
        self._weights: dict[str, Tensor] = {}  # exact: the weights' own bits at these entries
        all_linears = linears(model)
        for path, mask in masks.items():
            linear = all_linears[path]
            device = linear.weight.device
            mask = mask.to(device)
            self.entries += int(mask.sum())
            self._start[path] = merged_weight(model, path)[mask].cpu()
            self._masks[path] = as_stored(linear, mask).contiguous()
            if variant == "exact" and linear.weight.requires_grad:
                self._weights[path] = linear.weight.detach()[self._masks[path]].clone()
                self._handles.append(linear.weight.register_hook(_zero_at(self._masks[path])))
            delta = attached(model).get(path)
            if variant == "delta_mask" and isinstance(delta, WeightDelta):
                delta.keep = ~mask

    def install(self, optimizer: Any) -> None:
        """Put the entries back after each step of `optimizer`, which may be wrapped by Accelerate."""
        if self.variant == "exact":
            inner = getattr(optimizer, "optimizer", optimizer)
            self._handles.append(inner.register_step_post_hook(lambda *_: self.restore()))

    def restore(self) -> None:
        """Put the entries back now."""
        with torch.no_grad():
            for path, values in self._weights.items():
                self.model.get_submodule(path).weight.masked_scatter_(self._masks[path], values)

    def proof(self) -> dict[str, Any]:
        """{variant, entries, max_change, held}: how far the merged weights of the frozen entries are from the start.

        held: for `exact` the weights are bitwise the same; for the others the largest change is 0.
        """
        largest, held = 0.0, True
        for path, before in self._start.items():
            linear = self.model.get_submodule(path)
            mask = as_stored(linear, self._masks[path])
            if before.numel():
                change = (merged_weight(self.model, path)[mask].cpu() - before).abs().max()
                largest = max(largest, float("inf") if change.isnan() else float(change))
            if path in self._weights:
                now = linear.weight.detach()[self._masks[path]]
                held &= torch.equal(now.view(torch.uint8), self._weights[path].view(torch.uint8))
        return {
            "variant": self.variant,
            "entries": self.entries,
            "max_change": largest,
            "held": bool(held and largest == 0.0),
        }

    def remove(self) -> None:
        """Stop holding: hooks off, and the deltas' `keep` masks with them, so that ΔW shows at these entries again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.variant == "delta_mask":
            for path, delta in attached(self.model).items():
                if path in self._masks:
                    delta.keep = None


def freeze(model: nn.Module, masks: Mapping[str, Tensor], variant: str) -> Freezer:
    """Hold the entries where `masks` are True; masks: module path -> (out, in), on any device.

    Raises: UserError for an unknown path, a wrong shape, or a variant that would hold nothing that moves.
    """
    all_linears, deltas = linears(model), attached(model)
    for path, mask in masks.items():
        if path not in all_linears:
            raise UserError(
                f"cannot freeze '{path}': no linear of {model_name(model)} is called that.",
                nearest=nearest(path, all_linears),
            )
        shape = tuple(weight_of(all_linears[path]).shape)
        if tuple(mask.shape) != shape or mask.dtype is not torch.bool:
            raise UserError(
                f"the mask of '{path}' must be bool {shape}.",
                found=f"{mask.dtype} {tuple(mask.shape)}".replace("torch.", ""),
            )
    trained = [path for path in masks if all_linears[path].weight.requires_grad]
    adapted = [path for path in masks if isinstance(deltas.get(path), WeightDelta)]
    if variant not in ("none", "exact", "delta_mask"):
        raise UserError(
            f"'{variant}' is no way of freezing.", nearest=nearest(variant, ("none", "exact", "delta_mask"))
        )
    if variant == "exact" and (adapted or not trained):
        raise UserError("freezing 'exact' would do nothing: it holds the model's own weights, and these do not train.",
                        found=f"{len(adapted)} of the {len(masks)} matrices have a delta, whose change W + ΔW adds at every entry",
                        next="freeze with variant 'delta_mask', or train the weights themselves with Train('full')")  # fmt: skip
    if variant == "delta_mask" and (trained or not adapted):
        raise UserError("freezing 'delta_mask' masks the change of a weight delta, " + ("and the weights themselves train too." if trained else "and none of these matrices has one."),
                        found=f"{len(trained)} of the {len(masks)} matrices train themselves, {len(adapted)} have a weight delta",
                        next="freeze with variant 'exact', or adapt with LoRA alone")  # fmt: skip
    return Freezer(model, masks, variant)  # type: ignore[arg-type]


def _zero_at(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(mask, 0)


def _above(name: str) -> list[str]:
    """A parameter's name and the paths of the modules that it lies in."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _named(model: nn.Module, pattern: str, names: list[str]) -> list[str]:
    """The parameters that one entry of `Train.what` names. Raises: UserError if it names none."""
    if pattern == "full":
        return names
    if pattern == "bitfit":
        found = [name for name in names if leaf(name) == "bias"]
        if not found:
            raise UserError(
                f"{model_name(model)} has no biases, so 'bitfit' trains nothing.", nearest=["norms", "last-n", "full"]
            )
        return found
    if pattern == "norms":
        norms = [name for name, m in model.named_modules() if "norm" in type(m).__name__.lower()]
        found = [name for name in names if name.rpartition(".")[0] in norms]
        if not found:
            raise UserError(
                f"{model_name(model)} has no normalisation layers with parameters.", nearest=["last-n", "full"]
            )
        return found
    if pattern.startswith("last-") and pattern[5:] not in names:
        path, blocks = decoder_blocks(model)
        if not pattern[5:].isdigit() or not 1 <= int(pattern[5:]) <= len(blocks):
            raise UserError(
                f"'{pattern}' names no blocks of {model_name(model)}.",
                found=f"{len(blocks)} blocks",
                nearest=["last-1", f"last-{len(blocks)}"],
            )
        last = tuple(f"{path}.{i}." for i in range(len(blocks) - int(pattern[5:]), len(blocks)))
        return [name for name in names if name.startswith(last)]
    found = [name for name in names if any(pattern_matches(pattern, part) for part in _above(name))]
    if not found:
        parts = {leaf(part) for name in names for part in _above(name)}
        raise UserError(f"'{pattern}' matches no parameter of {model_name(model)}.", nearest=nearest(pattern, [*WHAT, *sorted(parts)]),
                        next="names as in model.named_parameters(), patterns, or: " + ", ".join(WHAT))  # fmt: skip
    return found
