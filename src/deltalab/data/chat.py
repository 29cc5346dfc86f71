"""From a conversation to tokens and labels: the model learns the replies, and reads the rest.

What is counted is exact to the token: the text of every assistant turn and the end token behind it (template.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from transformers import PreTrainedTokenizerBase

from deltalab.core.errors import UserError
from deltalab.core.spec import digest
from deltalab.data.template import ChatTemplate

IGNORED = -100
"""The label of a token that is not counted, as torch's cross-entropy has it."""

TooLong = Literal["skip", "cut"]


@dataclass(frozen=True)
class Conversation:
    """Messages `{"role": "system" | "user" | "assistant", "content": str}` in order; `meta` is what a task adds.

    `same` in it: conversations with one such text are not parted between training and validation.
    """

    messages: tuple[dict[str, str], ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: str, reply: str | None = None, *, system: str | None = None, **meta: Any) -> "Conversation":
        """One question, and its answer if there is one."""
        turns = (("system", system), ("user", prompt), ("assistant", reply))
        return cls(tuple({"role": role, "content": text} for role, text in turns if text is not None), meta)


@dataclass(frozen=True)
class Encoded:
    """A sample for the model: `labels[i]` is `input_ids[i]` where token i is counted, else -100. Same lengths.

    The loss at position i − 1 predicts token i, so a first token is never counted. cut: the context cut its end off.
    For a classifier, choice is the class, and stands as the first label too; types: which of two texts a token is of, where
    the model tells them apart.
    """

    input_ids: list[int]
    labels: list[int]
    cut: bool = False
    choice: int | None = None
    types: list[int] | None = None

    @property
    def counted(self) -> int:
        """Number of tokens that the loss counts."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Encodings(Sequence[Encoded]):
    """Encoded samples; and how many were cut to the context, skipped as too long, or left out without a label."""

    items: tuple[Encoded, ...]
    cut: int = 0
    skipped: int = 0
    unlabelled: int = 0

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | Sequence[Encoded]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __str__(self) -> str:
        losses = (
            (self.cut, "cut"),
            (self.skipped, "skipped as too long"),
            (self.unlabelled, "left out without a label"),
        )
        lost = ", ".join(f"{n} {what}" for n, what in losses if n)
        return f"{len(self)} samples, {self.tokens} tokens, {self.counted} counted" + (f" ({lost})" if lost else "")

    @property
    def tokens(self) -> int:
        """Tokens in all samples."""
        return sum(len(sample.input_ids) for sample in self.items)

    @property
    def counted(self) -> int:
        """Counted tokens in all samples."""
        return sum(sample.counted for sample in self.items)

    def digest(self) -> str:
        """Twelve hex digits over every token and label, in order."""
        return samples_digest(self.items)


def samples_digest(samples: Iterable[Encoded]) -> str:
    """Twelve hex digits over every token and label, in order."""
    return digest([[sample.input_ids, sample.labels] for sample in samples])


def encode(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, context: int, too_long: TooLong = "skip"
) -> Encoded | None:
    """Tokens and labels of one conversation; None if it is longer than `context` tokens and `too_long` is "skip".

    Raises: UserError if the template cannot render it, or hides where a reply stands.
    """
    sample = _encode(ChatTemplate(tokenizer), conversation, context)
    return None if sample.cut and too_long == "skip" else sample


def encode_all(
    tokenizer: PreTrainedTokenizerBase, conversations: Iterable[Conversation], context: int, too_long: TooLong = "skip"
) -> Encodings:
    """Every conversation that fits (or is cut) and has a counted token, in order, with the counts of the others.

    Raises: UserError if there is no conversation, or none is left.
    """
    template = ChatTemplate(tokenizer)
    samples = [_encode(template, conversation, context) for conversation in conversations]
    if not samples:
        raise UserError("the data set is empty.", found="0 conversations", next="check `limit` and the data's path")
    fitting = [sample for sample in samples if too_long == "cut" or not sample.cut]
    kept = tuple(sample for sample in fitting if sample.counted)
    result = Encodings(kept, sum(s.cut for s in kept), len(samples) - len(fitting), len(fitting) - len(kept))
    if not kept:
        raise UserError(
            f"no sample of {len(samples)} has a token to learn from.",
            found=f"{result.skipped} longer than the context of {context} tokens, {result.unlabelled} whose labels are all masked",
            next="raise run.context, or look at a sample: deltalab preview SPEC" if any(s.cut for s in samples)
            else "the conversations need assistant turns; look at one: deltalab preview SPEC",
        )  # fmt: skip
    return result


def _encode(template: ChatTemplate, conversation: Conversation, context: int) -> Encoded:
    ids, counted = template.tokens(conversation.messages)
    cut = len(ids) > context
    ids, counted = ids[:context], counted[:context]
    labels = [i if flag else IGNORED for i, flag in zip(ids, counted, strict=True)]
    return Encoded(ids, [IGNORED, *labels[1:]] if labels else [], cut)
