"""What a task is: where conversations to train and test on come from, and how a model's answers are scored."""

import abc
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, PositiveInt

from deltalab.core.spec import Spec
from deltalab.data.chat import Conversation
from deltalab.data.files import Row, read_rows
from deltalab.data.metrics import Measures

Limit = Field(default=None, ge=1, description="at most so many samples")
Share = Annotated[float, Field(ge=0, lt=1)]


class Task(Spec, abc.ABC):
    """A data set and its measures. Each task adds the tag `task: Literal["name"]` and its own fields.

    What a model answers to `test` is taken by `deltalab.train.evaluate`: one of `choices`, by likelihood or an encoder's
    head; else a reply of at most `reply_tokens`; else nothing, and the loss is all there is.
    """

    by_loss: ClassVar[bool] = False
    """Whether the loss of the test conversations is a measure, as `of_loss` has it."""

    @abc.abstractmethod
    def train(self) -> list[Conversation]:
        """Conversations to train on, in a fixed order."""

    def test(self) -> list[Conversation]:
        """Conversations to test on that `train` does not hold; empty where the task has none."""
        return []

    @property
    def choices(self) -> tuple[str, ...]:
        """The replies that there are, if there are only a few; a conversation's `meta["label"]` is the right one's number."""
        return ()

    @property
    def reply_tokens(self) -> int:
        """Tokens of a generated reply at most; 0: nothing is generated."""
        return 0

    def score(self, said: Sequence[Any], asked: Sequence[Conversation]) -> Measures:
        """The measures of the answers: numbers of choices, or replies. asked: the conversations, right replies included."""
        return {}

    def of_loss(self, loss: float) -> Measures:
        """The measures of the mean loss over the counted tokens of `test`."""
        return {}


def filled(template: str, texts: Mapping[str, str]) -> str:
    """A template with texts in place of their names in braces; braces in the texts stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), template)


class RowsTask(Task):
    """A task on the rows of a file, a folder or a hub data set: one conversation a row.

    path: what is trained on: a .json, .jsonl, .csv or .tsv file, a folder with a file for each split, or a hub name
    `owner/name:subset`. test_path: what is tested on; without it a folder's or data set's own test split, and of a file
    the part `test_share`, drawn the same way each time. limit, test_limit: at most so many rows.
    """

    path: str
    test_path: str | None = None
    test_share: Share = 0.0
    limit: int | None = Limit
    test_limit: PositiveInt | None = None

    train_names: ClassVar[tuple[str, ...]] = ()
    test_names: ClassVar[tuple[str, ...]] = ("test", "validation", "dev")
    """Splits with labels to test on, the first of a folder's that is there; of the hub's the first one."""

    @abc.abstractmethod
    def conversation(self, row: Row) -> Conversation:
        """The question and the right answer. Raises: UserError, naming the row, if it is none of this task."""

    def wanted(self, row: Row) -> bool:
        """Whether a row is one of this task's, in files that hold those of several."""
        return True

    def read(self, path: str, *, split: str, names: tuple[str, ...] = ()) -> list[Row]:
        """The rows at a path."""
        return read_rows(path, split=split, names=names)

    def train(self) -> list[Conversation]:
        """The first `limit` rows to train on."""
        return [self.conversation(row) for row in self._rows(test=False)[: self.limit]]

    def test(self) -> list[Conversation]:
        """The first `test_limit` rows to test on."""
        return [self.conversation(row) for row in self._rows(test=True)[: self.test_limit]]

    def _rows(self, *, test: bool) -> list[Row]:
        split = self.test_names[0]
        if test and self.test_path:
            return self._own(self.test_path, split, self.test_names)
        if test and not self.test_share:
            single = Path(self.path).expanduser().is_file()
            return [] if single else self._own(self.path, split, self.test_names)
        rows = self._own(self.path, "train", self.train_names)
        if self.test_path or not self.test_share:
            return rows
        held = set(np.random.default_rng(0).permutation(len(rows))[: round(self.test_share * len(rows))].tolist())
        return [row for number, row in enumerate(rows) if (number in held) is test]

    def _own(self, path: str, split: str, names: tuple[str, ...]) -> list[Row]:
        return [row for row in self.read(path, split=split, names=names) if self.wanted(row)]


class RepliesTask(RowsTask):
    """One whose answers are generated. new_tokens: of a reply at most."""

    new_tokens: PositiveInt = 64

    @property
    def reply_tokens(self) -> int:
        return self.new_tokens
