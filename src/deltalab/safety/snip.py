"""SNIP (Lee et al. 2019, arXiv:1810.02340; on aligned models Wei et al. 2024, arXiv:2402.05162, §3.1):

    S = 1/n Σₓ |W ⊙ ∇_W L(x)|,   L(x) = mean over the counted positions of −log p(next token)

The absolute value is taken per sample, so gradients of several samples cannot cancel. Samples go through the model in
batches all the same: a linear y = W x has ∇_W L(x) = Σₜ δₜ xₜᵀ, with δ the gradient in y, and the δ and x of a batch
still have a row for each sample. So one backward of the batch's summed losses gives every sample's own gradient, some
rows of one matrix and one sample at a time, and no weight has to require gradients. What |W| multiplies is the same for all
samples: the sums are Σₓ |∇_W L(x)|, in fp32 or the model's wider dtype. In a bf16 model one sample's gradient is rounded
to bf16, as autograd does, and then added in fp32.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltalab.capture import Call, gradients, per_sample, undisturbed
from deltalab.core.errors import UserError
from deltalab.core.files import remove
from deltalab.core.scratch import make_scratch
from deltalab.core.shapes import Float
from deltalab.deltas.base import as_stored
from deltalab.deltas.select import layers_of
from deltalab.safety.calibration import Batch, Calibration, Sample, flat_places, told
from deltalab.safety.magnitudes import Base, Magnitudes
from deltalab.safety.manifest import describe
from deltalab.safety.relay import relay_of
from deltalab.safety.score_files import HALVES, Parts, Results, Scores

TOLERANCE = 1e-3
"""By norm, relative: how far the products of one batch may be from autograd's gradient. In 16 bit autograd itself rounds
its result, and four units of that dtype are allowed."""

TILE = 1 << 19
"""Entries of a matrix that are looked at together on a CPU."""

STATES = 1 << 28
"""Bytes that hidden states and gradients of all samples may take in main memory if the sums take less."""

REDUCTION = "mean over samples of |W ∘ ∇L|, the absolute value per sample; L the mean −log p over the counted positions"


def snip(
    model: nn.Module, samples: Iterable[Sample], *, positions: str = "predicting", batch: int = 8,
    modules: Mapping[str, nn.Module] | None = None, base: Base | None = None, halves: bool = False,
    folder: str | Path | None = None, mode: str = "resident", blocks: int = 4, scratch: str | Path | None = None,
    template: str | None = None, progress: Callable[[int], None] | None = None,
) -> Scores:  # fmt: skip
    """SNIP scores of the linears of the decoder blocks, (out, in) each, in fp32 or the model's wider dtype.

    samples: encoded conversations. positions: see calibration.py. batch: how many go through the model at once.
    modules: path → linear, in place of `scored_linears`. base: |W − W_base| in place of |W|.
    halves: keep the even and the odd samples apart, see `Scores.halves`.
    folder: write one file a matrix there, and go on with what an earlier call left there. Without it scores stay in
    memory on the weights' devices (resident), or in files below `scratch` that go with the scores (streamed).
    template: the chat template, for the manifest. progress: called with the number of samples done, over all passes.

    mode: `resident` keeps sums for all matrices, 4 bytes an entry and 8 with halves, and takes one pass over the data.
    `streamed` keeps sums for the linears of `blocks` decoder blocks, and takes a pass for each such group, from the last
    to the first. A pass runs its group alone, from hidden states kept of a forward and gradients kept of the pass before
    (relay.py); where a model cannot be run so, or these would take more than the sums and `STATES`, it is a whole forward
    and a backward as far as its group. All do the same operations on the same numbers: the scores are bitwise equal
    where torch's kernels are deterministic (on a CPU they are), else to the rounding of a sum. `cost` gives the figures.

    Raises: UserError if no sample has a counted position, a loss is not finite, two modules share a weight, the gradient
    of a weight is not Σ δ xᵀ (told on the first batch, against autograd), or the folder holds something else.
    """
    weights = Magnitudes(model, modules, base)
    data = Calibration(samples, positions, "loss")
    manifest = describe(
        "snip", REDUCTION, model, weights, data, template=template, batch=batch, halves=halves, mode=mode
    )
    temporary = make_scratch(scratch) if folder is None and mode == "streamed" else None
    try:
        results = Results(manifest, temporary or folder, stored_bytes(weights, halves))
        results.begin()
        done = 0
        with undisturbed(model):
            passes = groups(model, results.missing, mode, blocks)
            kept = max(STATES, max((stored_bytes(weights, halves, group) for group in passes), default=0))
            for each in _passes(model, data, batch, passes, kept):
                sums = _Sums({path: weights.modules[path] for path in each.paths}, weights.dtype, 2 if halves else 1)
                with gradients(sums.linears, sums.take) as backward:
                    for number, part in enumerate(data.batches(batch, model)):
                        sums.run(part, functools.partial(each.loss, number, part), backward)
                        each.done()
                        done = told(progress, done, len(part.samples))
                for path in each.paths:
                    results.add(path, sums.finish(path, weights, manifest))
    except BaseException:
        if temporary is not None:
            remove(temporary)
        raise
    return results.finish(temporary=temporary is not None)


def groups(model: nn.Module, paths: Sequence[str], mode: str, blocks: int) -> list[list[str]]:
    """The paths of each pass: all at once, or those of `blocks` decoder blocks at a time."""
    if mode == "resident":
        return [list(paths)] if paths else []
    found: dict[int | None, list[str]] = {}
    for path, layer in layers_of(model, paths).items():
        found.setdefault(None if layer is None else layer // blocks, []).append(path)
    return list(found.values())


def stored_bytes(weights: Magnitudes, halves: bool, paths: Iterable[str] | None = None) -> int:
    """Bytes of the scores of these matrices, or of all."""
    shapes = [weights.shapes[path] for path in (weights if paths is None else paths)]
    return sum(out * in_ for out, in_ in shapes) * weights.dtype.itemsize * (2 if halves else 1)


class _Pass(NamedTuple):
    """One pass over the data. loss: of a batch and its number. done: to be called after the backward of each."""

    paths: list[str]
    loss: Callable[[int, Batch], Tensor]
    done: Callable[[], None]


def _passes(model: nn.Module, data: Calibration, batch: int, passes: Sequence[list[str]], kept: int) -> Iterator[_Pass]:
    """A pass for each group of paths: in a relay if it holds and keeps no more than `kept` bytes, else by whole forwards."""
    whole = functools.partial(summed_loss, model)
    relay = relay_of(model, passes, whole)
    if relay is not None and relay.holds(data.shortest(model)) and relay.per_token * data.padded(batch) <= kept:
        for number, part in enumerate(data.batches(batch, model)):
            relay.fill(number, part)
        for start, paths in sorted(zip(relay.starts, passes, strict=True), reverse=True):
            yield _Pass(paths, functools.partial(relay.loss, start), relay.done)
    else:
        for paths in passes:
            yield _Pass(paths, lambda _, part: whole(part), lambda: None)


def summed_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Σ L(x) over the samples of a batch. Raises: UserError, naming the sample, if one is not finite."""
    losses = mean_nll(model, batch)
    for sample, finite in zip(batch.samples, losses.isfinite().tolist(), strict=True):
        if not finite:
            raise UserError(f"the loss of sample {sample.number} is not finite.", next="look at the sample, or load the model in a wider dtype")  # fmt: skip
    return losses.sum()


def mean_nll(model: nn.Module, batch: Batch) -> Float[Tensor, " samples"]:
    """L(x) of each sample: −log p(next token), the mean over its counted positions, in fp32 or the model's wider dtype."""
    rows, columns = flat_places(batch.samples)
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    logits = logits[rows.to(logits.device), columns.to(logits.device)]
    wide = torch.promote_types(logits.dtype, torch.float32)
    targets = batch.ids.cpu()[rows, columns + 1].to(logits.device)
    values = nn.functional.cross_entropy(logits.to(wide), targets, reduction="none")
    return torch.stack([part.mean() for part in values.split([len(s.where) for s in batch.samples])])


class _Sums:
    """Σ |∇_W L(x)| of some linears, (out, in), one for each half that is kept apart."""

    def __init__(self, linears: Mapping[str, nn.Module], dtype: torch.dtype, parts: int) -> None:
        self.linears, self.dtype = dict(linears), dtype
        self.totals = {path: [self._zeros(module) for _ in range(parts)] for path, module in self.linears.items()}
        self.batch: Batch | None = None
        self.buffer: Tensor | None = None
        self.reached: set[str] = set()
        self.unsigned: dict[str, Tensor] | None = {}  # Σ ∇_W L(x) of the first batch, to be compared with autograd's
        self.autograds: dict[str, Tensor] = {}  # which waits here where it is complete before our own sum is

    def run(self, batch: Batch, loss: Callable[[], Tensor], backward: Callable[[Tensor], None]) -> None:
        """Forward (`loss`) and backward of one batch."""
        self.batch = batch
        weights = {path: module.get_parameter("weight") for path, module in self.linears.items()}
        hooks = []
        if self.unsigned is not None:
            for path, weight in weights.items():
                hooks.append(weight.requires_grad_(True).register_post_accumulate_grad_hook(self._received(path)))
        try:
            backward(loss())
            for path in list(self.autograds):
                self._compare(path, self.autograds.pop(path))
        finally:
            for hook in hooks:
                hook.remove()
            for weight in weights.values():
                weight.requires_grad_(False)
        self.unsigned = None

    def take(self, path: str, calls: Sequence[Call]) -> None:
        """Add one matrix of one batch: what capture hands over when its backward is complete.

        Some rows of it at a time, so that the product of a sample, its absolute value and the sum stay in the cache.
        """
        assert self.batch is not None
        samples = self.batch.samples
        self.reached.add(path)
        factors = self._factors(path, calls)
        totals = self.totals[path]
        if self.unsigned is not None:
            self.unsigned[path] = torch.zeros_like(totals[0])
        for rows, buffer in self._tiles(totals[0], factors[0][0][0].dtype):
            for sample, ((delta, x), *more) in zip(samples, factors, strict=True):
                torch.mm(delta[:, rows].T, x, out=buffer)
                for delta, x in more:  # a module that is called again: one weight, so one gradient
                    buffer.addmm_(delta[:, rows].T, x)
                if self.unsigned is not None:
                    self.unsigned[path][rows] += buffer
                totals[sample.half if len(totals) > 1 else 0][rows] += buffer.abs_()

    def _factors(self, path: str, calls: Sequence[Call]) -> list[list[tuple[Tensor, Tensor]]]:
        """δ and x of each sample, (its tokens, out) and (its tokens, in), for each call; without padding, where δ is 0."""
        assert self.batch is not None
        samples, tokens = self.batch.samples, self.batch.ids.shape[1]
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in samples]
        for x, delta in calls:
            xs, deltas = per_sample(path, x, len(samples)), per_sample(path, delta, len(samples))
            dtype = torch.bfloat16 if x.dtype == delta.dtype == torch.bfloat16 else self.dtype
            for row, sample in enumerate(samples):
                end = len(sample.sample.input_ids) if xs.shape[1] == tokens else None
                found[row].append((deltas[row, :end].to(dtype), xs[row, :end].to(dtype)))
        return found

    def _tiles(self, total: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a matrix, some at a time, and a buffer of their shape."""
        out, in_ = total.shape
        parts = max(1, -(-out * in_ // TILE)) if total.device.type == "cpu" else 1
        most = -(-out // parts)
        if (
            self.buffer is None
            or self.buffer.dtype != dtype
            or self.buffer.device != total.device
            or len(self.buffer) < most * in_
        ):
            self.buffer = total.new_empty(most * in_, dtype=dtype)
        for start in range(0, out, most):
            rows = slice(start, min(start + most, out))
            yield rows, self.buffer[: (rows.stop - start) * in_].view(-1, in_)

    def finish(self, path: str, weights: Magnitudes, manifest: Mapping[str, Any]) -> Parts:
        """|W| ⊙ Σ / n of one matrix; its sums are given back."""
        if path not in self.reached:
            raise UserError(f"'{path}' got no gradient from any sample.", found="the loss does not depend on it", next="leave it out of modules=")  # fmt: skip
        counts, totals, magnitude = counted_in(manifest), self.totals.pop(path), weights[path]
        names = HALVES if len(totals) > 1 else ("score",)
        return {name: total.mul_(magnitude).div_(n) for name, total, n in zip(names, totals, counts, strict=True)}

    def _zeros(self, module: nn.Module) -> Tensor:
        weight = module.get_parameter("weight")
        return torch.zeros_like(
            as_stored(module, weight), dtype=self.dtype, requires_grad=False, memory_format=torch.contiguous_format
        )

    def _received(self, path: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            assert self.unsigned is not None
            self.autograds[path] = as_stored(self.linears[path], weight.grad).to(self.dtype)
            weight.grad = None  # freed here, so there is never a second set of gradients
            if path in self.unsigned:
                self._compare(path, self.autograds.pop(path))

        return hook

    def _compare(self, path: str, want: Tensor) -> None:
        assert self.unsigned is not None
        got = self.unsigned.pop(path, torch.zeros_like(want))
        module = self.linears[path]
        allowed = max(TOLERANCE, 4 * torch.finfo(module.get_parameter("weight").dtype).eps)
        if not (got - want).norm() <= allowed * want.norm():
            raise UserError(f"the gradient of '{path}' is not that of a plain linear, so single samples have none there.",
                            found=f"a {type(module).__name__}; by norm {float((got - want).norm() / want.norm()):.2g} off Σ δ xᵀ",
                            next="leave it out of modules=, or score dl.merged(model)")  # fmt: skip


def counted_in(manifest: Mapping[str, Any]) -> list[int]:
    """Samples behind each kept part: all of them, or those of each half."""
    return [count["samples"] for count in manifest["halves"] or [manifest]]
