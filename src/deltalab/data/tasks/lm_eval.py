"""Tasks of EleutherAI's lm-evaluation-harness, by name: nothing to train on, scores before and after."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from deltalab.data.chat import Conversation
from deltalab.data.tasks.base import Limit, Task


class LMEvalTask(Task):
    """What lm-eval is asked; `deltalab.train.lm_eval` has it done.

    tasks: its names of tasks, groups or tags, patterns (`arc_*`), or YAML files. num_fewshot: null for each task's own. limit: the
    first so many examples of each. include_path: a folder with task files of your own. gen_kwargs: of tasks that generate:
    `{max_gen_toks: 64}`. max_length: tokens of prompt and answer at most; null for the model's own, whatever `run.context` says.
    """

    task: Literal["lm-eval"] = "lm-eval"
    tasks: Annotated[list[str], Field(min_length=1)]
    num_fewshot: NonNegativeInt | None = None
    limit: int | None = Limit
    include_path: str | None = None
    apply_chat_template: bool = False
    gen_kwargs: dict[str, Any] = {}
    max_length: PositiveInt | None = None
    batch_size: PositiveInt = 8

    def train(self) -> list[Conversation]:
        """Nothing: another task brings what is learnt."""
        return []
