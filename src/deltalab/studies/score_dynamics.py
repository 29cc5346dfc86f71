"""The study of score dynamics: what a tuning does to the scores of the weights that were the most important for safety.

    select       scores on one half of the calibration samples; their top is the group
    before       the group's scores on the other half, of the untouched model
    evaluate     before tuning: refusals, compliance, broken text, first-token log-odds, skills
    tune:ARM     one training for each arm and seed
    after:ARM    the group's scores on that other half again: of the base weights under the tuned activations, and of
                 the merged weights
    evaluate:ARM the same questions afterwards
    verdict      tests, in words
    report       record.json, and from it the page, the text, the JSON and the figures

Hypothesis A, representational drift: the group's scores fall, as the model goes round it. Hypothesis B, global
redistribution: they stay, and what changed lies elsewhere.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat

from deltalab.core.spec import Spec
from deltalab.data.tasks import DataSpec, RefusalsTask, Task
from deltalab.safety.scores import ScoreSpec
from deltalab.studies.parts import ArmSpec, EvaluateSpec, Share, TuneSpec, UnitKind, checked_arms
from deltalab.studies.stages import Context, Stage

QUICK = ("score.samples=32", "group.q=0.01", "group.nulls=99", "tune.optim.epochs=1", "evaluate.limit=50")
"""What `--quick` changes."""


class GroupSpec(Spec):
    """The group: the share `q` of the highest scores per row, matrix or over all, of entries or of units. nulls: random
    groups matched on |W| that its change is compared with."""

    q: Share = 0.03
    per: Literal["row", "matrix", "global"] = "row"
    unit: UnitKind = "entry"
    nulls: Annotated[int, Field(ge=20)] = 999


class BoundsSpec(Spec):
    """Relative changes of the group's mean score: below −fall it is A, within ±stable it is B. rates: of a change of
    shares that counts as none."""

    fall: PositiveFloat = 0.10
    stable: PositiveFloat = 0.05
    rates: PositiveFloat = 0.1


class ScoreDynamicsSpec(Spec):
    """A study of score dynamics of one model.

    data: what weights are scored on; twice `score.samples` are taken, every other one to select and to measure on.
    seeds: of the tunings; random groups and questions are drawn with the first. output: folder;
    `runs/score-dynamics` if not given.
    """

    study: Literal["score-dynamics"] = "score-dynamics"
    model: str = "organism"
    data: Annotated[list[DataSpec], Field(min_length=1)] = [RefusalsTask(limit=256)]
    score: ScoreSpec = ScoreSpec(score="wanda")
    group: GroupSpec = GroupSpec()
    tune: TuneSpec
    arms: Annotated[list[ArmSpec], Field(min_length=1)] = [ArmSpec(name="free", group="safety")]
    evaluate: EvaluateSpec = EvaluateSpec()
    bounds: BoundsSpec = BoundsSpec()
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [42]
    output: str | None = None

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        checked_arms(self.arms, self.tune)
        known = ("safety", "matched", "random", "complement")
        for arm in self.arms:
            if arm.freeze != "none" and arm.group not in known:
                raise ValueError(
                    f"arm '{arm.name}' freezes '{arm.group}'; the groups of this study: {', '.join(known)}"
                )
        if self.group.unit != "entry" and self.group.per == "row":
            raise ValueError(
                f"a share of each row has no {self.group.unit} in it: per is 'matrix' or 'global' for units"
            )
        if self.score.score in ("magnitude", "random"):
            raise ValueError(f"the score '{self.score.score}' depends on no activations, so it has no dynamics")
        return self

    @property
    def calibration(self) -> Mapping[str, tuple[Sequence[Task], slice]]:
        """Samples to select on and to measure on: every other one."""
        n = 2 * self.score.samples
        return {"select": (self.data, slice(0, n, 2)), "measure": (self.data, slice(1, n, 2))}


def stages(spec: ScoreDynamicsSpec) -> list[Stage]:
    """The study's stages, in order."""
    from deltalab.studies.score_dynamics_stages import stages as made

    return made(spec)


def run_study(
    spec: ScoreDynamicsSpec, folder: str | Path | None = None, *, only: str | None = None, until: str | None = None,
    dry_run: bool = False, jobs: int | None = None, say: Any = print,
    resume_with: str = "deltalab study score-dynamics SPEC",
) -> Context | str:  # fmt: skip
    """Run the study, or go on with it; see `deltalab.studies.drift.run_study`."""
    from deltalab.studies.running import run_or_plan

    return run_or_plan("score-dynamics", spec, folder or spec.output or "runs/score-dynamics", stages, only=only,
                       until=until, dry_run=dry_run, jobs=jobs, say=say, resume_with=resume_with)  # fmt: skip


SPEC = ScoreDynamicsSpec
"""What `deltalab study score-dynamics` reads."""
