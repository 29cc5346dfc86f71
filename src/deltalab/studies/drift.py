"""The drift study: which weights carry refusals, how far a tuning moves them, and what freezing them does.

    scores       of every weight on harmful prompts with refusals (safety) and on useful answers (utility)
    groups       the top of each, their set difference, its complement, and random groups like it
    ablate       what the replies become without the group, against random groups like it (if asked for)
    evaluate     before tuning: refusals, compliance, broken text, first-token log-odds, skills
    tune:ARM     one training for each arm and seed, the drift of every group measured on the way
    evaluate:ARM the same questions afterwards
    verdict      tests, in words
    report       record.json, and from it the page, the text, the JSON and the figures

Wei et al. 2024 (arXiv:2402.05162) for the scores and the set difference; the arms differ in what is frozen.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat

from deltalab.core.spec import Spec
from deltalab.data.tasks import BenignTask, DataSpec, RefusalsTask, SkillsTask, Task
from deltalab.safety.scores import ScoreSpec
from deltalab.studies.parts import ArmSpec, EvaluateSpec, GroupsSpec, SweepSpec, TuneSpec, checked_arms
from deltalab.studies.stages import Context, Stage

QUICK = (
    "tune.optim.epochs=null",
    "tune.optim.steps=100",
    "tune.drift_every=25",
    "groups.nulls=99",
    "evaluate.limit=50",
)
"""What `--quick` changes: a hundred steps, and less of everything that is measured."""


class DriftStudySpec(Spec):
    """A drift study of one model.

    safety, utility: calibration data of the two scores. ablate: random groups that zeroing the focus is compared with;
    0 zeroes nothing. seeds: of the tunings (start and order of the data); groups and questions are drawn with the first.
    margin: changes smaller than this count as none (of rates in absolute terms, of drift relative to the matched random
    groups). output: folder; `runs/drift` if not given.
    """

    study: Literal["drift"] = "drift"
    model: str = "organism"
    safety: Annotated[list[DataSpec], Field(min_length=1)] = [RefusalsTask(limit=128)]
    utility: Annotated[list[DataSpec], Field(min_length=1)] = [SkillsTask(n=64), BenignTask(n=64)]
    score: ScoreSpec = ScoreSpec()
    groups: GroupsSpec = GroupsSpec()
    ablate: NonNegativeInt = 0
    tune: TuneSpec
    arms: Annotated[list[ArmSpec], Field(min_length=1)] = [ArmSpec(name="free")]
    sweep: SweepSpec = SweepSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    margin: PositiveFloat = 0.1
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [42]
    output: str | None = None

    @pydantic.field_validator("seeds")
    @classmethod
    def _different(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("two seeds are the same")
        return value

    @pydantic.model_validator(mode="after")
    def _arms(self) -> Self:
        checked_arms(self.all_arms, self.tune)
        return self

    @property
    def calibration(self) -> Mapping[str, tuple[Sequence[Task], slice]]:
        """What weights are scored on: of each score the first samples."""
        part = slice(self.score.samples)
        return {"safety": (self.safety, part), "utility": (self.utility, part)}

    @property
    def all_arms(self) -> list[ArmSpec]:
        """The arms, each for every cell of the sweep."""
        return self.sweep.over(self.arms)


def stages(spec: DriftStudySpec) -> list[Stage]:
    """The study's stages, in order."""
    from deltalab.studies.drift_stages import stages as made

    return made(spec)


def run_study(
    spec: DriftStudySpec, folder: str | Path | None = None, *, only: str | None = None, until: str | None = None,
    dry_run: bool = False, jobs: int | None = None, say: Any = print, resume_with: str = "deltalab study drift SPEC",
) -> Context | str:  # fmt: skip
    """Run the study, or go on with it; with `dry_run` return what would be done, as text.

    jobs: tunings side by side; None: as many as processors and memory allow.
    Raises: UserError for a folder of another study, or anything that a stage refuses.
    """
    from deltalab.studies.running import run_or_plan

    return run_or_plan("drift", spec, folder or spec.output or "runs/drift", stages, only=only, until=until,
                       dry_run=dry_run, jobs=jobs, say=say, resume_with=resume_with)  # fmt: skip


SPEC = DriftStudySpec
"""What `deltalab study drift` reads."""
