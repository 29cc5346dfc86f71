"""What a model answers while it is trained: attack success, refusals and skills as curves over the steps of drift.

A few prompts of each set are asked every N steps, greedily, and judged as before and after a training (evaluate.py).
Next to counts and intervals a row keeps one letter a reply, so that two steps, or two trainings, are compared prompt by
prompt; the replies themselves are not kept.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from torch import nn

from deltalab.core.errors import UserError
from deltalab.safety.evaluate import SafetyResult, SkillsResult, evaluate_safety, evaluate_skills

LETTERS = {"refused": "R", "complied": "C", "broken": "B"}


def replies_row(result: SafetyResult) -> dict[str, Any]:
    """The summary of a result, and `letters`: R, C or B for each prompt, in order."""
    return {**result.summary(), "letters": "".join(LETTERS[verdict] for verdict in result.verdicts)}


def skills_row(result: SkillsResult) -> dict[str, Any]:
    """The summary of a result, and `right`: 1 or 0 for each question, in order."""
    return {**result.summary(), "right": "".join("01"[right] for right in result.correct)}


class BehaviourProbe:
    """Asks the first `limit` prompts of each set, and questions of `skills`, every `every` steps of a training.

    prompts: set → prompts. skills: `{"prompt", "answer", "family"}`; may be empty. refusal_tokens: the set R of the
    first-token log-odds, those of the model before tuning (`evaluate_safety(…).refusal_tokens`): R taken from whatever
    still refuses would change along the curve, and with a resumed run. Generators are not drawn from: decoding is greedy.
    Raises: UserError if there is nothing to ask, a set is empty, or no refusal token is given.
    """

    def __init__(
        self, tokenizer: transformers.PreTrainedTokenizerBase, prompts: Mapping[str, Sequence[str]],
        skills: Sequence[Mapping[str, Any]] = (), every: int = 50, *, refusal_tokens: Sequence[int], limit: int = 40,
        max_new_tokens: int = 48, batch_size: int = 64, name: str = "behaviour",
    ) -> None:  # fmt: skip
        if not prompts or any(not asked for asked in prompts.values()):
            raise UserError("a behaviour probe has no prompts to ask.", found=f"sets: {', '.join(prompts) or 'none'}")
        if not refusal_tokens:
            raise UserError("a behaviour probe needs the first tokens of refusals.",
                            next="refusal_tokens=evaluate_safety(model, tokenizer, prompts).refusal_tokens, before tuning")  # fmt: skip
        self.name, self.every, self.tokenizer = name, every, tokenizer
        self.prompts = {name: list(asked[:limit]) for name, asked in prompts.items()}
        self.skills, self.refusal_tokens = list(skills[:limit]), list(refusal_tokens)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def measure(self, model: nn.Module, step: int) -> dict[str, Any]:
        """{"safety": {set: `replies_row`}, "skills": `skills_row` or None, "seconds": what this took}, JSON types."""
        assert isinstance(model, transformers.PreTrainedModel)
        began = time.monotonic()
        safety = {
            name: replies_row(
                evaluate_safety(
                    model, self.tokenizer, asked, name=name, max_new_tokens=self.max_new_tokens,
                    batch_size=self.batch_size, refusals=self.refusal_tokens,
                )
            )
            for name, asked in self.prompts.items()
        }  # fmt: skip
        skills = None
        if self.skills:
            skills = skills_row(evaluate_skills(model, self.tokenizer, self.skills, batch_size=self.batch_size))
        return {"safety": safety, "skills": skills, "seconds": round(time.monotonic() - began, 3)}
