"""The organism's skills: short questions with one checkable answer, in families."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from deltalab.core.errors import UserError, nearest
from deltalab.data.chat import Conversation
from deltalab.data.metrics import Measures, exact_match
from deltalab.data.tasks.base import Task


class SkillsTask(Task):
    """Examples of the bundled organism's skill families, made from `seed`. families: names, or "all". `past_tense` is one that
    it was never taught. new_tokens: of a generated answer at most, which is then measured by exact match; 0: the loss is all.
    """

    task: Literal["skills"] = "skills"
    families: list[str] | Literal["all"] = "all"
    n: PositiveInt = 1000
    n_test: PositiveInt = 200
    seed: int = 0
    new_tokens: NonNegativeInt = 0

    @property
    def reply_tokens(self) -> int:
        return self.new_tokens

    def score(self, said: Sequence[Any], asked: Sequence[Conversation]) -> Measures:
        """exact: the share of right answers."""
        return exact_match(said, [c.messages[-1]["content"] for c in asked])

    def train(self) -> list[Conversation]:
        """`n` examples of the training split."""
        return self._examples(self.n, "train")

    def test(self) -> list[Conversation]:
        """`n_test` examples of the test split."""
        return self._examples(self.n_test, "test")

    def _examples(self, n: int, split: str) -> list[Conversation]:
        from deltalab.organism import skills  # plain generators without torch, counted as data (docs/architecture.md)

        families = None if self.families == "all" else self.families
        for name in families or ():
            if name not in skills.FAMILIES:
                raise UserError(f"'{name}' is no skill family.", nearest=nearest(name, skills.FAMILIES),
                                next=f"families: {', '.join(skills.FAMILIES)}")  # fmt: skip
        examples = skills.examples(families, n, self.seed, split)
        # a verb is asked in several phrasings
        same = {skills.WITHHELD: "answer"}
        return [
            Conversation.of(e["prompt"], e["answer"], family=e["family"], same=e[same.get(e["family"], "prompt")])
            for e in examples
        ]
