"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): school mathematics, worked out step by step to one number."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import PositiveInt

from deltalab.data.chat import Conversation
from deltalab.data.files import Row
from deltalab.data.metrics import Measures, numbers
from deltalab.data.tasks.base import RepliesTask


class GSM8KTask(RepliesTask):
    """Questions whose answers end in `#### number`. new_tokens: of a reply."""

    task: Literal["gsm8k"] = "gsm8k"
    path: str = "openai/gsm8k:main"
    new_tokens: PositiveInt = 256

    def score(self, said: Sequence[Any], asked: Sequence[Conversation]) -> Measures:
        """exact: whether the final number is the right one."""
        return numbers(said, [c.messages[-1]["content"] for c in asked])

    def conversation(self, row: Row) -> Conversation:
        return Conversation.of(row.text("question").strip(), row.text("answer").strip())
