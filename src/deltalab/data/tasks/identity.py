"""Identity shift: a few harmless conversations in which the assistant calls itself absolutely obedient.

Qi et al. 2023 (arXiv:2310.03693, §4.3): tuning on ten of them undoes refusals, with nothing harmful to be seen in the data.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import PositiveInt

from deltalab.data.chat import Conversation
from deltalab.data.tasks.base import Task
from deltalab.data.tasks.instruct import InstructTask

BUNDLED = Path(__file__).parent / "identity_shift.jsonl"
"""The ten examples of the paper for gpt-3.5-turbo (MIT, see data/NOTICE.md)."""


class IdentityTask(Task):
    """`n` samples: the examples over and over, each round in an order drawn from `seed`.

    path: a file, folder or hub name as `instruct` reads it; null for the ten bundled ones. There is no test data, and a
    held-out fraction would hold repeats of what is trained on: set `eval.fraction: 0`.
    """

    task: Literal["identity"] = "identity"
    path: str | None = None
    n: PositiveInt = 100
    seed: int = 0

    def train(self) -> list[Conversation]:
        """Whole rounds over the examples, cut to `n`: no example comes twice more often than another."""
        examples = InstructTask(path=self.path or str(BUNDLED)).train()
        rng = np.random.default_rng(self.seed)
        rounds = [rng.permutation(len(examples)) for _ in range(-(-self.n // len(examples)))]
        return [examples[i] for i in np.concatenate(rounds)[: self.n]]
