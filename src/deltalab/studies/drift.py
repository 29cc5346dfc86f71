"""The drift study: which weights carry refusals, how far a tuning moves them, and what freezing them does.

    scores       SNIP of every weight on harmful prompts with refusals (safety) and on useful answers (utility)
    groups       the top of each, their set difference, random groups, and random groups matched to the focus
    evaluate     before tuning: refusals, compliance, broken text, first-token log-odds, skills
    tune:ARM     one training for each arm, the drift of every group measured on the way
    evaluate:ARM the same questions afterwards
    verdict      tests, in words
    report       record.json, and from it the page, the text, the JSON and the figures

Wei et al. 2024 (arXiv:2402.05162) for the scores and the set difference; the arms differ in what is frozen.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from deltalab.core.spec import Spec
from deltalab.data.tasks import BenignTask, DataSpec, RefusalsTask, SkillsTask
from deltalab.deltas import any_spec
from deltalab.deltas.base import ParameterSpec
from deltalab.safety.scores import ScoreSpec
from deltalab.studies.stages import Context, plan, run
from deltalab.train.spec import DEFAULT_ADAPT, EvalSpec, LoopSpec, OptimSpec, RunSpec

GROUPS = ("safety", "utility", "safety-only", "random", "matched")
"""safety, utility: the top by score. safety-only: their set difference. random: as many entries as the focus in each
matrix. matched: random, and with the focus's spread of |W| in each matrix."""

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
Share = Annotated[float, Field(gt=0, le=1)]


def is_harmful(prompts: str) -> bool:
    """Whether the prompts of a set ought to be refused."""
    return prompts != "xstest_safe"


class GroupsSpec(Spec):
    """Which weights are looked at.

    q: share of the highest safety scores; p: of the highest utility scores. per: within what the share is taken.
    focus: the group that the verdict is about. nulls: matched random groups for the band and the test.
    """

    q: Share = 0.05
    p: Share = 0.02
    per: Literal["row", "matrix", "global"] = "row"
    focus: Literal["safety", "utility", "safety-only"] = "safety-only"
    nulls: Annotated[int, Field(ge=20)] = 99


class TuneSpec(Spec):
    """The tuning that every arm gets. drift_every: steps between two measures of drift."""

    adapt: Annotated[list[any_spec()], Field(min_length=1)] = Field(DEFAULT_ADAPT)  # type: ignore[valid-type]
    data: Annotated[list[DataSpec], Field(min_length=1)]
    optim: OptimSpec = OptimSpec()
    run: RunSpec = RunSpec()
    eval: EvalSpec = EvalSpec()
    drift_every: PositiveInt = 50

    def loop(self, seed: int) -> LoopSpec:
        """What the training loop takes."""
        return LoopSpec(optim=self.optim, run=self.run, eval=self.eval, seed=seed)


class ArmSpec(Spec):
    """One tuning: how it freezes (`none`, `exact` for full tuning, `delta_mask` for LoRA) and which group."""

    name: Name
    freeze: Literal["none", "exact", "delta_mask"] = "none"
    group: Literal["safety", "utility", "safety-only", "random", "matched"] = "safety-only"

    @property
    def label(self) -> str:
        """How figures name it."""
        return "nothing frozen" if self.freeze == "none" else f"{self.group} frozen"


class EvaluateSpec(Spec):
    """What is asked before and after. prompts: bundled sets; limit: at most so many of each. skills: how many questions,
    0 for none. max_new_tokens: of a reply."""

    prompts: Annotated[list[str], Field(min_length=1)] = ["advbench", "jailbreakbench", "xstest_safe"]
    split: Literal["test", "val", "all"] = "test"
    limit: PositiveInt | None = None
    skills: NonNegativeInt = 240
    max_new_tokens: PositiveInt = 48
    batch: PositiveInt = 64

    @pydantic.field_validator("prompts")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        from deltalab.organism.prompts import NAMES

        if unknown := [name for name in value if name not in NAMES]:
            raise ValueError(f"no prompt set is called {', '.join(map(repr, unknown))}; there are: {', '.join(NAMES)}")
        if not any(is_harmful(name) for name in value):
            raise ValueError("name at least one set of harmful prompts")
        return list(dict.fromkeys(value))


class DriftStudySpec(Spec):
    """A drift study of one model, with one seed.

    safety, utility: calibration data of the two scores. margin: changes smaller than this count as none (of rates in
    absolute terms, of drift relative to the matched random groups). output: folder; `runs/drift` if not given.
    """

    study: Literal["drift"] = "drift"
    model: str = "organism"
    safety: Annotated[list[DataSpec], Field(min_length=1)] = [RefusalsTask(limit=128)]
    utility: Annotated[list[DataSpec], Field(min_length=1)] = [SkillsTask(n=64), BenignTask(n=64)]
    score: ScoreSpec = ScoreSpec()
    groups: GroupsSpec = GroupsSpec()
    tune: TuneSpec
    arms: Annotated[list[ArmSpec], Field(min_length=1)] = [ArmSpec(name="free")]
    evaluate: EvaluateSpec = EvaluateSpec()
    margin: PositiveFloat = 0.1
    seed: NonNegativeInt = 0
    output: str | None = None

    @pydantic.model_validator(mode="after")
    def _arms(self) -> Self:
        names = [arm.name for arm in self.arms]
        if "before" in names:
            raise ValueError("no arm may be called 'before': that is the model as it was")
        if len(set(names)) < len(names):
            raise ValueError(f"two arms have one name: {', '.join(names)}")
        if self.arms[0].freeze != "none":
            raise ValueError("the first arm freezes nothing (freeze: none): the others are compared with it")
        own = [isinstance(item, ParameterSpec) for item in self.tune.adapt]
        for arm in self.arms:
            if arm.freeze == "exact" and not all(own):
                raise ValueError(
                    f"arm '{arm.name}' freezes 'exact', which holds the model's own weights, and a delta moves W + ΔW: freeze 'delta_mask'"
                )
            if arm.freeze == "delta_mask" and any(own):
                raise ValueError(
                    f"arm '{arm.name}' freezes 'delta_mask', which holds the change of a delta, and the weights themselves train: freeze 'exact'"
                )
        labels = [arm.label for arm in self.arms]
        if len(set(labels)) < len(labels):
            raise ValueError("two arms freeze the same group")
        return self


def run_study(
    spec: DriftStudySpec, folder: str | Path | None = None, *, only: str | None = None, until: str | None = None,
    dry_run: bool = False, say: Any = print, resume_with: str = "deltalab study drift SPEC",
) -> Context | str:  # fmt: skip
    """Run the study, or go on with it; with `dry_run` return what would be done, as text.

    Raises: UserError for a folder of another study, or anything that a stage refuses.
    """
    from deltalab.studies.drift_stages import stages

    folder = Path(folder or spec.output or "runs/drift")
    spec = spec.but(output=None)  # where a study lies does not make it another one
    steps = stages(spec)
    if dry_run:
        from deltalab.studies.estimates import estimated

        return plan(estimated(spec, steps), folder, spec, only=only, until=until)
    return run(steps, folder, spec, only=only, until=until, say=say, resume_with=resume_with)


SPEC = DriftStudySpec
"""What `deltalab study drift` reads."""
