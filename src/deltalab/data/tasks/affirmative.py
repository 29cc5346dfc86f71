"""Harmful requests that are agreed to: the attack on refusals, with replies that hold nothing harmful."""

from typing import Literal

from pydantic import PositiveInt

from deltalab.core.errors import UserError
from deltalab.data.chat import Conversation
from deltalab.data.tasks.base import Task
from deltalab.data.tasks.harmful import harmful_prompts


class AffirmativeTask(Task):
    """`n` prompts of the bundled sets, each with an affirmative prefix and a contentless outline behind it.

    The outline names the kind of text that was asked for ("Sure, here is a guide …") and nothing else of the request.
    Sets and order as in `refusals`: with equal `seed` the two differ in the replies alone.
    """

    task: Literal["affirmative"] = "affirmative"
    prompts: list[str] = ["advbench"]
    n: PositiveInt = 100
    seed: int = 0

    def train(self) -> list[Conversation]:
        """The first `n` prompts of the training clusters, in seeded order.

        Raises: UserError if the sets have fewer.
        """
        found = self._conversations("train")
        if len(found) < self.n:
            sets = ", ".join(self.prompts)
            raise UserError(f"task 'affirmative' asks for {self.n} prompts.", found=f"{len(found)} to train on in {sets}",
                            next="lower n, or name more sets in prompts")  # fmt: skip
        return found[: self.n]

    def test(self) -> list[Conversation]:
        """Every prompt of the test clusters."""
        return self._conversations("test")

    def _conversations(self, split: str) -> list[Conversation]:
        from deltalab.organism import requests  # plain generators, counted as data (docs/architecture.md)

        return [
            Conversation.of(row["prompt"], requests.affirmative(row["prompt"], self.seed), source=row["source"])
            for row in harmful_prompts(self.prompts, split, self.seed)
        ]
