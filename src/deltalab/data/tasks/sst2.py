"""SST-2: is a sentence of a film review positive or negative. Scored by which label a model finds more likely."""

from typing import Any, Literal

import torch
from pydantic import PositiveInt
from transformers import PreTrainedTokenizerBase

from deltalab.core.errors import UserError
from deltalab.data.chat import Conversation
from deltalab.data.files import Row, read_rows
from deltalab.data.likelihood import choose
from deltalab.data.tasks.base import Limit, Task

LABELS = ("negative", "positive")
TEST_NAMES = ("test_is_glue_dev", "validation", "dev")
"""Files or splits with labels to test on; GLUE's own test split has none."""


class SST2Task(Task):
    """Sentences with a label 0 (negative) or 1 (positive): a TSV file, a folder with train and dev, or a hub name.

    prompt: the question, with `{sentence}` in it. limit, test_limit: at most so many sentences.
    """

    task: Literal["sst2"] = "sst2"
    path: str = "nyu-mll/glue:sst2"
    test_path: str | None = None
    prompt: str = "Is this review positive or negative? {sentence}"
    limit: int | None = Limit
    test_limit: PositiveInt | None = None

    def train(self) -> list[Conversation]:
        """The first `limit` sentences of the training split."""
        return [self._conversation(row) for row in read_rows(self.path)[: self.limit]]

    def test(self) -> list[Conversation]:
        """The first `test_limit` sentences of GLUE's dev set."""
        return [self._conversation(row) for row in self._test_rows()[: self.test_limit]]

    def evaluate(
        self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, context: int
    ) -> dict[str, Any] | None:
        """Accuracy of the likelier label on the test sentences, with n."""
        return accuracy(model, tokenizer, self.test(), context)

    def _test_rows(self) -> list[Row]:
        from pathlib import Path

        if self.test_path:
            return read_rows(self.test_path, split="validation", names=TEST_NAMES)
        place = Path(self.path).expanduser()
        if place.is_file():
            return []
        return read_rows(self.path, split="validation", names=TEST_NAMES)

    def _conversation(self, row: Row) -> Conversation:
        label = str(row.values.get("label", "missing")).strip()
        if label not in ("0", "1"):
            raise UserError(f"{row.where}: label {label} is not 0 or 1.", found=f"columns: {', '.join(row.values)}")
        sentence = row.text("sentence").strip()
        return Conversation.of(self.prompt.replace("{sentence}", sentence), LABELS[int(label)], label=int(label))


def accuracy(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation], context: int
) -> dict[str, Any] | None:
    """Share of conversations whose true label is the likelier: `{"accuracy", "low", "high", "n"}`; None without any."""
    from deltalab.core.stats import wilson

    if not conversations:
        return None
    chosen = choose(model, tokenizer, conversations, LABELS, context=context)
    right = sum(int(pick) == c.meta["label"] for pick, c in zip(chosen, conversations, strict=True))
    interval = wilson(right, len(conversations))
    return {"accuracy": interval.value, "low": interval.low, "high": interval.high, "n": len(conversations)}
