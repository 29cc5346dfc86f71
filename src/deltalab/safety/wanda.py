"""Wanda (Sun et al. 2024, arXiv:2306.11695, eq. 1; on aligned models Wei et al. 2024, arXiv:2402.05162, §3.1):

    S_ij = |W_ij| · ‖X_j‖₂

X holds a linear's inputs at the counted positions of all samples, one row a position. The score is |W| times one vector,
so the vector alone is kept: the sums of squares of X's columns, (in,), in fp64.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from deltalab.capture import inputs, per_sample, undisturbed
from deltalab.core.errors import UserError
from deltalab.safety.calibration import Batch, Calibration, Sample, told
from deltalab.safety.magnitudes import Base, Magnitudes
from deltalab.safety.manifest import describe
from deltalab.safety.score_files import HALVES, Results, Scores

REDUCTION = "|W| times the root of the sum of squares of the inputs at the counted positions of all samples"


def wanda(
    model: nn.Module, samples: Iterable[Sample], *, positions: str = "predicting", batch: int = 8,
    modules: Mapping[str, nn.Module] | None = None, base: Base | None = None, halves: bool = False,
    folder: str | Path | None = None, template: str | None = None, progress: Callable[[int], None] | None = None,
) -> Scores:  # fmt: skip
    """Wanda scores of the linears of the decoder blocks, rebuilt when asked for: they hold on to the model.

    The arguments are those of `snip`; positions are those of Wanda's inputs, see calibration.py. One pass, forward only;
    8 bytes an input feature of each linear (16 with halves) in memory and on disk. A score that is asked for after its
    weight has changed is refused.
    Raises: UserError if no sample has a counted position, an input is not finite or not (batch, tokens, in), two modules
    share a weight, or the folder holds something else.
    """
    weights = Magnitudes(model, modules, base)
    data = Calibration(samples, positions, "inputs")
    manifest = describe(
        "wanda", REDUCTION, model, weights, data, template=template, batch=batch, halves=halves, mode="resident"
    )
    results = Results(manifest, folder)
    results.begin()
    squares = _Squares({path: weights.modules[path] for path in results.missing}, weights.shapes, 2 if halves else 1)
    if results.missing:
        done = 0
        with undisturbed(model), torch.no_grad(), inputs(squares.linears, squares.take):
            for part in data.batches(batch, model):
                squares.batch = part
                model(input_ids=part.ids, attention_mask=part.mask, use_cache=False)
                done = told(progress, done, len(part.samples))
    for path in results.missing:
        results.add(path, squares.finish(path))
    return results.finish(weights)


class _Squares:
    """Σ x² at the counted positions, (in,), in fp64, one for each half that is kept apart."""

    def __init__(self, linears: Mapping[str, nn.Module], shapes: Mapping[str, list[int]], parts: int) -> None:
        self.linears = dict(linears)
        self.totals = {
            path: [torch.zeros(shapes[path][1], dtype=torch.float64, device=module.get_parameter("weight").device) for _ in range(parts)]
            for path, module in self.linears.items()
        }  # fmt: skip
        self.batch: Batch | None = None
        self.reached: set[str] = set()

    def take(self, path: str, x: Tensor) -> None:
        """Add one call of a linear on a batch."""
        assert self.batch is not None
        rows = per_sample(path, x, len(self.batch.samples))
        if rows.shape[1] != self.batch.ids.shape[1]:
            raise UserError(f"'{path}' does not see every token, so positions have no meaning there.",
                            found=f"an input of shape {tuple(x.shape)} for {tuple(self.batch.ids.shape)} tokens", next="leave it out of modules=")  # fmt: skip
        self.reached.add(path)
        for row, sample in enumerate(self.batch.samples):
            total = self.totals[path][sample.half if len(self.totals[path]) > 1 else 0]
            total += rows[row, sample.where.to(x.device)].double().square().sum(0)

    def finish(self, path: str) -> dict[str, Tensor]:
        """What is kept of one linear."""
        if path not in self.reached:
            raise UserError(f"'{path}' was called on no sample.", next="leave it out of modules=")
        totals = self.totals.pop(path)
        if not all(bool(total.isfinite().all()) for total in totals):
            raise UserError(f"an input of '{path}' is not finite.", next="load the model in a wider dtype")
        return dict(zip(HALVES if len(totals) > 1 else ("squares",), totals, strict=True))
