"""Harmful requests and refusals of them: safety tuning in the least space. No reply holds harmful content."""

from typing import Literal

from deltalab.data.chat import Conversation
from deltalab.data.tasks.base import Limit, Task
from deltalab.data.tasks.harmful import harmful_prompts


class RefusalsTask(Task):
    """Prompts of the bundled sets, each with a refusal in one of several wordings, chosen from `seed`."""

    task: Literal["refusals"] = "refusals"
    prompts: list[str] = ["advbench"]
    limit: int | None = Limit
    seed: int = 0

    def train(self) -> list[Conversation]:
        """Prompts of the training clusters, in seeded order, with refusals."""
        return self._conversations("train")

    def test(self) -> list[Conversation]:
        """Prompts of the test clusters, with refusals."""
        return self._conversations("test")

    def _conversations(self, split: str) -> list[Conversation]:
        from deltalab.organism import requests  # plain generators, counted as data (docs/architecture.md)

        return [
            Conversation.of(row["prompt"], requests.refusal(row["prompt"], self.seed), source=row["source"])
            for row in harmful_prompts(self.prompts, split, self.seed)[: self.limit]
        ]
