"""Scores of weights: one number an entry, higher is more important.

SNIP (Lee et al. 2019; on aligned models Wei et al. 2024, arXiv:2402.05162):

    S = 1/n Σₓ |W ⊙ ∇_W L(x)|,   L(x) = mean over the counted positions of −log p(next token)

The absolute value is taken per sample, so gradients of several samples cannot cancel. Which positions count is a name:

`predicting`  every position whose logits predict a reply token: the usual causal loss, the first reply token included.
`response`    every position that *is* a reply token and predicts another one: the position in front of the reply, which
              decides on the first token of a refusal, is left out (so is the last reply token, which predicts nothing).

On an adapted model the weights scored are the base's, W, under the tuned activations; for the score of the merged
weights, score `merged(model)`. The two are different quantities.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import pydantic
import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.files import disk_faults, remove, write_json
from deltalab.core.shapes import Float
from deltalab.core.spec import Spec, digest
from deltalab.deltas.select import scored_linears
from deltalab.models.load import model_digest
from deltalab.safety.score_files import MANIFEST, Scores, write_score

Positions = Literal["predicting", "response"]
IGNORED = -100
__all__ = ["Positions", "Sample", "ScoreSpec", "Scores", "counted", "losses", "scratch_folder", "snip"]


class ScoreSpec(Spec):
    """How weights are scored.

    positions: `predicting` or `response`, see the module. samples: how many conversations. keep: leave the scores on
    disk after the groups are made. scratch: folder for large temporaries (shared memory, say); None: the output folder.
    """

    score: Literal["snip"] = "snip"
    positions: Positions = "predicting"
    samples: pydantic.PositiveInt = 128
    keep: bool = False
    scratch: str | None = None


class Sample(Protocol):
    """One encoded conversation: `labels[i]` is `input_ids[i]` where token i is part of a reply, else -100."""

    @property
    def input_ids(self) -> list[int]: ...
    @property
    def labels(self) -> list[int]: ...


def snip(
    model: nn.Module, batches: Iterable[Sample], *, modules: Mapping[str, nn.Module] | None = None, folder: str | Path | None = None,
    positions: Positions = "predicting", scratch: str | Path | None = None, template: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:  # fmt: skip
    """SNIP scores of the linears of the decoder blocks, in one pass over the samples.

    batches: encoded conversations, each a sample of its own. modules: path → linear, in place of `scored_linears`.
    folder: write one file a matrix there; the sums then lie in memory-mapped files under `scratch` (default: the
    folder), and the scores are read back one at a time. Without it they stay in memory, on the weights' devices.
    template: the chat template, for the manifest. progress: called with the number of samples done.
    The model is in eval mode meanwhile; its modes, requires_grad and gradients are afterwards what they were.
    Raises: UserError if no sample has a counted position, a loss is not finite, or two modules share a weight.
    """
    weights = _weights(scored_linears(model) if modules is None else modules)
    counts = {"samples": 0, "skipped": 0, "tokens": 0}
    data = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        sums = _Sums(weights, stack.enter_context(scratch_folder(scratch or folder)) if folder is not None else None)
        stack.enter_context(_only_gradients_of(model, weights.values()))
        for path, weight in weights.items():
            stack.callback(weight.register_post_accumulate_grad_hook(sums.hook(path)).remove)
        for number, sample in enumerate(batches):
            data.update(json.dumps([sample.input_ids, sample.labels]).encode())
            tokens = _backward(model, sample, positions, number)
            counts["tokens"] += tokens
            counts["samples" if tokens else "skipped"] += 1
            if progress is not None:
                progress(number + 1)
        if not counts["samples"]:
            raise UserError("no sample has a counted position, so there is nothing to score.",
                            found=f"{counts['skipped']} samples with all labels masked", next="check the data with `deltalab preview`")  # fmt: skip
        manifest = {
            "score": "snip", "positions": positions, **counts, "dtype": str(sums.dtype).removeprefix("torch."), "model": model_digest(model),
            "data": data.hexdigest()[:12], "template": digest(template) if template is not None else None,
            "shapes": {path: list(weight.shape) for path, weight in weights.items()},
        }  # fmt: skip
        return sums.finish(manifest, Path(folder) if folder is not None else None)


def losses(model: nn.Module, sample: Sample, positions: Positions = "predicting") -> Float[Tensor, " counted"]:
    """−log p(next token) at each counted position of one sample, in fp32 or the model's wider dtype; may be empty."""
    device = next(model.parameters()).device
    ids = torch.tensor([sample.input_ids], device=device)
    where, targets = counted(torch.tensor(sample.labels), positions)
    if not len(where):
        return torch.zeros(0, device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, where.to(device)]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return nn.functional.cross_entropy(logits.to(wide), targets.to(device), reduction="none")


def counted(labels: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """The counted positions of a sample and the tokens that their logits predict. labels: (tokens,), -100 elsewhere."""
    predicts = labels[1:] != IGNORED
    if positions == "response":
        predicts = predicts & (labels[:-1] != IGNORED)
    where = predicts.nonzero()[:, 0]
    return where, labels[where + 1]


@contextlib.contextmanager
def scratch_folder(root: str | Path | None = None) -> Iterator[Path]:
    """A folder for large temporaries below `root` (default: the system's), removed at the end.

    What a killed process left there is removed when the next one starts.
    """
    root = Path(root or tempfile.gettempdir())
    with disk_faults(root):
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(".deltalab-*-*"):
            if not _alive(stale.name.split("-")[1]):
                remove(stale)
        folder = Path(tempfile.mkdtemp(prefix=f".deltalab-{os.getpid()}-", dir=root))
    try:
        yield folder
    finally:
        remove(folder)


class _Sums:
    """Σ |W ⊙ ∇W| of every weight, in fp32 or the model's wider dtype: in memory, or in memory-mapped files."""

    def __init__(self, weights: Mapping[str, nn.Parameter], folder: Path | None) -> None:
        self.dtype = torch.promote_types(next(iter(weights.values())).dtype, torch.float32)
        self.folder = folder
        self.sums = {path: self._zeros(path, weight) for path, weight in weights.items()}

    def _zeros(self, path: str, weight: nn.Parameter) -> Tensor:
        if self.folder is None:
            return torch.zeros_like(weight, dtype=self.dtype, requires_grad=False)
        file = self.folder / path
        with (
            disk_faults(file),
            open(file, "wb") as handle,
        ):  # space is taken now: a map that runs out of disk kills the process
            os.posix_fallocate(handle.fileno(), 0, weight.numel() * self.dtype.itemsize)
        return torch.from_file(str(file), shared=True, size=weight.numel(), dtype=self.dtype).view(weight.shape)

    def hook(self, path: str) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            change = weight.detach().to(self.dtype) * weight.grad.to(self.dtype)
            weight.grad = None  # freed here, so there is never a second set of gradients
            total = self.sums[path]
            total += change.abs_().to(total.device)

        return add

    def finish(self, manifest: dict[str, Any], folder: Path | None) -> Scores:
        if folder is None:
            return Scores(manifest, {path: total.div_(manifest["samples"]) for path, total in self.sums.items()})
        for path in list(self.sums):
            write_score(folder, path, self.sums.pop(path) / manifest["samples"])
            if self.folder is not None:
                remove(self.folder / path)
        write_json(folder / MANIFEST, manifest)
        return Scores(manifest, folder=folder)


@contextlib.contextmanager
def _only_gradients_of(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Eval mode and gradients for these weights alone; modes, requires_grad and `.grad` are restored at the end."""
    wanted = {id(weight) for weight in weights}
    modes = [(module, module.training) for module in model.modules()]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad


def _backward(model: nn.Module, sample: Sample, positions: Positions, number: int) -> int:
    """Backward of one sample's mean loss; returns the number of counted positions, 0 for none."""
    values = losses(model, sample, positions)
    if not len(values):
        return 0
    loss = values.mean()
    if not torch.isfinite(loss):
        raise UserError(
            f"the loss of sample {number} is {loss.item()}.",
            next="look at the sample, or load the model in a wider dtype",
        )
    loss.backward()
    return len(values)


def _weights(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The weights to score.

    Raises: UserError if one is shared by two modules, or quantised.
    """
    weights: dict[str, nn.Parameter] = {}
    owner: dict[int, str] = {}
    for path, module in modules.items():
        weight = module.get_parameter("weight")
        if not weight.is_floating_point():
            raise UserError(
                f"'{path}' holds {weight.dtype}, which has no gradient.", next="load the model unquantised to score it"
            )
        if id(weight) in owner:
            raise UserError(
                f"'{path}' and '{owner[id(weight)]}' share a weight: it has one score.",
                next="name one of the two in modules=",
            )
        owner[id(weight)] = path
        weights[path] = weight
    if not weights:
        raise UserError("no modules to score.")
    return weights


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
