"""Scores of weights: one number an entry, higher is more important. `score` computes what a `ScoreSpec` asks for.

| score       | definition                                                | file                     |
|-------------|-----------------------------------------------------------|--------------------------|
| `snip`      | mean over samples of |W ⊙ ∇L|                             | snip.py                  |
| `wanda`     | |W_ij| · ‖X_j‖₂                                           | wanda.py                 |
| `magnitude` | |W|: a control                                            | here                     |
| `random`    | a seeded permutation of each matrix: another              | here                     |

With a base model |W − W_base| stands in place of |W|: what differs between an aligned model and its base. On an adapted
model the weights scored are the base's, W, under the tuned activations; for the score of the merged weights, score
`merged(model)`. The two are different quantities.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Self

import pydantic
from torch import nn

from deltalab.core.errors import UserError
from deltalab.core.spec import Spec
from deltalab.models.load import load
from deltalab.safety.calibration import Positions, Sample, counted, taken
from deltalab.safety.magnitudes import Base, Magnitudes
from deltalab.safety.manifest import COMPARABLE, describe, require_same
from deltalab.safety.score_files import Results, Scores
from deltalab.safety.snip import groups, snip, stored_bytes
from deltalab.safety.wanda import wanda

__all__ = [
    "COMPARABLE", "Cost", "Positions", "Sample", "ScoreSpec", "Scores", "base_model", "cost", "counted", "magnitude", "random_scores",
    "require_same", "score", "snip", "taken", "wanda",
]  # fmt: skip


class ScoreSpec(Spec):
    """How weights are scored.

    positions: `predicting`, `response` or `first-K`, see calibration.py. samples: how many conversations. base: name of a
    model, |W − W_base| in place of |W|. mode: `resident` (one pass, sums of all matrices in memory) or `streamed` (a pass
    for each `blocks` decoder blocks, their sums in memory), for snip. batch: samples that go through the model at once.
    keep: leave the scores on disk after the groups are made. scratch: folder for large files (shared memory, say).
    """

    score: Literal["snip", "wanda", "magnitude", "random"] = "snip"
    positions: Positions = "predicting"
    samples: pydantic.PositiveInt = 128
    base: str | None = None
    mode: Literal["resident", "streamed"] = "resident"
    blocks: pydantic.PositiveInt = 4
    batch: pydantic.PositiveInt = 8
    keep: bool = False
    scratch: str | None = None

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.score == "random" and self.base is not None:
            raise ValueError("random scores do not depend on weights, so they have no base")
        return self


def score(
    model: nn.Module, samples: Iterable[Sample], spec: ScoreSpec = ScoreSpec(), *, folder: str | Path | None = None,
    base: Base | None = None, template: str | None = None, seed: int = 0, halves: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Scores:  # fmt: skip
    """The scores that `spec` asks for of the linears of the decoder blocks, (out, in) each.

    samples: encoded conversations, of which the first `spec.samples` are used; magnitude and random use none.
    folder: where to keep them, and to go on with what an earlier call left. base: the base model, or its weights by path;
    loaded by `spec.base` if not given. seed: of random scores. Else as for `snip`.
    Raises: UserError as `snip` and `wanda` do, and if a base is given that the spec does not name.
    """
    if base is None:
        base = base_model(model, spec)
    elif spec.base is None:
        raise UserError("a base is given, and the spec asks for no difference.", next="name it in the spec: score.base")
    if spec.score == "random":
        return random_scores(model, seed=seed, folder=folder)
    if spec.score == "magnitude":
        return magnitude(model, base=base, folder=folder)
    chosen = [sample for _, sample in zip(range(spec.samples), samples, strict=False)]
    if spec.score == "wanda":
        return wanda(model, chosen, positions=spec.positions, batch=spec.batch, base=base, halves=halves, folder=folder,
                     template=template, progress=progress)  # fmt: skip
    return snip(model, chosen, positions=spec.positions, batch=spec.batch, base=base, halves=halves, folder=folder,
                mode=spec.mode, blocks=spec.blocks, scratch=spec.scratch, template=template, progress=progress)  # fmt: skip


def base_model(model: nn.Module, spec: ScoreSpec) -> nn.Module | None:
    """The base model that the spec names, loaded in the model's dtype; None if it names none."""
    return None if spec.base is None else load(spec.base, dtype=next(model.parameters()).dtype)[0]


def magnitude(
    model: nn.Module, *, modules: Mapping[str, nn.Module] | None = None, base: Base | None = None, folder: str | Path | None = None
) -> Scores:  # fmt: skip
    """|W|, or |W − W_base|: rebuilt from the model when asked for, only a manifest is written."""
    weights = Magnitudes(model, modules, base)
    words = "|W|" if base is None else "|W − W_base|"
    return _unstored(Results(describe("magnitude", words, model, weights), folder), weights)


def random_scores(
    model: nn.Module, *, seed: int = 0, modules: Mapping[str, nn.Module] | None = None, folder: str | Path | None = None
) -> Scores:  # fmt: skip
    """A seeded permutation of each matrix, as ranks in (0, 1] (fp64): drawn again when asked for."""
    weights = Magnitudes(model, modules)
    manifest = describe("random", "ranks of a seeded permutation of each matrix", model, weights, seed=seed)
    return _unstored(Results({**manifest, "dtype": "float64"}, folder), weights)


class Cost(NamedTuple):
    """passes: over the data. memory, disk: bytes of the sums beside the model, and of what is written."""

    passes: int
    memory: int
    disk: int


def cost(model: nn.Module, spec: ScoreSpec, halves: bool = False) -> Cost:
    """What scoring this model takes: passes over the data, bytes of sums held at once, bytes written to a folder."""
    if spec.score in ("magnitude", "random"):
        return Cost(0, 0, 0)
    weights = Magnitudes(model)
    if spec.score == "wanda":
        size = 8 * (2 if halves else 1) * sum(in_ for _, in_ in weights.shapes.values())
        return Cost(1, size, size)
    passes = groups(model, list(weights), spec.mode, spec.blocks)
    each = [sum(weights.shapes[path][0] * weights.shapes[path][1] for path in group) for group in passes]
    return Cost(len(passes), max(each) * weights.dtype.itemsize * (2 if halves else 1), stored_bytes(weights, halves))


def _unstored(results: Results, weights: Magnitudes) -> Scores:
    results.begin()
    return results.finish(weights)
