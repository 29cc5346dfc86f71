"""Text out of a model: batches of prompts, padded on the left, with results in the order of the prompts.

What a prompt gets does not depend on the prompts beside it in a batch: positions count from its own first token,
padding is masked, the room for its reply is its own, and sampling draws from a generator of its own.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from deltalab.core.errors import UserError
from deltalab.core.shapes import Bool, Float
from deltalab.data.template import ChatTemplate
from deltalab.models.heads import require_writer

Prompt = str | Sequence[Mapping[str, str]]
TooLong = Literal["error", "cut"]


@dataclass(frozen=True)
class Generation:
    """One reply. tokens: how many it has; finished: the model ended it; cut: the prompt lost its beginning."""

    prompt: str
    text: str
    tokens: int
    finished: bool
    cut: bool = False


@dataclass(frozen=True)
class _Row:
    """A prompt on its way: token ids, tokens that fit behind them, the seed of its samples."""

    index: int
    ids: list[int]
    room: int
    seed: int
    cut: bool


def generate(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, prompts: Sequence[Prompt], *,
    max_new_tokens: int = 64, batch_size: int = 32, system: str | None = None, template: bool = True,
    temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, too_long: TooLong = "error",
    on_progress: Callable[[int, int], None] | None = None, on_text: Callable[[str], None] | None = None,
    around: Callable[[list[int]], AbstractContextManager[Any]] | None = None,
) -> list[Generation]:  # fmt: skip
    """Replies to prompts, in their order.

    prompts: a user's message each, or a list of messages. template: render with the tokenizer's chat template (a plain
    `User: …` where it has none); otherwise the prompt is continued as it is. temperature: 0 is greedy. top_p: samples
    come from the most probable tokens whose probabilities add up to it (arXiv:1904.09751). seed: of the
    samples; the same prompt given twice gets two samples. too_long: for a prompt that leaves no room in the context:
    an error, or `cut` its beginning off (marked in the result). A reply ends at the context's end.
    on_progress(done, total) is called after each batch; on_text(piece), for a single prompt, after each token: the
    pieces, some of them empty, together are the reply's text, and what it raises ends the reply. around(indices), of the
    prompts of a batch, is a context that the batch runs in.
    Raises: UserError for a model that writes no text, a prompt that is too long or empty, or an argument out of range.
    """
    require_settings(max_new_tokens, batch_size, temperature, top_p)
    require_writer(model)
    if on_text is not None and len(prompts) != 1:
        raise UserError("on_text follows the reply to one prompt.", found=f"{len(prompts)} prompts")
    texts = [_text(tokenizer, prompt, system, template) for prompt in prompts]
    rows = _rows(model, tokenizer, texts, template, max_new_tokens, seed, too_long)
    results: dict[int, Generation] = {}
    stops = stop_tokens(model, tokenizer)
    with _ready(model):
        for batch in _batches(rows, batch_size):
            stream = None if on_text is None else _Stream(tokenizer, stops, on_text)
            with nullcontext() if around is None else around([row.index for row in batch]):
                replies = _reply(model, tokenizer, batch, (temperature, top_p), stops, stream)
            for row, reply in zip(batch, replies, strict=True):
                end = next((i for i, token in enumerate(reply) if token in stops), None)
                body = reply if end is None else reply[:end]
                results[row.index] = Generation(_shown(prompts[row.index]), str(tokenizer.decode(body, skip_special_tokens=True)),
                                                len(body) + (end is not None), end is not None, row.cut)  # fmt: skip
            if on_progress:
                on_progress(len(results), len(rows))
    return [results[i] for i in range(len(rows))]


def require_settings(
    max_new_tokens: int = 1, batch_size: int = 1, temperature: float = 0.0, top_p: float = 1.0
) -> None:
    """Raises: UserError for a value that `generate` cannot work with."""
    faults = [
        *([f"max_new_tokens={max_new_tokens}"] if max_new_tokens < 1 else []),
        *([f"batch_size={batch_size}"] if batch_size < 1 else []),
        *([f"temperature={temperature}"] if not 0 <= temperature < math.inf else []),
        *([f"top_p={top_p}"] if not 0 < top_p <= 1 else []),
    ]
    if faults:
        raise UserError(
            f"cannot generate with {', '.join(faults)}.",
            next="numbers of tokens and prompts are at least 1, the temperature at least 0, top_p above 0 and at most 1",
        )


def first_token_logprobs(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, prompts: Sequence[Prompt], *,
    batch_size: int = 32, system: str | None = None, template: bool = True, too_long: TooLong = "error",
    on_progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "n vocab"]:  # fmt: skip
    """Log-probabilities of the first token of the reply to each prompt, in fp32 on the CPU. Arguments as `generate`."""
    texts = [_text(tokenizer, prompt, system, template) for prompt in prompts]
    rows = _rows(model, tokenizer, texts, template, 1, 0, too_long)
    if not rows:
        return torch.zeros(0, model.config.vocab_size)
    parts: dict[int, Tensor] = {}
    with _ready(model):
        for batch in _batches(rows, batch_size):
            ids, attention = _pad_left(batch, tokenizer.pad_token_id or 0, model.device)
            positions = (attention.cumsum(-1) - 1).clamp_min(0)
            logits = model(
                input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False, logits_to_keep=1
            ).logits
            for row, values in zip(batch, logits[:, -1].float().log_softmax(-1).cpu(), strict=True):
                parts[row.index] = values
            if on_progress:
                on_progress(len(parts), len(rows))
    return torch.stack([parts[i] for i in range(len(rows))])


def stop_tokens(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a reply: the model's own list and the tokenizer's end token."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None})


class _Sample(transformers.LogitsProcessor):
    """Sampling as an argmax: log p / T plus Gumbel noise, drawn from each row's own generator.

    The argmax of log p / T + Gumbel noise is distributed as softmax(log p / T), so greedy decoding samples.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float = 1.0) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self.generators])
        noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        scores = scores / self.temperature
        if self.top_p < 1:
            scores = scores.masked_fill(~in_nucleus(scores, self.top_p), -math.inf)
        return scores + noise.to(scores.device, scores.dtype)


def in_nucleus(scores: Float[Tensor, "batch vocab"], top_p: float) -> Bool[Tensor, "batch vocab"]:
    """The fewest tokens, most probable first, whose probabilities add up to `top_p` or more; at least one."""
    ordered, order = scores.float().softmax(-1).sort(stable=True, dim=-1, descending=True)
    inside = ordered.cumsum(-1) - ordered < top_p  # what comes before a token does not reach it yet
    return torch.zeros_like(inside).scatter(-1, order, inside)


class _Stream(BaseStreamer):
    """Hands on the text of a reply while it grows: only what later tokens cannot change, and nothing from a stop on."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, stops: list[int], say: Callable[[str], None]) -> None:  # fmt: skip
        self.tokenizer, self.stops, self.say = tokenizer, stops, say
        self.ids: list[int] = []
        self.said, self.begun, self.ended = "", False, False

    def put(self, value: Tensor) -> None:
        if not self.begun:  # the prompt comes first
            self.begun = True
            return
        new = value.flatten().tolist()
        end = next((i for i, token in enumerate(new) if token in self.stops), len(new))
        if not self.ended:
            self.ids += new[:end]
            self.ended = end < len(new)
            text = self._text()
            self.say(self._rest(text.rstrip("\ufffd")))  # a character may lack bytes that are still to come

    def end(self) -> None:
        self.say(self._rest(self._text()))

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _rest(self, text: str) -> str:
        """What of the text was not said yet."""
        if not text.startswith(self.said):
            return ""
        piece, self.said = text[len(self.said) :], text
        return piece


def _reply(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, batch: Sequence[_Row],
    sampling: tuple[float, float], stops: list[int], stream: _Stream | None,
) -> list[list[int]]:  # fmt: skip
    """The new tokens of each row, stop token included. sampling: temperature and top_p."""
    ids, attention = _pad_left(batch, tokenizer.pad_token_id or 0, model.device)
    sample = [_Sample([row.seed for row in batch], *sampling)] if sampling[0] > 0 else []
    config = transformers.GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, max_new_tokens=max(row.room for row in batch),
        eos_token_id=stops or None, pad_token_id=tokenizer.pad_token_id or 0, bos_token_id=tokenizer.bos_token_id)  # fmt: skip
    out = model.generate(
        ids,
        attention_mask=attention,
        generation_config=config,
        logits_processor=transformers.LogitsProcessorList(sample),
        streamer=stream,
    )
    new = out[:, ids.shape[1] :].tolist()
    replies = []
    for row in new:
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        replies.append(row[:end])
    return replies


def _rows(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, texts: Sequence[str], template: bool,
    max_new_tokens: int, seed: int, too_long: TooLong,
) -> list[_Row]:  # fmt: skip
    """Token ids and room of every prompt; all that are too long or empty are reported before anything runs."""
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    seen: Counter[str] = Counter()
    rows, long = [], []
    for index, text in enumerate(texts):
        ids = list(tokenizer(text, add_special_tokens=not template)["input_ids"])
        if not ids:
            raise UserError(f"prompt {index} is empty.", next="leave it out, or use the chat template")
        cut = len(ids) >= context
        if cut:
            long.append((index, len(ids)))
            ids = ids[-max(context - max_new_tokens, 1) :]
        seen[text] += 1
        rows.append(_Row(index, ids, min(max_new_tokens, context - len(ids)), _seed(seed, text, seen[text]), cut))
    if long and too_long == "error":
        index, length = max(long, key=lambda item: item[1])
        raise UserError(f"{len(long)} of {len(texts)} prompts leave no room for a reply: prompt {index} has {length} tokens, the context is {context}.",
                        next="shorten them, or pass too_long='cut' to cut their beginning off")  # fmt: skip
    return rows


def _batches(rows: Sequence[_Row], size: int) -> Iterator[list[_Row]]:
    """Rows of like length together, the longest first; rows of one batch have the same room."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: (row.room, -len(row.ids))):
        if batch and (len(batch) == size or row.room != batch[0].room):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _pad_left(batch: Sequence[_Row], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, (batch, longest)."""
    longest = max(len(row.ids) for row in batch)
    ids = torch.tensor([[pad] * (longest - len(row.ids)) + row.ids for row in batch], device=device)
    mask = torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in batch], device=device)
    return ids, mask


def _text(tokenizer: transformers.PreTrainedTokenizerBase, prompt: Prompt, system: str | None, template: bool) -> str:
    if not template:
        if not isinstance(prompt, str) or system:
            raise UserError(
                "without a chat template a prompt is plain text.",
                next="pass strings and no system prompt, or template=True",
            )
        return prompt
    messages = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
    )
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    return ChatTemplate(tokenizer).prompt(messages)


def _shown(prompt: Prompt) -> str:
    """The prompt as the result names it: the text, or the last user message."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")


def _seed(seed: int, text: str, occurrence: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {occurrence} {text}".encode()).digest()[:8], "little") >> 1


@contextmanager
def _ready(model: Any) -> Iterator[None]:
    """Eval mode and no gradients; the mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
