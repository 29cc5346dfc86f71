"""Freezing: entries of weight matrices that a training shall not move, by each of the ways that are called so.

    none         nothing is held; `proof` still says how far the entries moved
    grad_mask    a hook zeroes the gradient of the base weights at the entries; nothing more
    exact        the same hook, and the entries are put back after each optimizer step: bitwise
    rewind       training is free, and `finish` puts the entries back at its end, as the code released with Wei et al.
                 2024 (arXiv:2402.05162) does
    delta_mask   the change ΔW of a weight delta is zero at the entries, in training and in the merged model

They are not the same. Under full tuning decoupled weight decay and earlier momentum move an entry whose gradient is
zero, so `grad_mask` holds only where there is neither. Under a weight delta the base does not train: no gradient
reaches it, the hook never fires, and W + ΔW moves all the same. `rewind` ends at the right entries, but the others were
trained beside entries that moved.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.shapes import Bool, Float
from deltalab.deltas.adapt import attached
from deltalab.deltas.base import WeightDelta, as_stored, shape_of, weight_of, wide
from deltalab.deltas.select import model_name
from deltalab.deltas.sites import linears

Variant = Literal["none", "grad_mask", "exact", "rewind", "delta_mask"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

DENSE_ABOVE = 0.05
"""Share of a matrix's entries from which forming ΔW whole is cheaper than gathering from its factors."""


class Freezer:
    """Holds entries of weight matrices in one of the ways above. Made by `freeze`.

    Call `install(optimizer)` once the optimizer exists and `finish()` when training is over (`deltalab.train` does
    both); `proof()` says how far the entries are from where they were; `remove()` lets go.

    Memory, for n entries frozen of N in the matrices: N / 8 bytes for the masks, on the CPU. Where weights train
    themselves n values in their dtype, with the weights for `exact` and on the CPU otherwise, and N bytes with the
    weights for `exact` and `grad_mask`, whose hooks use the mask at every step. Under a delta nothing else (n fp32
    values if the delta was not at zero). A proof takes one matrix at a time.

    entries: n. digest: of the masks, 12 hex digits.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Bool[Tensor, "out in"]], variant: Variant) -> None:
        self.model, self.variant = model, variant
        self.entries = 0
        self.rewound: float | None = None  # the largest change that `finish` took back
        self._handles: list[Any] = []
        self._bits: dict[str, np.ndarray[Any, Any]] = {}  # the masks, row by row, one bit an entry
        self._used: dict[str, Tensor] = {}  # the masks that are used at every step, (out, in)
        self._own: dict[str, Tensor] = {}  # the weights' own values at the entries, where they train
        self._change: dict[str, Tensor] = {}  # ΔW at the entries, where it was not zero
        self._keep: dict[str, Tensor | None] = {}  # the deltas' own masks before this one
        for path, mask in masks.items():
            linear = linears(model)[path]
            mask = mask.to(weight_of(linear).device)
            self.entries += int(mask.sum())
            self._bits[path] = np.packbits(mask.cpu().numpy())
            if linear.weight.requires_grad:
                self._start_weight(path, linear, mask)
            change = self._delta_at(path, mask)
            if change is not None and bool(change.any()):
                self._change[path] = change.cpu()
        self.digest = _digest(self._bits)
        if variant == "delta_mask":
            self._mask_deltas()

    def _start_weight(self, path: str, linear: nn.Module, mask: Tensor) -> None:
        values = weight_of(linear).detach()[mask]
        self._own[path] = values if self.variant == "exact" else values.cpu()
        if self.variant in ("grad_mask", "exact"):
            self._used[path] = mask
            self._handles.append(linear.weight.register_hook(_zero_at(as_stored(linear, mask))))

    def install(self, optimizer: Any) -> None:
        """Begin a training by `optimizer`, which may be wrapped by Accelerate."""
        if self.variant == "exact":
            inner = getattr(optimizer, "optimizer", optimizer)
            self._handles.append(inner.register_step_post_hook(lambda *_: self.restore()))
        elif self.variant == "rewind":
            self.rewound = None
            self._unmask_deltas()

    def restore(self) -> None:
        """Put the weights' own entries back now."""
        with torch.no_grad():
            for path, values in self._own.items():
                W = weight_of(self.model.get_submodule(path))
                W.masked_scatter_(self._mask(path), values.to(W.device))

    def finish(self) -> None:
        """Training is over: `rewind` puts its entries back; nothing for the others, or a second time.

        The weights get the values that they had at `freeze`; a delta gets a `keep` mask, so that the merged change is
        ΔW ⊙ (1 − M) from here on, in the model as in what is saved of it. What probes measured before shows the entries
        as they moved.
        """
        if self.variant != "rewind" or self.rewound is not None:
            return
        self.rewound = self._moved()[0]
        self.restore()
        self._mask_deltas()

    def proof(self) -> dict[str, Any]:
        """{variant, entries, max_change, held, note?, max_change_before_rewind?}.

        max_change: the largest |change| of an entry of W + ΔW since `freeze`, in fp32 or wider; infinite for NaN.
        held: no bit of a weight's own entries changed, and ΔW is exactly what it was there.
        note: where the variant had no means to hold. max_change_before_rewind: what `finish` took back.
        """
        largest, held = self._moved()
        proof: dict[str, Any] = {"variant": self.variant, "entries": self.entries, "max_change": largest, "held": held}
        if note := self._note():
            proof["note"] = note
        if self.rewound is not None:
            proof["max_change_before_rewind"] = self.rewound
        return proof

    def remove(self) -> None:
        """Stop holding: hooks off, and this freezer's masks off the deltas, so that ΔW shows at the entries again.

        Weights that were put back stay so. To save a masked delta, save it first.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._used.clear()
        self._unmask_deltas()

    def _mask(self, path: str) -> Bool[Tensor, "out in"]:
        if path in self._used:
            return self._used[path]
        linear = self.model.get_submodule(path)
        out, in_ = shape_of(linear)
        flat = np.unpackbits(self._bits[path], count=out * in_).view(bool)
        return torch.from_numpy(flat).view(out, in_).to(weight_of(linear).device)

    def _mask_deltas(self) -> None:
        """ΔW to zero at the entries, whatever was zero before included."""
        deltas = attached(self.model)
        for path in self._bits:
            delta = deltas.get(path)
            if isinstance(delta, WeightDelta):
                self._keep[path] = delta.keep
                keep = ~self._mask(path)
                delta.keep = keep if delta.keep is None else keep & delta.keep

    def _unmask_deltas(self) -> None:
        for path, keep in self._keep.items():
            attached(self.model)[path].keep = keep
        self._keep.clear()

    def _delta_at(self, path: str, mask: Tensor) -> Float[Tensor, " k"] | None:
        """ΔW of the delta on `path` at the entries of `mask`, in its order; None where there is none."""
        delta = attached(self.model).get(path)
        if not isinstance(delta, WeightDelta):
            return None
        W = weight_of(self.model.get_submodule(path)).detach()
        index = mask.flatten().nonzero().flatten()
        with torch.no_grad():
            dense = index.numel() > DENSE_ABOVE * mask.numel()
            return delta.change(W)[mask] if dense else delta.entries(index, W)

    def _moved(self) -> tuple[float, bool]:
        """(largest change, whether nothing moved at all) of the entries since the start."""
        largest, held = 0.0, True
        for path in self._bits:
            mask = self._mask(path)
            change: Tensor | None = self._delta_at(path, mask)
            if change is not None and path in self._change:
                change = change - self._change[path].to(change.device)
            if change is not None:
                held &= not bool(change.any())
            if path in self._own:
                now = weight_of(self.model.get_submodule(path)).detach()[mask]
                start = self._own[path].to(now.device)
                held &= torch.equal(now.view(torch.uint8), start.view(torch.uint8))
                own = now.to(wide(now.dtype)) - start.to(wide(now.dtype))
                change = own if change is None else own + change
            if change is not None and change.numel():
                most = change.abs().max()
                largest = max(largest, float("inf") if most.isnan() else float(most))
        return largest, bool(held and largest == 0.0)

    def _note(self) -> str | None:
        """Where the hook of `grad_mask` reaches nothing."""
        deltas = attached(self.model)
        idle, adapted = self._bits.keys() - self._own.keys(), self._bits.keys() & deltas.keys()
        if self.variant != "grad_mask" or not (idle or adapted):
            return None
        said = [
            f"{len(idle)} of the {len(self._bits)} base matrices do not train, so the hook never fires there"
        ] * bool(idle)
        said += [f"{len(adapted)} have a delta, whose change of W no hook on W holds"] * bool(adapted)
        return "; ".join(said)


def freeze(model: nn.Module, masks: Mapping[str, Tensor], variant: str) -> Freezer:
    """Hold the entries where `masks` are True; masks: module path -> (out, in), on any device.

    Raises: UserError for an unknown path, a wrong shape, or a variant that would hold nothing that moves; `none` and
    `grad_mask` promise nothing and are taken everywhere, their proof says what came of it.
    """
    all_linears, deltas = linears(model), attached(model)
    for path, mask in masks.items():
        if path not in all_linears:
            raise UserError(
                f"cannot freeze '{path}': no linear of {model_name(model)} is called that.",
                nearest=nearest(path, all_linears),
            )
        shape = shape_of(all_linears[path])
        if tuple(mask.shape) != shape or mask.dtype is not torch.bool:
            raise UserError(
                f"the mask of '{path}' must be bool {shape}.",
                found=f"{mask.dtype} {tuple(mask.shape)}".replace("torch.", ""),
            )
    if variant not in VARIANTS:
        raise UserError(f"'{variant}' is no way of freezing.", nearest=nearest(variant, VARIANTS) or VARIANTS)
    trained = sum(all_linears[path].weight.requires_grad for path in masks)
    adapted = sum(isinstance(deltas.get(path), WeightDelta) for path in masks)
    _refuse_idle(variant, len(masks), trained, adapted)
    return Freezer(model, masks, variant)


def _refuse_idle(variant: str, count: int, trained: int, adapted: int) -> None:
    """Raises: UserError if a variant that promises to hold would not.

    count: matrices to freeze in. trained: those of them that train themselves. adapted: those with a weight delta.
    """
    if variant == "exact" and (adapted or not trained):
        raise UserError(
            "freezing 'exact' would do nothing: it holds the model's own weights, and these do not train.",
            found=f"{adapted} of the {count} matrices have a delta, whose change W + ΔW adds at every entry",
            next="freeze with variant 'delta_mask', or train the weights themselves with Train('full')",
        )
    if variant == "delta_mask" and (trained or not adapted):
        why = "the weights themselves train too" if trained else "none of these matrices has one"
        raise UserError(
            f"freezing 'delta_mask' masks the change of a weight delta, and {why}.",
            found=f"{trained} of the {count} matrices train themselves, {adapted} have a weight delta",
            next="freeze with variant 'exact', or adapt with LoRA alone",
        )
    if variant == "rewind" and not (trained or adapted):
        raise UserError(
            "freezing 'rewind' would put nothing back: none of these matrices trains or has a weight delta.",
            found=f"{count} matrices",
            next="freeze entries of matrices that train, or train more: Train('full'), LoRA(targets='all-linear')",
        )


def _zero_at(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(mask, 0)


def _digest(bits: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """Twelve hex digits of the SHA-256 of masks, by path; their order does not matter."""
    digest = hashlib.sha256()
    for path in sorted(bits):
        digest.update(f"{path} {len(bits[path])}\n".encode())
        digest.update(bits[path].tobytes())
    return digest.hexdigest()[:12]
