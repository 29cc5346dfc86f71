"""Floor 4: training. `train` for a model at hand, `run_spec` for a whole run from a spec."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltalab.data.chat import Conversation, Encoded
from deltalab.deltas.freeze import Freezer
from deltalab.train.loop import Probe, Watch
from deltalab.train.result import TrainResult
from deltalab.train.spec import EvalSpec, LoopSpec, OptimSpec, RunSpec, TrackSpec, TrainSpec

__all__ = [
    "EvalSpec",
    "LoopSpec",
    "OptimSpec",
    "Probe",
    "RunSpec",
    "TrackSpec",
    "TrainResult",
    "TrainSpec",
    "Watch",
    "run_spec",
    "train",
]


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded] | Sequence[Conversation],
    spec: LoopSpec | OptimSpec | None = None, *, test: Sequence[Encoded] | Sequence[Conversation] = (),
    folder: str | Path | None = None, probes: Sequence[Probe] = (), freezer: Freezer | None = None, progress: bool = True,
) -> TrainResult:  # fmt: skip
    """Train whatever of `model` has `requires_grad`, in place.

    data: conversations, or samples that are encoded already. test: held-out ones; without them `spec.eval.fraction` of
    the data is held out. spec: a `LoopSpec` (a `TrainSpec` is one), or just its `OptimSpec`. folder: where checkpoints
    and curves go, so that the same call continues after a kill; without it nothing is written. probes: what is
    measured meanwhile (before `freezer` rewinds anything). freezer: entries held in place, see
    `deltalab.deltas.freeze`.

    Raises: UserError if nothing trains, no data is left, the folder is in use or holds another run, or the loss is no
    longer finite. KeyboardInterrupt after a checkpoint on Ctrl-C.
    """
    from deltalab.train.run import fit, hold
    from deltalab.train.tracking import opened

    spec = LoopSpec(optim=spec) if isinstance(spec, OptimSpec) else spec or LoopSpec()
    held = contextlib.nullcontext() if folder is None else hold(folder)
    with held as place, opened(spec, place) as trackers:
        trackers.check()
        return fit(model, tokenizer, data, test, spec, place, probes, freezer, progress, trackers=trackers)


def run_spec(
    spec: TrainSpec, folder: str | Path | None = None, *, progress: bool = True, watch: Watch | None = None
) -> Path:
    """The whole run of a spec: load, adapt, train, write the adapter, the curves and `record.json`; returns its path.

    watch: called at held-out evaluations while training, see `deltalab.train.loop.Watch`.
    """
    from deltalab.train.run import run_spec as run

    return run(spec, folder, progress=progress, watch=watch)
