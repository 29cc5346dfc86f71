"""What the stages of a study work on, made once a process: the model, encoded data, questions, groups, random groups."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import accelerate
import torch
from torch import nn

from deltalab.core.machine import settle_threads
from deltalab.core.spec import digest
from deltalab.data.chat import Encodings, encode_all
from deltalab.data.tasks import Task
from deltalab.deltas.adapt import adapt, base_weight, is_adapted, unload
from deltalab.deltas.select import scored_linears
from deltalab.models.load import load, model_digest
from deltalab.safety.groups import Group
from deltalab.safety.scores import ScoreSpec
from deltalab.studies import behaviour
from deltalab.studies.parts import EvaluateSpec, TuneSpec, loop_of
from deltalab.studies.stages import Context
from deltalab.train.parts import context_of
from deltalab.train.run import first_batches, hold_out, looks_at_activations


class HasMaterials(Protocol):
    """The fields of a study's spec that materials are made from."""

    @property
    def model(self) -> str: ...
    @property
    def score(self) -> ScoreSpec: ...
    @property
    def tune(self) -> TuneSpec: ...
    @property
    def evaluate(self) -> EvaluateSpec: ...
    @property
    def calibration(self) -> Mapping[str, tuple[Sequence[Task], slice]]:
        """Name → the tasks that weights are scored on, and which of their samples are taken."""
        ...

    @property
    def seeds(self) -> list[int]: ...


@dataclass(frozen=True)
class Loaded:
    """A model as it was loaded, its tokenizer, the digest of its weights, and its sizes for the record."""

    model: Any
    tokenizer: Any
    digest: str
    facts: dict[str, Any]


class Materials:
    """Everything is kept in the context's `shared`, and made again by whichever process needs it."""

    def __init__(self, spec: HasMaterials) -> None:
        self.spec = spec

    def loaded(self, ctx: Context) -> Loaded:
        """The study's model, loaded once a process."""
        if "loaded" not in ctx.shared:
            model, tokenizer = load(self.spec.model)
            model.to(accelerate.PartialState().device)
            settle_threads(sum(p.numel() for p in model.parameters()))
            linears = scored_linears(model)
            facts = {
                "parameters": sum(p.numel() for p in model.parameters()),
                "scored": sum(m.weight.numel() for m in linears.values()),
                "matrices": len(linears),
                "dtype": str(model.dtype).removeprefix("torch."),
            }
            ctx.shared["loaded"] = Loaded(model, tokenizer, model_digest(model), facts)
            # a delta that does not go on this model is told now, not after the first stages
            unload(self.adapted(ctx, self.data(ctx, "tune"), self.spec.seeds[0]))
        loaded: Loaded = ctx.shared["loaded"]
        return loaded

    def base(self, ctx: Context) -> tuple[Any, Any]:
        """Model and tokenizer as they were loaded, whatever an earlier stage put on the model."""
        loaded = self.loaded(ctx)
        if is_adapted(loaded.model):
            unload(loaded.model)
        ctx.shared.pop("tuned", None)
        return loaded.model, loaded.tokenizer

    def adapted(self, ctx: Context, data: Encodings, seed: int) -> Any:
        """The base with a fresh delta of the study's on it. data: what it will be tuned on; a start may look at it."""
        model, tokenizer = self.base(ctx)
        items, batches = list(self.spec.tune.adapt), None
        if looks_at_activations(items):
            loop = loop_of(self.spec.tune, None, seed)
            batches = first_batches(hold_out(data, loop)[0], tokenizer, loop)
        return adapt(model, items, seed=seed, calibration=batches)

    def data(self, ctx: Context, name: str) -> Encodings:
        """Encoded conversations: all that is tuned on (`tune`), or what is scored on."""
        kept = ctx.shared.setdefault("data", {})
        if name not in kept:
            loaded, loop = self.loaded(ctx), loop_of(self.spec.tune, None, self.spec.seeds[0])
            tasks, part = (self.spec.tune.data, slice(None)) if name == "tune" else self.spec.calibration[name]
            conversations = [conversation for task in tasks for conversation in task.train()]
            encoded = encode_all(loaded.tokenizer, conversations, context_of(loaded.model, loop), loop.run.too_long)
            kept[name] = dataclasses.replace(encoded, items=encoded.items[part])
        encodings: Encodings = kept[name]
        return encodings

    def questions(self, ctx: Context) -> behaviour.Questions:
        """What is asked before and after."""
        if "questions" not in ctx.shared:
            ctx.shared["questions"] = behaviour.questions(self.spec.evaluate, self.spec.seeds[0])
        questions: behaviour.Questions = ctx.shared["questions"]
        return questions

    def groups(self, ctx: Context, folder: Path, names: Sequence[str]) -> dict[str, Group]:
        """The groups that an earlier stage left in `folder`."""
        if "groups" not in ctx.shared:
            ctx.shared["groups"] = {name: Group.load(folder / name) for name in names}
        groups: dict[str, Group] = ctx.shared["groups"]
        return groups

    def scores_folder(self, ctx: Context, name: str) -> Path:
        """Where scores lie until they are needed no more: the scratch folder of choice, or the stage's own."""
        scratch = self.spec.score.scratch
        root = Path(scratch) / f"deltalab-{digest(str(ctx.folder.resolve()))}" if scratch else ctx.path("scores")
        return root / name

    # ---- what stages are computed from ----------------------------------------------------------------------------

    def of_model(self, ctx: Context) -> dict[str, Any]:
        """Inputs of a stage that depends on the model alone."""
        return {"model": self.loaded(ctx).digest}

    def scored_on(self, ctx: Context) -> dict[str, Any]:
        """Inputs of a stage that scores."""
        return self.of_model(ctx) | {f"{name} data": self.data(ctx, name).digest() for name in self.spec.calibration}

    def tuned_on(self, ctx: Context) -> dict[str, Any]:
        """Inputs of a stage that tunes."""
        return self.of_model(ctx) | {"tuning data": self.data(ctx, "tune").digest()}

    def asked(self, ctx: Context) -> dict[str, Any]:
        """Inputs of a stage that asks."""
        return self.of_model(ctx) | {"questions": self.questions(ctx).digest()}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Path → W₀ of every scored linear."""
    return {path: base_weight(model, path) for path in scored_linears(model)}
