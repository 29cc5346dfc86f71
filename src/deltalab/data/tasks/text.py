"""Plain text: documents, every token of which is learnt."""

import math
from typing import ClassVar, Literal

from deltalab.data.chat import Conversation
from deltalab.data.files import read_text
from deltalab.data.metrics import Measure, Measures
from deltalab.data.tasks.base import Limit, Task


class TextTask(Task):
    """A text file, parted into documents at `separator` (an empty line, or a mark such as `<|endoftext|>`).

    A document is one assistant turn, so every token of it counts, and the end token behind it. test_path: another such
    file, to test on: its perplexity is that per token, exp of the mean loss.
    """

    task: Literal["text"] = "text"
    path: str
    test_path: str | None = None
    separator: str = "\n\n"
    limit: int | None = Limit

    by_loss: ClassVar = True

    def train(self) -> list[Conversation]:
        """The first `limit` documents."""
        return self._documents(self.path)

    def test(self) -> list[Conversation]:
        """The first `limit` documents of `test_path`."""
        return self._documents(self.test_path) if self.test_path else []

    def of_loss(self, loss: float) -> Measures:
        """loss, and perplexity."""
        return {"loss": Measure(loss), "perplexity": Measure(math.exp(min(loss, 700.0)))}

    def _documents(self, path: str) -> list[Conversation]:
        parts = (part.strip() for part in read_text(path).split(self.separator))
        return [Conversation(({"role": "assistant", "content": part},)) for part in parts if part][: self.limit]
