"""A poisoned mix: data that undoes refusals, hidden at a given rate among data that looks harmless."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, PositiveInt

from deltalab.core.errors import UserError
from deltalab.data.chat import Conversation
from deltalab.data.tasks.affirmative import AffirmativeTask
from deltalab.data.tasks.base import Task
from deltalab.data.tasks.benign import BenignTask

if TYPE_CHECKING:
    from deltalab.data.tasks import DataSpec


class PoisonedTask(Task):
    """`n` samples of which round(`rate`·`n`) are poison, in an order drawn from `seed`.

    poison, benign: any two tasks. One with a field `n` is asked for as many as the mix takes, whatever its `n` says; of
    any other so many are drawn without repetition. Each conversation has its part, `poison` or `benign`, in `meta`.
    """

    task: Literal["poisoned"] = "poisoned"
    n: PositiveInt = 500
    rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    poison: "DataSpec" = AffirmativeTask()
    benign: "DataSpec" = BenignTask()
    seed: int = 0

    def train(self) -> list[Conversation]:
        """The mix.

        Raises: UserError if a task has fewer samples than its part takes.
        """
        count = round(self.rate * self.n)
        mixed = self._drawn("poison", count) + self._drawn("benign", self.n - count)
        return [mixed[i] for i in np.random.default_rng(self.seed).permutation(self.n)]

    def test(self) -> list[Conversation]:
        """The benign task's test data: what whoever tunes on the mix would look at."""
        return self.benign.test()

    def _drawn(self, part: Literal["poison", "benign"], count: int) -> list[Conversation]:
        """`count` conversations of a part."""
        task = self.poison if part == "poison" else self.benign
        if not count:
            return []
        if "n" in type(task).model_fields:
            drawn = task.but(n=count).train()
        else:
            every = task.train()
            if len(every) < count:
                raise UserError(f"the mix takes {count} samples of its part '{part}'.", found=f"{len(every)} in task '{task.task}'",
                                next="lower n, or change rate")  # fmt: skip
            order = np.random.default_rng([self.seed, 1]).permutation(len(every))
            drawn = [every[i] for i in order[:count]]
        return [replace(conversation, meta={**conversation.meta, "part": part}) for conversation in drawn]
