"""What the specs of studies are made of: groups, the tuning, its arms and sweeps, and what is asked."""

import itertools
from typing import Annotated, Literal, NamedTuple

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from deltalab.core.spec import Spec
from deltalab.data.tasks import DataSpec
from deltalab.deltas import any_spec
from deltalab.deltas.spec import ParameterSpec
from deltalab.train.spec import DEFAULT_ADAPT, EvalSpec, LoopSpec, OptimSpec, RunSpec

GROUPS = ("safety", "utility", "safety-only", "random", "matched", "complement")
"""safety, utility: the top by score. safety-only: their set difference. random: as many entries as the focus in each
matrix. matched: random, and with the focus's spread of |W| in each matrix. complement: all but the focus."""

CONTROLS = ("matched", "random", "complement")
"""Groups whose freezing an arm's is compared with."""

UnitKind = Literal["entry", "row", "column", "mlp-unit", "head"]
GroupName = Literal["safety", "utility", "safety-only", "random", "matched", "complement"]
Variant = Literal["none", "grad_mask", "exact", "rewind", "delta_mask"]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
Share = Annotated[float, Field(gt=0, le=1)]


def is_harmful(prompts: str) -> bool:
    """Whether the prompts of a set ought to be refused."""
    return prompts != "xstest_safe"


class GroupsSpec(Spec):
    """Which weights are looked at.

    q: share of the highest safety scores; p: of the highest utility scores. per: within what the share is taken. unit:
    what is chosen: single entries, or rows, columns, MLP units or heads whole. focus: the group that the verdict is
    about. nulls: random groups of each kind of matching (on |W|, and on the utility score), for the band and the test;
    drawn in full at the last step of a tuning, at most 99 of them before.
    """

    q: Share = 0.05
    p: Share = 0.02
    per: Literal["row", "matrix", "global"] = "row"
    unit: UnitKind = "entry"
    focus: Literal["safety", "utility", "safety-only"] = "safety-only"
    nulls: Annotated[int, Field(ge=20)] = 999

    @pydantic.model_validator(mode="after")
    def _per_unit(self) -> "GroupsSpec":
        if self.unit != "entry" and self.per == "row":
            raise ValueError(f"a share of each row has no {self.unit} in it: per is 'matrix' or 'global' for units")
        return self

    def labels(self) -> dict[str, str]:
        """Every group in words, with its shares."""
        of = "" if self.unit == "entry" else f" {self.unit}s"
        top = {name: f"{name} (top {100 * self.q:g} %{of})" for name in ("safety", "utility")}
        only = f"safety-only (top {100 * self.q:g} %{of} for safety without top {100 * self.p:g} % for utility)"
        return {
            **top, "safety-only": only, "random": "random", "matched": "matched random", "complement": f"all but {self.focus}",
        }  # fmt: skip


class TuneSpec(Spec):
    """The tuning that every arm gets. drift_every: steps between two measures of drift. ask_every: steps between two
    evaluations of the replies on a few prompts of each set; null for none, so that they are asked before and after only."""

    adapt: Annotated[list[any_spec()], Field(min_length=1)] = Field(DEFAULT_ADAPT)  # type: ignore[valid-type]
    data: Annotated[list[DataSpec], Field(min_length=1)]
    optim: OptimSpec = OptimSpec()
    run: RunSpec = RunSpec()
    eval: EvalSpec = EvalSpec()
    drift_every: PositiveInt = 100
    ask_every: PositiveInt | None = None


class ArmSpec(Spec):
    """One tuning: how it freezes, and which group.

    freeze: `none`; `grad_mask`, a hook on the base weights' gradients and nothing more; `exact`, the entries put back
    after each step (full tuning); `rewind`, put back at the end; `delta_mask`, the change of a delta held at zero.
    lr, steps, n: in place of the tuning's own learning rate, steps, and number of samples.
    """

    name: Name
    freeze: Variant = "none"
    group: GroupName = "safety-only"
    lr: PositiveFloat | None = None
    steps: PositiveInt | None = None
    n: PositiveInt | None = None

    @property
    def cell(self) -> str:
        """What it differs in from the study's own tuning; arms of one cell are compared with each other."""
        return ", ".join(
            f"{key} {value:g}" for key in ("lr", "steps", "n") if (value := getattr(self, key)) is not None
        )

    @property
    def label(self) -> str:
        """How figures name it."""
        what = {"matched": "matched random", "complement": "everything else"}.get(self.group, self.group)
        how = {"grad_mask": " (gradient hook)", "rewind": " (put back at the end)"}.get(self.freeze, "")
        frozen = "nothing frozen" if self.freeze == "none" else f"{what} frozen{how}"
        return f"{frozen}, {self.cell}" if self.cell else frozen


class SweepSpec(Spec):
    """Each arm once for every combination of these; what is empty stays as the tuning has it."""

    lr: list[PositiveFloat] = []
    steps: list[PositiveInt] = []
    n: list[PositiveInt] = []

    def over(self, arms: list[ArmSpec]) -> list[ArmSpec]:
        """The arms multiplied."""
        axes = {key: values for key in ("lr", "steps", "n") if (values := getattr(self, key))}
        out = []
        for combination in itertools.product(*axes.values()):
            changes = dict(zip(axes, combination, strict=True))
            tail = "".join(f"-{key}{value:g}".replace(".", "p").replace("+", "") for key, value in changes.items())
            out += [arm.but(name=arm.name + tail, **changes) for arm in arms]
        return out


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


class Run(NamedTuple):
    """One tuning of a study: an arm with a seed. name: of its stages and folders."""

    arm: ArmSpec
    seed: int
    name: str


def runs_of(arms: list[ArmSpec], seeds: list[int]) -> list[Run]:
    """Every arm with every seed, arm by arm; the seed is in the name where there are several."""
    return [Run(arm, seed, f"{arm.name}:{seed}" if len(seeds) > 1 else arm.name) for arm in arms for seed in seeds]


def loop_of(tune: TuneSpec, arm: ArmSpec | None, seed: int) -> LoopSpec:
    """What the training loop takes."""
    changes = (
        {} if arm is None else {key: getattr(arm, key) for key in ("lr", "steps") if getattr(arm, key) is not None}
    )
    if "steps" in changes:
        changes["epochs"] = None
    return LoopSpec(optim=tune.optim.but(**changes), run=tune.run, eval=tune.eval, seed=seed)


def checked_arms(arms: list[ArmSpec], tune: TuneSpec) -> list[ArmSpec]:
    """The arms, if they can be tuned and compared.

    Raises: ValueError in words, for pydantic to report.
    """
    names = [arm.name for arm in arms]
    if "before" in names:
        raise ValueError("no arm may be called 'before': that is the model as it was")
    if len(set(names)) < len(names):
        raise ValueError(f"two arms have one name: {', '.join(names)}")
    for cell in dict.fromkeys(arm.cell for arm in arms):
        first = next(arm for arm in arms if arm.cell == cell)
        if first.freeze != "none":
            where = f" with {cell}" if cell else ""
            raise ValueError(f"the first arm{where} freezes nothing (freeze: none): the others are compared with it")
    own = [isinstance(item, ParameterSpec) for item in tune.adapt]
    for arm in arms:
        if arm.freeze == "exact" and not all(own):
            raise ValueError(
                f"arm '{arm.name}' freezes 'exact', which holds the model's own weights, and a delta moves W + ΔW: "
                "freeze 'delta_mask'"
            )
        if arm.freeze == "delta_mask" and any(own):
            raise ValueError(
                f"arm '{arm.name}' freezes 'delta_mask', which holds the change of a delta, and the weights themselves "
                "train: freeze 'exact'"
            )
    labels = [arm.label for arm in arms]
    if len(set(labels)) < len(labels):
        raise ValueError("two arms freeze the same group in the same way")
    return arms
