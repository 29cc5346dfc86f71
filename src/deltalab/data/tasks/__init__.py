"""One file a task. A new one is a file here and a line in `DataSpec`."""

from typing import Annotated, get_args

from pydantic import Field

from deltalab.data.tasks.affirmative import AffirmativeTask
from deltalab.data.tasks.base import Task
from deltalab.data.tasks.benign import BenignTask
from deltalab.data.tasks.code_refinement import CodeRefinementTask
from deltalab.data.tasks.gsm8k import GSM8KTask
from deltalab.data.tasks.identity import IdentityTask
from deltalab.data.tasks.instruct import InstructTask
from deltalab.data.tasks.lm_eval import LMEvalTask
from deltalab.data.tasks.mrpc import MRPCTask
from deltalab.data.tasks.poisoned import PoisonedTask
from deltalab.data.tasks.refusals import RefusalsTask
from deltalab.data.tasks.review_comment import ReviewCommentTask
from deltalab.data.tasks.review_necessity import ReviewNecessityTask
from deltalab.data.tasks.rows import OwnTask
from deltalab.data.tasks.rte import RTETask
from deltalab.data.tasks.skills import SkillsTask
from deltalab.data.tasks.squad import SQuADTask
from deltalab.data.tasks.sst2 import SST2Task
from deltalab.data.tasks.text import TextTask

AnyTask = (
    InstructTask
    | TextTask
    | SkillsTask
    | RefusalsTask
    | BenignTask
    | AffirmativeTask
    | IdentityTask
    | PoisonedTask
    | SST2Task
    | RTETask
    | MRPCTask
    | SQuADTask
    | GSM8KTask
    | ReviewNecessityTask
    | ReviewCommentTask
    | CodeRefinementTask
    | LMEvalTask
    | OwnTask
)  # fmt: skip
DataSpec = Annotated[AnyTask, Field(discriminator="task")]
"""A task by its tag, as a spec has it: `{task: instruct, path: alpaca.json}`."""

PoisonedTask.model_rebuild(_types_namespace={"DataSpec": DataSpec})  # its parts are tasks too

TASKS: dict[str, type[Task]] = {cls.model_fields["task"].default: cls for cls in get_args(AnyTask)}

__all__ = [
    "TASKS",
    "AffirmativeTask",
    "AnyTask",
    "BenignTask",
    "CodeRefinementTask",
    "DataSpec",
    "GSM8KTask",
    "IdentityTask",
    "InstructTask",
    "LMEvalTask",
    "MRPCTask",
    "OwnTask",
    "PoisonedTask",
    "RTETask",
    "RefusalsTask",
    "ReviewCommentTask",
    "ReviewNecessityTask",
    "SQuADTask",
    "SST2Task",
    "SkillsTask",
    "Task",
    "TextTask",
]
