"""A model's answers to a task's test questions, and what they are worth."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltalab.core.stats import wilson
from deltalab.data.chat import Conversation, encode_all
from deltalab.data.choices import encode_choices
from deltalab.data.collate import collate
from deltalab.data.likelihood import choose
from deltalab.data.metrics import Measures
from deltalab.data.tasks import Task
from deltalab.models.generate import generate
from deltalab.models.heads import is_classifier
from deltalab.train.loss import mean_nll

BATCH = 32
"""Questions that are answered at once."""


def evaluate(
    task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int,
    asked: Sequence[Conversation] | None = None,
) -> Measures:  # fmt: skip
    """The task's measures of a model, on these conversations or else all its test ones; empty of none, or with nothing to measure.

    A prompt that leaves no room in the context loses its beginning.
    """
    measured = bool(task.choices or task.reply_tokens or task.by_loss)
    if asked is None:
        asked = task.test() if measured else []
    if not asked or not measured:
        return {}
    found: Measures = {}
    if task.choices or task.reply_tokens:
        found |= task.score(answers(task, model, tokenizer, asked, context), asked)
    if task.by_loss:
        found |= task.of_loss(loss(model, tokenizer, asked, context))
    return found


def answers(
    task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Conversation], context: int
) -> list[Any]:
    """Numbers of the chosen replies, or the generated ones."""
    if is_classifier(model):
        return classes(model, tokenizer, asked, context)
    if task.choices:
        return choose(model, tokenizer, asked, task.choices, context=context, batch=BATCH).tolist()  # type: ignore[no-any-return]
    prompts = [c.messages[:-1] for c in asked]
    replies = generate(model, tokenizer, prompts, max_new_tokens=task.reply_tokens, batch_size=BATCH, too_long="cut")
    return [reply.text.strip() for reply in replies]


def classes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Conversation], context: int
) -> list[int]:
    """The class that a classifier finds likeliest for each question."""
    samples = encode_choices(tokenizer, asked, context, "cut")
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].input_ids))
    found, device, mode = [0] * len(samples), next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), BATCH):
                part = order[start : start + BATCH]
                batch = collate([samples[i] for i in part], tokenizer.pad_token_id or 0)
                del batch["labels"]
                logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
                for i, choice in zip(part, logits.argmax(-1).tolist(), strict=True):
                    found[i] = choice
    finally:
        model.train(mode)
    return found


def loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Conversation], context: int
) -> float:
    """The mean over the counted tokens of the conversations; of those longer than the context, up to there."""
    samples = sorted(encode_all(tokenizer, asked, context, "cut"), key=lambda sample: len(sample.input_ids))
    device, mode = next(model.parameters()).device, model.training
    model.eval()
    try:
        batches = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
        return mean_nll(model, batches, lambda some: {
            name: tensor.to(device) for name, tensor in collate(some, tokenizer.pad_token_id or 0).items()
        })  # fmt: skip
    finally:
        model.train(mode)


def summary(measures: Measures) -> dict[str, Any] | None:
    """Values by name as a record has them, with n, the examples, and Wilson's 95 % of the first share; None of nothing."""
    if not measures:
        return None
    out: dict[str, Any] = {name: measure.value for name, measure in measures.items()}
    items = next((measure.items for measure in measures.values() if measure.items is not None), None)
    if items is not None and set(items) <= {0.0, 1.0}:
        interval = wilson(round(sum(items)), len(items))
        out |= {"low": interval.low, "high": interval.high}
    return out if items is None else {**out, "n": len(items)}


def examples(measures: Mapping[str, Measures]) -> dict[str, dict[str, list[float]]]:
    """The values of single examples, by tag and measure."""
    return {
        tag: {name: one.items for name, one in found.items() if one.items is not None}
        for tag, found in measures.items()
    }
