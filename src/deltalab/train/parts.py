"""The data of a run: of each task what is trained on and what it is tested on, and its measures of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltalab.core.errors import UserError
from deltalab.data.chat import Conversation
from deltalab.data.metrics import Measures
from deltalab.data.tasks import LMEvalTask, Task
from deltalab.train.evaluate import evaluate, loss
from deltalab.train.lm_eval import lm_eval_scores
from deltalab.train.spec import LoopSpec, TrainSpec

LONGEST = 1024
"""Default limit of a sample in tokens where the model's own context is longer: memory grows with it."""


@dataclass(frozen=True)
class Part:
    """One task's data. tag: the task's; of two with one tag the second is `tag.2`. validates: `test` is held out of the training data."""

    tag: str
    task: Task
    train: list[Conversation]
    test: list[Conversation]
    validates: bool = False


def read_parts(spec: TrainSpec) -> list[Part]:
    """Every task's data; with `validation` that share of what it trains on is in the place of its test data.

    Raises: UserError if a task is too small for that.
    """
    tasks: Sequence[Task] = spec.data
    return [_part(task, tag, spec.validation) for task, tag in zip(tasks, _tags(tasks), strict=True)]


def _tags(tasks: Sequence[Task]) -> list[str]:
    names = [str(getattr(task, "task")) for task in tasks]  # noqa: B009
    return [name if not (n := names[:i].count(name)) else f"{name}.{n + 1}" for i, name in enumerate(names)]


def _part(task: Task, tag: str, validation: float) -> Part:
    train = task.train()
    if isinstance(task, LMEvalTask):
        return Part(tag, task, [], [], validation > 0)
    test = task.test()  # with validation read for its faults alone, which would else come to light after the tuning
    if not validation:
        return Part(tag, task, train, test)
    of = [c.meta.get("same") or repr(c.messages) for c in train]
    groups = sorted(set(of))
    n = round(validation * len(groups))
    if not 0 < n < len(groups):
        raise UserError(
            f"validation={validation:g} leaves nothing on one side of the task '{tag}'.",
            found=f"{len(groups)} different conversations to train on", next="another share, or more data",
        )  # fmt: skip
    # the same ones for every seed and setting; what is repeated goes to one side, or it would be known already
    held = {groups[i] for i in np.random.default_rng(0).permutation(len(groups))[:n]}
    sides = [[c for c, key in zip(train, of, strict=True) if (key in held) is out] for out in (False, True)]
    return Part(tag, task, sides[0], sides[1], True)


def scores(
    parts: Sequence[Part], spec: LoopSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Measures]:
    """The tasks' own measures, by tag, those of lm-eval by its names; a name that is there already gets a number.

    Where data is held out for validation, lm-eval is not asked: it tests on test data.
    """
    context = context_of(model, spec)
    found: dict[str, Measures] = {}
    for part in parts:
        if isinstance(part.task, LMEvalTask):
            some = {} if part.validates else lm_eval_scores(part.task, model, tokenizer)
        else:
            some = {part.tag: evaluate(part.task, model, tokenizer, context, part.test)}
        for tag, measures in some.items():
            if measures:
                same = sum(name == tag or name.rpartition(".")[0] == tag for name in found)
                found[f"{tag}.{same + 1}" if same else tag] = measures
    return found


def retained(spec: TrainSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """The mean loss of what the base knew already, by the tags of `retain`: nats a counted token."""
    context, tasks = context_of(model, spec), spec.retain
    known = [task.test() or task.train() for task in tasks]
    return {tag: loss(model, tokenizer, asked, context) for tag, asked in zip(_tags(tasks), known, strict=True)}


def context_of(model: torch.nn.Module | PretrainedConfig, spec: LoopSpec) -> int:
    """The longest sample in tokens, for a model or its config.

    Raises: UserError if the spec asks for more than the model has positions.
    """
    most = getattr(getattr(model, "config", model), "max_position_embeddings", None)
    asked = spec.run.context
    if most is not None and asked is not None and asked > most:
        raise UserError(
            f"run.context is {asked}, and the model has {most} positions.", next=f"run.context={most} or less"
        )
    return asked or min(most or LONGEST, LONGEST)
