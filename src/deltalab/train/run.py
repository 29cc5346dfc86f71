"""A whole run: from a spec to an adapter, curves and a record; and the preparation of data for the loop."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltalab.core.errors import UserError
from deltalab.core.files import owned, remove, write_json
from deltalab.core.records import read_record, write_record
from deltalab.core.spec import digest
from deltalab.data.chat import Conversation, Encoded, Encodings, encode_all, samples_digest
from deltalab.data.choices import encode_choices
from deltalab.data.collate import collate
from deltalab.deltas.adapt import Batches, trainable
from deltalab.deltas.freeze import Freezer
from deltalab.deltas.peft_format import save_adapter
from deltalab.deltas.spec import DeltaSpec, ParameterSpec
from deltalab.deltas.switch import unload
from deltalab.models.heads import is_classifier, is_encoder
from deltalab.models.load import load, load_tokenizer, model_digest
from deltalab.models.precision import require_bfloat16
from deltalab.train import names
from deltalab.train.checkpoint import Checkpoints, changes
from deltalab.train.costs import of_adapter, of_step
from deltalab.train.devices import processes
from deltalab.train.evaluate import examples, summary
from deltalab.train.loop import Loop, Probe, Watch
from deltalab.train.optim import trained_parameters
from deltalab.train.parts import context_of, read_parts, retained, scores
from deltalab.train.probes import probes_of
from deltalab.train.progress import say
from deltalab.train.result import TrainResult
from deltalab.train.spec import LoopSpec, TrainSpec
from deltalab.train.tracking import Trackers, opened

CALIBRATION = 64
"""Training samples that a start which looks at activations is given."""

Samples = Sequence[Encoded] | Sequence[Conversation]


def run_spec(
    spec: TrainSpec, folder: str | Path | None = None, *, progress: bool = True, watch: Watch | None = None
) -> Path:
    """Load, adapt, train, score; write `adapter/`, `curves/`, `examples.json` (the scores of single examples) and
    `record.json`; return the record's path.

    watch: called at held-out evaluations while training, see `loop.Watch`.
    A finished folder of the same spec is left as it is. Raises: UserError for a folder of another spec.
    """
    place = folder or spec.output
    if place is None:
        raise UserError(
            "the run has no output folder.", next="set output in the spec, or on the command line: output=runs/first"
        )
    progress = progress and processes().is_main_process
    with hold(place) as home, opened(spec, home) as trackers:
        if finished(spec, home):
            say(f"'{home}' holds this run, finished: nothing is done again.", progress)
            return home / "record.json"
        trackers.check()
        began = time.monotonic()
        parts = read_parts(spec)
        conversations, tests = [c for part in parts for c in part.train], [c for part in parts for c in part.test]
        if spec.run.dtype == "bfloat16":
            require_bfloat16(processes().device)
        own_weights = any(isinstance(item, ParameterSpec) for item in spec.adapt)
        device = processes().device
        # a frozen base may be 16 bit; weights that train stay fp32 and only their use is cast
        head, labels = head_of(spec)
        model, tokenizer = load(
            spec.model, head=head, labels=labels, dtype="float32" if own_weights or labels else spec.run.dtype,
            device_map=None if device.type == "cpu" else device,
            quantize=spec.quantize, adapt=spec.adapt, seed=spec.seed, calibration=calibration(spec, conversations, tests),
        )  # fmt: skip
        base = model_digest(model)
        trains = trainable(model)
        say(str(trains), progress)
        before, known = scores(parts, spec, model, tokenizer), retained(spec, model, tokenizer)
        trackers.add(names.of_scores({tag: summary(m) for tag, m in before.items()}), 0)
        ended: list[Loop] = []
        result = fit(
            model, tokenizer, conversations, tests, spec, home, (), None, progress, ended.append, watch, trackers
        )
        (loop,) = ended
        after, kept = scores(parts, spec, model, tokenizer), retained(spec, model, tokenizer)
        if processes().is_main_process:
            save_adapter(model, home / "adapter")
            if after:
                write_json(home / "examples.json", {"before": examples(before), "after": examples(after)})
            size = sum(file.stat().st_size for file in (home / "adapter").iterdir())
            cost, proofs = _costs(spec, loop, home / "adapter")
            unload(model)
            body = {
                "seed": spec.seed, "seconds": round(time.monotonic() - began, 1), "base": base,
                "result": {"steps": result.steps, "tokens": result.tokens, "stopped_early": result.stopped_early, "best": result.best,
                           "loss": list(result.mean_loss()), "held_out": [row["loss"] for row in result.curves.get("eval", [])],
                           "training_seconds": round(result.seconds, 1)},
                "scores": {"before": {tag: summary(m) for tag, m in before.items()},
                           "after": {tag: summary(m) for tag, m in after.items()}}, "data": result.data,
                "forgetting": {tag: {"before": loss, "after": kept[tag]} for tag, loss in known.items()},
                "sizes": {"trained": trains.count, "base": trains.total, "adapter_bytes": size, "kinds": [list(row) for row in trains.rows]},
                "cost": {"tokens_per_second": round(result.tokens / max(result.seconds, 1e-9), 1),
                         "memory_before": loop.memory.before, "memory_peak": loop.memory.before + loop.state.memory, **cost},
                "proofs": {"base_untouched": model_digest(model) == base, **proofs},  # bitwise, the adapter taken off
                "device": str(device), "threads": torch.get_num_threads(),
            }  # fmt: skip
            trackers.add(names.of_record(body), result.steps)
            write_record(home, "train", spec, body)
            Checkpoints(home, spec.run.keep).clear()
        processes().wait_for_everyone()
        return home / "record.json"


def _costs(spec: TrainSpec, loop: Loop, adapter: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `train.costs` finds, for the record's `cost` and `proofs`; nothing if it is not asked for, or of several processes."""
    if not spec.costs or processes().num_processes > 1:
        return {}, {}
    steps = sorted(row["seconds"] for row in loop.curves.rows.get("speed", []))
    cost = {"step_seconds": steps[len(steps) // 2] if steps else None, **of_step(loop)}
    batch = collate([(loop.held_out or loop.data)[0]], loop.pad_id)
    inputs = {key: value.to(loop.accelerator.device) for key, value in batch.items() if key != "labels"}
    cost |= of_adapter(loop.model, adapter, inputs)
    proofs = {name: cost.pop(name) for name in ("gradient_only_delta", "reloaded")}
    return cost, proofs


def head_of(spec: TrainSpec) -> tuple[str | None, int | None]:
    """What `load` is asked for: the head, and its number of classes; None where it is the model's own.

    Raises: UserError if the tasks are not choices among one number of answers, and the model is to be a classifier.
    """
    if spec.head == "CausalLM" or (spec.head is None and not is_encoder(load_tokenizer(spec.model)[0])):
        return spec.head, None
    counts = {task.task: len(task.choices) for task in spec.data}
    if 0 in counts.values() or len(set(counts.values())) > 1:
        raise UserError(f"'{spec.model}' is to choose among classes, and the tasks are not choices among one number of them.",
                        found=", ".join(f"{task}: {count or 'no choices'}" for task, count in counts.items()),
                        next="tasks like sst2, rte, mrpc, or rows with answers; or a model that writes text")  # fmt: skip
    return "SequenceClassification", next(iter(counts.values()))


def fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Samples, test: Samples, spec: LoopSpec,
    folder: Path | None, probes: Sequence[Probe], freezer: Freezer | None, progress: bool,
    ended: Callable[[Loop], object] = lambda _: None, watch: Watch | None = None, trackers: Trackers | None = None,
) -> TrainResult:  # fmt: skip
    """Encode, hold out, and run the loop in `folder`, which the caller holds. ended: is given the loop when all is over. trackers:
    of the run, which the caller closes."""
    progress = progress and processes().is_main_process
    context, classes = context_of(model, spec), is_classifier(model)
    samples = as_encodings(tokenizer, data, context, spec, classes)
    say(f"  data: {samples}", progress)
    if len(test):
        train_set, held_out = list(samples), _some(as_encodings(tokenizer, test, context, spec, classes), spec)
    else:
        train_set, held_out = hold_out(samples, spec)
    if not sum(sample.counted for sample in train_set):
        raise UserError("no sample to train on is left.", found=f"{len(held_out)} held out", next="lower eval.fraction")
    digests = {"data": samples_digest(train_set), "held-out data": samples_digest(held_out)}
    identity: dict[str, Any] = {}
    if folder is not None:
        shapes = {name: list(p.shape) for name, p in trained_parameters(model).items()}
        identity = {"spec": spec.plain(), **digests, "freezing": freezer and freezer.variant, "frozen entries": freezer and freezer.digest, "model": model_digest(model), "trained parameters": digest(shapes),
                    "number of processes": processes().num_processes}  # fmt: skip
    pad = tokenizer.pad_token_id or 0
    probes = [*probes, *probes_of(spec.probe, model, pad, held_out or train_set)]
    trackers, sizes = trackers or Trackers(), trainable(model)
    trackers.add(names.of_sizes(sizes.count, sizes.total), 0)
    loop = Loop(model, pad, train_set, held_out, spec, identity, folder, probes, freezer, progress, watch, trackers)
    result = loop.run()
    ended(loop)
    counts = {"samples": len(train_set), "held_out": len(held_out), "cut": samples.cut, "skipped": samples.skipped,
              "unlabelled": samples.unlabelled, "context": context}  # fmt: skip
    result.data.update({"digest": digests["data"], "held_out_digest": digests["held-out data"], **counts})
    return result


def calibration(spec: TrainSpec, data: Samples, test: Samples) -> Batches | None:
    """Batches of the first training samples, if the start of a delta looks at activations."""
    if not looks_at_activations(spec.adapt):
        return None
    config, tokenizer = load_tokenizer(spec.model)
    samples = as_encodings(tokenizer, data, context_of(config, spec), spec, head_of(spec)[1] is not None)
    return first_batches(list(samples) if len(test) else hold_out(samples, spec)[0], tokenizer, spec)


def looks_at_activations(items: Sequence[Any]) -> bool:
    """Whether one of these specs of deltas starts from batches of inputs."""
    return any(isinstance(item, DeltaSpec) and item.calibrates for item in items)


def first_batches(train_set: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, spec: LoopSpec) -> Batches:
    """What such a start is shown: the first training samples."""
    shown, size = train_set[:CALIBRATION], spec.optim.batch
    return [collate(shown[i : i + size], tokenizer.pad_token_id or 0) for i in range(0, len(shown), size)]


def as_encodings(
    tokenizer: PreTrainedTokenizerBase, data: Samples, context: int, spec: LoopSpec, classes: bool = False
) -> Encodings:
    """Conversations encoded; samples that are encoded already as they come, each checked against the context.

    classes: for a classifier.
    """
    if isinstance(data, Encodings):
        return data
    if len(data) and isinstance(data[0], Encoded):
        longest = max(len(sample.input_ids) for sample in data)  # type: ignore[union-attr]
        if longest > context:
            raise UserError(
                f"a sample has {longest} tokens, and the context is {context}.",
                next="encode with that context, or raise run.context",
            )
        return Encodings(tuple(data))  # type: ignore[arg-type]
    encoded = encode_choices if classes else encode_all
    return encoded(tokenizer, data, context, spec.run.too_long)  # type: ignore[arg-type]


def hold_out(samples: Sequence[Encoded], spec: LoopSpec) -> tuple[list[Encoded], list[Encoded]]:
    """(training, held-out): a seeded fraction of the samples, at most `eval.limit`; none from fewer than ten."""
    n = (
        0
        if len(samples) < 10 or not spec.eval.fraction
        else max(1, min(round(spec.eval.fraction * len(samples)), spec.eval.limit))
    )
    order = np.random.default_rng([spec.seed, 1]).permutation(len(samples))
    held = set(order[:n].tolist())
    return [s for i, s in enumerate(samples) if i not in held], [samples[i] for i in sorted(held)]


def finished(spec: TrainSpec, folder: Path) -> bool:
    """Whether `folder` holds the finished run of `spec`.

    Raises: UserError if it holds another one's.
    """
    if not (folder / "record.json").is_file():
        return False
    record = read_record(folder)
    differences = (
        changes(record["spec"], spec.plain()) if record["kind"] == "train" else [("kind", record["kind"], "train")]
    )
    if differences:
        raise UserError(f"output folder '{folder}' holds another finished run.", found="; ".join(f"{key}: {was!r} there, {now!r} here" for key, was, now in differences),
                        next="choose another output folder: output=…")  # fmt: skip
    return True


@contextlib.contextmanager
def hold(folder: str | Path) -> Iterator[Path]:
    """The output folder, held by the first process of this run. A mistake found before anything is written leaves none."""
    place = Path(folder)
    new = not place.exists()
    with owned(place, "train") if processes().is_main_process else contextlib.nullcontext():
        try:
            yield place
        except BaseException:
            if new and place.is_dir() and [file.name for file in place.iterdir()] == [".lock"]:
                remove(place)
            raise


def _some(samples: Encodings, spec: LoopSpec) -> list[Encoded]:
    """At most `eval.limit` samples, seeded."""
    order = np.random.default_rng([spec.seed, 1]).permutation(len(samples))[: spec.eval.limit]
    return [samples[i] for i in sorted(order.tolist())]
