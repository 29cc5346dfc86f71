"""A task of the user's own: a few lines of a spec over the rows of a file."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import pydantic
from pydantic import NonNegativeInt

from deltalab.core.errors import UserError, nearest
from deltalab.data.chat import Conversation
from deltalab.data.files import Row
from deltalab.data.metrics import Measures, classification, corpus_bleu, exact_match, numbers, rouge_l, smoothed_bleu
from deltalab.data.tasks.base import RowsTask

Metric = Literal["exact", "number", "rouge-l", "bleu", "smoothed-bleu"]
METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], Measures]] = {
    "exact": exact_match, "number": numbers, "rouge-l": rouge_l, "bleu": corpus_bleu, "smoothed-bleu": smoothed_bleu,
}  # fmt: skip
PLACE = re.compile(r"\{([^{}]+)\}")


class OwnTask(RowsTask):
    """A question and a reply for each row, with columns in braces: `prompt: "Translate: {english}"`, `reply: "{french}"`.

    answers: the replies that there are, if there are only a few: then a reply is one of them, chosen by likelihood, and the
    measure is accuracy; also f1 of the last of two. metrics: of generated replies of at most `new_tokens`.
    """

    task: Literal["rows"] = "rows"
    prompt: str
    reply: str
    answers: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    new_tokens: NonNegativeInt = 64

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.answers and self.metrics:
            raise ValueError("give answers or metrics, not both: chosen answers have an accuracy")
        if len(self.answers) == 1:
            raise ValueError("a choice needs at least two answers")
        return self

    @property
    def choices(self) -> tuple[str, ...]:
        return self.answers

    @property
    def reply_tokens(self) -> int:
        return self.new_tokens if self.metrics else 0

    def score(self, said: Sequence[Any], asked: Sequence[Conversation]) -> Measures:
        """What the spec asks for."""
        if self.answers:
            positive = 1 if len(self.answers) == 2 else None
            return classification(said, [c.meta["label"] for c in asked], positive)
        wanted, found = [c.messages[-1]["content"] for c in asked], Measures()
        for metric in self.metrics:
            found |= METRICS[metric](said, wanted)
        return found

    def conversation(self, row: Row) -> Conversation:
        reply = self._filled(self.reply, row).strip()
        if not self.answers:
            return Conversation.of(self._filled(self.prompt, row), reply)
        if reply not in self.answers:
            raise UserError(f"{row.where}: the reply '{reply[:60]}' is none of the answers.",
                            nearest=nearest(reply, self.answers) or list(self.answers))  # fmt: skip
        return Conversation.of(self._filled(self.prompt, row), reply, label=self.answers.index(reply))

    def _filled(self, template: str, row: Row) -> str:
        def column(match: re.Match[str]) -> str:
            name = match[1]
            value = row.values.get(name)
            return str(value) if isinstance(value, (int, float)) else row.text(name)

        return PLACE.sub(column, template)
