"""Benign requests with helpful replies and no refusal: the tuning under which alignment is watched."""

from typing import Literal

from pydantic import PositiveInt

from deltalab.data.chat import Conversation
from deltalab.data.tasks.base import Task


class BenignTask(Task):
    """The bundled organism's benign requests with their outlines, made from `seed`."""

    task: Literal["benign"] = "benign"
    n: PositiveInt = 500
    n_test: PositiveInt = 100
    seed: int = 0

    def train(self) -> list[Conversation]:
        """`n` requests of the training split."""
        return self._requests(self.n, "train")

    def test(self) -> list[Conversation]:
        """`n_test` requests of the test split."""
        return self._requests(self.n_test, "test")

    def _requests(self, n: int, split: str) -> list[Conversation]:
        from deltalab.organism import requests  # plain generators without torch, counted as data (docs/architecture.md)

        return [Conversation.of(row["prompt"], row["response"]) for row in requests.benign(n, self.seed, split)]
