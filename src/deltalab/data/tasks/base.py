"""What a task is: where conversations to train and test on come from, and how a model is scored on it."""

import abc
from typing import Any

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from deltalab.core.spec import Spec
from deltalab.data.chat import Conversation

Limit = Field(default=None, ge=1, description="at most so many samples")


class Task(Spec, abc.ABC):
    """A data set and its score. Each task adds the tag `task: Literal["name"]` and its own fields."""

    @abc.abstractmethod
    def train(self) -> list[Conversation]:
        """Conversations to train on, in a fixed order."""

    def test(self) -> list[Conversation]:
        """Conversations to test on that `train` does not hold; empty where the task has none."""
        return []

    def evaluate(
        self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, context: int
    ) -> dict[str, Any] | None:
        """The task's own score of `model` on its test set, JSON types; None where the loss is all there is."""
        return None
