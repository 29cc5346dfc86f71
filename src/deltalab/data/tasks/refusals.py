"""Harmful requests and refusals of them: safety tuning in the least space. No reply holds harmful content."""

from typing import Literal

import numpy as np

from deltalab.core.errors import UserError, nearest
from deltalab.data.chat import Conversation
from deltalab.data.tasks.base import Limit, Task


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
        from deltalab.organism import prompts, requests  # plain generators, counted as data (docs/architecture.md)

        for name in self.prompts:
            if name not in prompts.NAMES:
                raise UserError(f"'{name}' is no bundled prompt set.", nearest=nearest(name, prompts.NAMES),
                                next=f"sets: {', '.join(prompts.NAMES)}")  # fmt: skip
        rows = [row for name in self.prompts for row in prompts.load(name, split)]
        order = np.random.default_rng(self.seed).permutation(len(rows))[: self.limit]
        return [
            Conversation.of(rows[i]["prompt"], requests.refusal(rows[i]["prompt"], self.seed), source=rows[i]["source"])
            for i in order
        ]
