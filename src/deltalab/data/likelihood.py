"""Scoring by likelihood: which of a few given replies does a model find most likely? No text is generated."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float, Int
from deltalab.data.chat import IGNORED, Conversation, Encoded
from deltalab.data.collate import collate
from deltalab.data.template import ChatTemplate


def reply_logprobs(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation],
    choices: Sequence[str], *, context: int, batch: int = 32,
) -> Float[Tensor, "n choices"]:  # fmt: skip
    """log p(choice | prompt): the sum of log p over the choice's own tokens, its end token left out; fp64 on the CPU.

    The prompt is every message before the conversation's last reply.
    Raises: UserError if a prompt leaves no room for a choice within `context`.
    """
    template = ChatTemplate(tokenizer)
    samples = [_sample(template, c, choice, context) for c in conversations for choice in choices]
    sums = torch.zeros(len(samples), dtype=torch.float64)
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].input_ids))
    device = next(model.parameters()).device
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                tensors = {
                    k: v.to(device) for k, v in collate([samples[i] for i in rows], tokenizer.pad_token_id or 0).items()
                }
                labels = tensors.pop("labels")[:, 1:]
                logits = model(**tensors, use_cache=False).logits[:, :-1]
                kept = labels != IGNORED
                picked = torch.zeros(labels.shape, dtype=torch.float64, device=device)
                picked[kept] = logits[kept].double().log_softmax(-1).gather(-1, labels[kept][:, None])[:, 0]
                sums[rows] = picked.sum(-1).cpu()
    finally:
        model.train(mode)
    return sums.view(len(conversations), len(choices))


def choose(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation],
    choices: Sequence[str], *, context: int, batch: int = 32,
) -> Int[Tensor, " n"]:  # fmt: skip
    """Index of the likeliest choice for each conversation."""
    return reply_logprobs(model, tokenizer, conversations, choices, context=context, batch=batch).argmax(-1)


def _sample(template: ChatTemplate, conversation: Conversation, choice: str, context: int) -> Encoded:
    messages = list(conversation.messages)
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    ids, counted = template.tokens([*messages, {"role": "assistant", "content": choice}], last=True)
    labels = [i if flag and i not in template.special else IGNORED for i, flag in zip(ids, counted, strict=True)]
    if len(ids) > context or all(label == IGNORED for label in labels):
        raise UserError(f"a prompt of {len(ids)} tokens leaves no room for the reply '{choice}' in a context of {context}.",
                        found=conversation.messages[0]["content"][:80], next="raise run.context or leave such prompts out")  # fmt: skip
    return Encoded(ids, labels)
