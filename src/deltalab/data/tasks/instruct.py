"""Instructions with replies: Alpaca-style columns, question and answer columns, or chat messages."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeInt

from deltalab.core.errors import UserError
from deltalab.data.chat import Conversation
from deltalab.data.files import Row, read_rows
from deltalab.data.metrics import Measure, Measures, rouge_l
from deltalab.data.prompts import CHATS, turns_of
from deltalab.data.tasks.base import Limit, Task

COLUMNS = (
    ("instruction", "input", "output"),  # Alpaca
    ("instruction", "context", "response"),  # Dolly
    ("prompt", "", "response"),
    ("prompt", "", "completion"),
    ("question", "", "answer"),
)
"""Known layouts: the instruction, what it is about (may be absent or empty), the reply."""


class InstructTask(Task):
    """Instruction data: a .json, .jsonl, .csv or .tsv file, a folder with train/test files, or a hub name.

    A row is `messages` (or `conversations`), or has the columns of a known layout. system: a system message put
    before each. split: the hub's split, or the file's name in a folder. test_path: data to test on; without it a
    fraction of the training data is held out (`eval.fraction`). new_tokens: of generated replies to the test data, at
    most, for their ROUGE-L; 0: none are generated.
    """

    task: Literal["instruct"] = "instruct"
    path: str
    test_path: str | None = None
    split: str = "train"
    system: str | None = None
    limit: int | None = Limit
    new_tokens: NonNegativeInt = 0

    by_loss: ClassVar = True

    @property
    def reply_tokens(self) -> int:
        return self.new_tokens

    def score(self, said: Sequence[Any], asked: Sequence[Conversation]) -> Measures:
        """rouge_l of the last reply of each conversation."""
        return rouge_l(said, [c.messages[-1]["content"] for c in asked])

    def of_loss(self, loss: float) -> Measures:
        """loss."""
        return {"loss": Measure(loss)}

    def train(self) -> list[Conversation]:
        """The first `limit` rows of `path`."""
        return [self._conversation(row) for row in read_rows(self.path, split=self.split)[: self.limit]]

    def test(self) -> list[Conversation]:
        """The rows of `test_path`, at most `limit`."""
        return (
            [self._conversation(row) for row in read_rows(self.test_path, split="test")[: self.limit]]
            if self.test_path
            else []
        )

    def _conversation(self, row: Row) -> Conversation:
        for key in CHATS:
            if key in row.values:
                return self._chat(row, row.values[key])
        for ask, about, reply in COLUMNS:
            if ask in row.values and reply in row.values:
                extra = row.text(about) if row.values.get(about) else ""
                return Conversation.of(
                    row.text(ask) + (f"\n\n{extra}" if extra.strip() else ""), row.text(reply), system=self.system
                )
        raise UserError(f"{row.where}: no instruction and reply in it.", found=f"columns: {', '.join(row.values) or 'none'}",
                        nearest=["messages", *(f"{ask} + {reply}" for ask, _, reply in COLUMNS)])  # fmt: skip

    def _chat(self, row: Row, messages: object) -> Conversation:
        turns = turns_of(row, messages)
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        return Conversation(tuple(turns))
