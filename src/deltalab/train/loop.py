"""The training loop, to be read from top to bottom.

One optimizer step takes `batch` samples. Its loss is the mean negative log-likelihood over all counted tokens of those
samples, so cutting the batch into pieces or over processes, packed or padded, does not change the step: each piece's sum
is divided by the count of the whole batch. A method's penalty is added once a step and is not part of the noted loss.
Everything a step depends on (weights, moments, generators, data order, learning rate) is in the checkpoint or a pure
function of the step, so a resumed run is bitwise the undisturbed one.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import accelerate
import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.machine import Memory
from deltalab.data.chat import IGNORED, Encoded
from deltalab.data.collate import epoch_order
from deltalab.data.packing import Batch
from deltalab.deltas import schedule
from deltalab.deltas.freeze import Freezer
from deltalab.deltas.peft_format import load_trained_state, trained_state
from deltalab.deltas.switch import kernels_of, set_kernels
from deltalab.deltas.weights import is_adapted
from deltalab.models.precision import require_bfloat16
from deltalab.train import rng
from deltalab.train.checkpoint import Checkpoint, Checkpoints, require_same_run
from deltalab.train.curves import Curves
from deltalab.train.devices import cpu_only
from deltalab.train.interrupts import interrupts
from deltalab.train.loss import count, mean_nll, nll_sum, told
from deltalab.train.memory import checkpointed, offload
from deltalab.train.optim import load_optimizer_state, make_optimizer, optimizer_state, set_rate, trained_parameters
from deltalab.train.progress import Progress, say
from deltalab.train.result import State, TrainResult
from deltalab.train.spec import LoopSpec
from deltalab.train.tracking import Trackers
from deltalab.train.trial import Packing, choose_packing

ACCELERATE_MARKS = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What `Accelerator.prepare` sets on a model. Left there, a second run on it would skip the mixed precision."""
Watch = Callable[[Sequence[Mapping[str, Any]]], None]
"""Gets the rows of `curves/eval.jsonl` at each held-out evaluation between the first step and the last; what it raises ends the run."""


class Probe(Protocol):
    """Something measured while training: at step 0, every `every` steps, and at the last. It may draw no lasting RNG."""

    name: str
    every: int

    def measure(self, model: nn.Module, step: int) -> dict[str, Any]:
        """What is kept in `curves/<name>.jsonl`: JSON types."""
        ...


@dataclass
class Loop:
    """One run of one model. `run` is the loop; the other methods are its steps."""

    model: nn.Module
    pad_id: int
    data: Sequence[Encoded]
    held_out: Sequence[Encoded]
    spec: LoopSpec
    identity: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    probes: Sequence[Probe] = ()
    freezer: Freezer | None = None
    progress: bool = True
    watch: Watch | None = None
    trackers: Trackers = field(default_factory=Trackers)

    def __post_init__(self) -> None:
        optim, run, evaluation = self.spec.optim, self.spec.run, self.spec.eval
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in trained_parameters(self.model).items()}
        self.lengths = [len(sample.input_ids) for sample in self.data]
        self.counts = [count(sample) for sample in self.data]
        self.per_epoch = -(-len(self.data) // optim.batch)
        self.steps = optim.steps or self.per_epoch * (optim.epochs or 1)
        self.eval_every = evaluation.every or max(1, self.steps // 10)
        self.checkpoint_every = run.checkpoint_every or max(1, self.steps // 10)
        self.keeps_best = bool(self.held_out) and (evaluation.best or evaluation.patience is not None)
        self.curves = Curves(self.folder)
        self.checkpoints = Checkpoints(self.folder, run.keep) if self.folder else None
        self.state = State()
        self.best_weights: dict[str, Tensor] | None = None
        self.order: tuple[int, list[list[int]]] = (-1, [])
        self.packing = Packing(False, "")
        self.trains = False

    def run(self) -> TrainResult:
        """Train to the end, from the start or the last checkpoint; the model is left with its final weights.

        Entries that are frozen by rewinding are put back when all is over: probes and checkpoints see them as they moved.
        """
        AcceleratorState._reset_state()  # the precision is this run's, whatever an earlier one had
        self.accelerator = accelerate.Accelerator(
            cpu=cpu_only(), mixed_precision="bf16" if self.spec.run.dtype == "bfloat16" else "no"
        )
        if self.spec.run.dtype == "bfloat16":
            require_bfloat16(self.accelerator.device)
        rng.seed_all(self.spec.seed + self.accelerator.process_index)
        device = self.accelerator.device
        self.memory = Memory(str(device))
        self.saving = offload(self.model, device) if self.spec.run.offload else contextlib.nullcontext()
        if self.spec.run.kernels is not None and is_adapted(self.model):
            set_kernels(self.model, self.spec.run.kernels)
        optimizer = make_optimizer(self.model, self.spec.optim, device)
        if self.freezer is not None:
            self.freezer.install(optimizer)
        mode, marks = self.model.training, {key: self.model.__dict__.get(key) for key in ACCELERATE_MARKS}
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.on_main = self.accelerator.is_main_process
        try:
            self._choose_packing()
            self._resume()
            self.trackers.begin(self.curves, self.progress)
            shown = Progress(self.steps, self.state.step, self.progress and self.on_main)
            again = checkpointed(self.model, self.spec.run.checkpointing)
            with interrupts() as stop, contextlib.closing(shown), again:
                self._run(shown, stop)
            if self.keeps_best and self.state.best is not None:
                load_trained_state(self.model, self._best())
            if self.freezer is not None:
                self.freezer.finish()
        finally:
            self.model.train(mode)
            for key, value in marks.items():
                self.model.__dict__.pop(key, None)
                if value is not None:
                    self.model.__dict__[key] = value
            for parameter in self.names:
                parameter.grad = None
        losses = [row["loss"] for row in self.curves.rows.get("train", [])]
        s = self.state
        how = {"packed": self.packing.packed, "packing": self.packing.why, "loss_path": told(self.model),
               "kernels": kernels_of(self.model)}  # fmt: skip
        return TrainResult(s.step, losses, self.curves.rows, s.best, s.seconds, s.tokens, s.stopped, how)

    def _choose_packing(self) -> None:
        """Pack or pad, for the whole run; a run that goes on has to come to the same."""
        self.packing = choose_packing(self.spec.run, self.model, self.data)
        say(f"  batches: {self.packing}", self.progress and self.on_main)
        if self.identity:
            self.identity["packing"] = self.packing.packed

    def _run(self, shown: Progress, stop: threading.Event) -> None:
        if self.state.step == 0:
            self._measure(shown)
        else:
            shown.say(f"going on from the checkpoint of step {self.state.step}")
        while self.state.step < self.steps and not self.state.stopped:
            began = time.monotonic()
            samples = self.batch(self.state.step)
            self._step(samples, shown)
            self._measure(shown)
            tokens = sum(self.lengths[i] for i in samples)
            self.state.tokens += tokens
            self.state.seconds += time.monotonic() - began
            self.state.memory = max(self.state.memory, self.memory.above())
            done = self.state.step == self.steps or self.state.stopped
            stopping = self._any_process(stop.is_set())
            if done or stopping or self.state.step % self.checkpoint_every == 0:
                self._checkpoint()
            if stopping:
                raise KeyboardInterrupt(f"stopped at step {self.state.step} of {self.steps}")

    def _any_process(self, flag: bool) -> bool:
        """Whether the flag is up in any process: all of them have to stop at one step."""
        return flag if self.accelerator.num_processes == 1 else any(gather_object([flag]))

    def batch(self, step: int) -> list[int]:
        """The samples of a step: a pure function of the seed and the step."""
        epoch, position = divmod(step, self.per_epoch)
        if self.order[0] != epoch:
            spec, padded = self.spec, not self.packing.packed
            order = epoch_order(self.lengths, spec.optim.batch, seed=spec.seed, epoch=epoch, by_length=padded)
            self.order = (epoch, order)
        return self.order[1][position]

    def _step(self, samples: list[int], shown: Progress) -> None:
        """One optimizer step on `samples`, all processes and pieces together."""
        began = time.monotonic()
        total = sum(self.counts[i] for i in samples)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        rate = set_rate(self.optimizer, self.spec.optim, self.state.step, self.steps)
        if not self.trains:  # a walk through all modules, so not in every step
            self.prepared.train()
            self.trains = True
        loss = torch.zeros((), device=self.accelerator.device)
        lengths = [self.lengths[i] for i in samples]
        pieces = self.packing.cut(lengths, self.spec.optim.accumulate, world)[rank]
        for number, piece in enumerate(pieces, 1):
            last = number == len(pieces)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.prepared):
                # gradients are averaged over processes, so the sum is multiplied by their number
                with self.saving:
                    part = nll_sum(self.prepared, self.tensors([self.data[samples[i]] for i in piece])) / max(total, 1)
                extra = schedule.penalty(self.model) if last and is_adapted(self.model) else None
                # the penalty is the same in every process, so its average is itself
                self.accelerator.backward(part * world if extra is None else part * world + extra)
            loss += part.detach()
        norm = self.accelerator.clip_grad_norm_(list(self.names), self.spec.optim.clip or float("inf"))
        value, norm_value = float(self.accelerator.reduce(loss, "sum")), float(norm)
        if not np.isfinite(value) or not np.isfinite(norm_value):
            self._not_finite(value, norm_value)
        self.optimizer.step()
        if is_adapted(self.model):
            schedule.step(self.model, self.state.step + 1, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        tokens = sum(self.lengths[i] for i in samples)
        shown.step(self.state.step, value, tokens)
        seconds = time.monotonic() - began
        row = {"loss": value, "lr": rate, "grad_norm": norm_value, "tokens": tokens, "counted": total}
        self._note("train", {"step": self.state.step, **row})
        speed = {"seconds": round(seconds, 6), "tokens_per_second": round(tokens / seconds, 1)}
        self._note("speed", {"step": self.state.step, **speed})

    def _measure(self, shown: Progress) -> None:
        """Evaluation and probes that are due, without a trace in the generators."""
        step = self.state.step
        ends = step in (0, self.steps)
        evaluates = bool(self.held_out) and (ends or step % self.eval_every == 0)
        if not evaluates and not any(ends or step % probe.every == 0 for probe in self.probes):
            return
        self.trains = False
        with rng.kept():
            if evaluates:
                self._evaluate(shown)
            for probe in self.probes:
                if ends or self.state.stopped or step % probe.every == 0:
                    self.model.eval()
                    self._note(probe.name, {"step": step, **probe.measure(self.model, step)})
        if evaluates and self.watch is not None and not ends and not self.state.stopped:
            self.watch(self.curves.rows["eval"])

    def _evaluate(self, shown: Progress) -> None:
        """The held-out loss: mean over counted tokens. Remembers the best, and stops when patience is out.

        While a method's schedule runs, no weights are the best: they are not the method's yet.
        """
        self.prepared.eval()
        held = sorted(self.held_out, key=lambda sample: -len(sample.input_ids))
        size = -(-self.spec.optim.batch // self.spec.optim.accumulate)
        lengths = [len(sample.input_ids) for sample in held]
        (pieces,) = self.packing.cut(lengths, -(-len(held) // size), training=False)
        batches = [[held[i] for i in piece] for piece in pieces]
        loss, state = mean_nll(self.model, batches, self.tensors), self.state
        self._note("eval", {"step": state.step, "loss": loss})
        ready = schedule.is_ready(self.model)  # halfway through a schedule there is nothing to end with
        better = ready and np.isfinite(loss) and (state.best is None or loss < state.best["loss"])
        shown.say(
            f"step {state.step}/{self.steps} · held-out loss {loss:.3f}{' (best)' if better and state.step else ''}"
        )
        if better:
            state.best, state.since_best = {"step": state.step, "loss": loss}, 0
            if self.keeps_best and self.on_main:
                self._keep_best()
        elif ready:
            state.since_best += 1
            patience = self.spec.eval.patience
            state.stopped = patience is not None and state.since_best >= patience

    def tensors(self, samples: Sequence[Encoded]) -> Batch:
        """A batch on the device. A process or piece without a sample runs some sample with no label counted."""
        if not samples:
            some = self.data[0]
            none = None if some.choice is None else IGNORED
            samples = [dataclasses.replace(some, labels=[IGNORED] * len(some.labels), choice=none)]
        return self.packing.batch(samples, self.pad_id, self.accelerator.device)

    def _note(self, name: str, row: dict[str, Any]) -> None:
        if self.on_main:
            self.trackers.note(name, self.curves.add(name, row))

    def _keep_best(self) -> None:
        trained = {name: tensor.detach().cpu().clone() for name, tensor in trained_state(self.model).items()}
        if self.checkpoints is None:
            self.best_weights = trained
        else:
            self.checkpoints.save_best(trained, self.state.step)

    def _best(self) -> dict[str, Tensor]:
        self.accelerator.wait_for_everyone()
        weights = self.best_weights if self.checkpoints is None else self.checkpoints.best()
        if weights is None:
            raise UserError(
                f"the best weights of step {self.state.best} are gone from '{self.folder}'.",
                next="start over with run.resume=false",
            )
        return weights

    def _checkpoint(self) -> None:
        """Write the state after this step, unless a weight is not finite: the one before is then the last good one."""
        if self.checkpoints is None:
            return
        tensors, plain = rng.capture()
        everyone = gather_object([(tensors, plain)])
        trained = trained_state(self.model)
        if not self.on_main or not all(bool(tensor.isfinite().all()) for tensor in trained.values()):
            return
        self.curves.sync()
        moments = optimizer_state(getattr(self.optimizer, "optimizer", self.optimizer), self.names)
        generators = {f"{rank}.{name}": t for rank, (states, _) in enumerate(everyone) for name, t in states.items()}
        state = {"run": vars(self.state), "rng": [values for _, values in everyone], "identity": self.identity}
        kept = {"trained": trained, "optimizer": moments, "rng": generators}
        self.checkpoints.save(Checkpoint(self.state.step, kept, state))

    def _resume(self) -> None:
        """Go on from the last whole checkpoint of this run, or start clean."""
        found = self.checkpoints.last() if self.checkpoints and self.spec.run.resume else None
        if found is None:
            if self.on_main:
                if self.checkpoints:
                    self.checkpoints.clear()
                self.curves.restart(-1)
            return
        assert self.folder is not None
        require_same_run(self.identity, found.state["identity"], self.folder)
        load_trained_state(self.model, found.tensors["trained"])
        load_optimizer_state(
            getattr(self.optimizer, "optimizer", self.optimizer), found.tensors["optimizer"], self.model
        )
        rank = self.accelerator.process_index
        mine = {name.partition(".")[2]: t for name, t in found.tensors["rng"].items() if name.startswith(f"{rank}.")}
        rng.restore(mine, found.state["rng"][rank])
        self.state = State(**found.state["run"])
        if self.on_main:
            self.curves.restart(self.state.step)

    def _not_finite(self, loss: float, norm: float) -> None:
        kept = self.checkpoints.last() if self.checkpoints else None
        good = f"the last good checkpoint is kept: step {kept.step} in '{self.folder}'" if kept else ""
        where = good or "no checkpoint was written before it"
        self.curves.sync()
        raise UserError(f"the run broke down in step {self.state.step + 1}: loss {loss}, gradient norm {norm}.", found=where,
                        next=f"lower optim.lr (now {self.spec.optim.lr:g}) or optim.clip, lengthen optim.warmup, and use another output folder or run.resume=false")  # fmt: skip
