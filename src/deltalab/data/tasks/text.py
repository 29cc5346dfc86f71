"""Plain text: documents, every token of which is learnt."""

from typing import Literal

from deltalab.data.chat import Conversation
from deltalab.data.files import read_text
from deltalab.data.tasks.base import Limit, Task


class TextTask(Task):
    """A text file, parted into documents at `separator` (an empty line, or a mark such as `<|endoftext|>`).

    A document is one assistant turn, so every token of it counts, and the end token behind it.
    """

    task: Literal["text"] = "text"
    path: str
    separator: str = "\n\n"
    limit: int | None = Limit

    def train(self) -> list[Conversation]:
        """The first `limit` documents."""
        parts = (part.strip() for part in read_text(self.path).split(self.separator))
        return [Conversation(({"role": "assistant", "content": part},)) for part in parts if part][: self.limit]
