"""What tasks share whose answer is one of a few: a label in each row, and a question round its texts."""

from collections.abc import Sequence
from typing import Any, ClassVar

from deltalab.core.errors import UserError
from deltalab.data.chat import Conversation
from deltalab.data.files import Row
from deltalab.data.metrics import Measures, classification
from deltalab.data.tasks.base import RowsTask, filled


class ChoiceTask(RowsTask):
    """Rows with texts and a label. prompt: the question, with the texts' names in braces."""

    labels: ClassVar[tuple[str, ...]]
    """The reply for each label, in the order of their numbers."""
    also: ClassVar[dict[str, int]] = {}
    """Other names that files have for a label."""
    texts: ClassVar[dict[str, tuple[str, ...]]]
    """A text's name in the prompt -> the columns that may hold it."""
    label_columns: ClassVar[tuple[str, ...]] = ("label",)
    positive: ClassVar[int | None] = None
    """The label whose precision, recall and F1 are measured."""

    prompt: str

    @property
    def choices(self) -> tuple[str, ...]:
        return self.labels

    def score(self, said: Sequence[Any], asked: Sequence[Conversation]) -> Measures:
        """accuracy; and f1, precision and recall, where the task has a positive label."""
        return classification(said, [c.meta["label"] for c in asked], self.positive)

    def conversation(self, row: Row) -> Conversation:
        label = self._label(row)
        parts = {name: row.text(_column(row, columns)).strip() for name, columns in self.texts.items()}
        return Conversation.of(filled(self.prompt, parts), self.labels[label], label=label, texts=tuple(parts.values()))

    def _label(self, row: Row) -> int:
        given = str(row.values.get(_column(row, self.label_columns), "missing")).strip()
        known = {**{str(i): i for i in range(len(self.labels))}, **self.also}
        if given not in known:
            among = " or ".join(dict.fromkeys([*map(str, range(len(self.labels))), *self.also]))
            raise UserError(f"{row.where}: label {given} is not {among}.", found=f"columns: {', '.join(row.values)}")
        return known[given]


def _column(row: Row, columns: tuple[str, ...]) -> str:
    return next((column for column in columns if column in row.values), columns[0])
