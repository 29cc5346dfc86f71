"""Scores of one model on the conversations of tasks, from a spec to a folder: what `deltalab score` runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from deltalab.core.errors import UserError
from deltalab.core.files import owned
from deltalab.core.spec import Spec
from deltalab.data.chat import Encodings, encode_all
from deltalab.data.tasks import DataSpec, RefusalsTask
from deltalab.data.template import ChatTemplate
from deltalab.deltas.select import leaf
from deltalab.models.load import load
from deltalab.safety.score_files import Scores
from deltalab.safety.scores import Cost, ScoreSpec, cost, score
from deltalab.train.devices import processes
from deltalab.train.parts import LONGEST


class ScoreRunSpec(Spec):
    """Score `model` on the training conversations of the tasks in `data`.

    context: longest sample in tokens, longer ones are skipped; null for the model's own, at most 1024. dtype: of the
    model. halves: keep even and odd samples apart. seed: of random scores. output: folder.
    """

    model: str = "organism"
    data: Annotated[list[DataSpec], Field(min_length=1)] = [RefusalsTask(limit=128)]
    score: ScoreSpec = ScoreSpec()
    context: PositiveInt | None = None
    dtype: str = "float32"
    halves: bool = False
    seed: NonNegativeInt = 0
    output: str | None = None


def run_scores(
    spec: ScoreRunSpec, folder: str | Path | None = None, *, say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:  # fmt: skip
    """Compute the scores in `folder`, or go on with what is there. progress: called with samples done and samples in all.

    Raises: UserError for a folder of other scores, and as `score` does.
    """
    place = folder or spec.output
    if place is None:
        raise UserError("the scores have no output folder.", next="--output FOLDER, or set output in the spec")
    with owned(place, "score") as home:
        model, tokenizer = load(spec.model, dtype=spec.dtype)
        model.to(processes().device)
        samples: Sequence[Any] = ()
        needs = cost(model, spec.score, spec.halves)
        if needs.passes:
            data = encode_all(tokenizer, [c for task in spec.data for c in task.train()], _context(model, spec))
            samples = data[: spec.score.samples]
            say(_announced(data, len(samples), needs))
        total = needs.passes * len(samples)
        return score(
            model, samples, spec.score, folder=home, template=ChatTemplate(tokenizer).source, seed=spec.seed, halves=spec.halves,
            progress=None if progress is None else lambda done: progress(done, total),
        )  # fmt: skip


def by_kind(scores: Scores) -> list[dict[str, Any]]:
    """A row for each kind of linear (the last part of its path): matrices, entries; mean and largest score, and the mean
    over matrices of their medians. One matrix is in memory at a time."""
    rows: dict[str, dict[str, Any]] = {}
    for path in scores:
        values = scores[path].double()
        row = rows.setdefault(
            leaf(path), {"kind": leaf(path), "matrices": 0, "entries": 0, "mean": 0.0, "median": 0.0, "largest": 0.0}
        )
        row["matrices"] += 1
        row["entries"] += values.numel()
        row["mean"] += float(values.sum())
        row["median"] += float(values.median())
        row["largest"] = max(row["largest"], float(values.max()))
    for row in rows.values():
        row["mean"] /= row["entries"]
        row["median"] /= row["matrices"]
    return list(rows.values())


def _context(model: torch.nn.Module, spec: ScoreRunSpec) -> int:
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None) or LONGEST
    if spec.context is not None and spec.context > most:
        raise UserError(
            f"context is {spec.context}, and the model has {most} positions.", next=f"context={most} or less"
        )
    return spec.context or min(most, LONGEST)


def _announced(data: Encodings, used: int, needs: Cost) -> str:
    passes = "one pass" if needs.passes == 1 else f"{needs.passes} passes"
    return f"{used} of {data}; {passes}, sums of {needs.memory / 2**20:,.1f} MiB in memory, {needs.disk / 2**20:,.1f} MiB on disk"
