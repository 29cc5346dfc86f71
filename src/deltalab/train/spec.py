"""What a training run is: few fields, defaults that work, every fault said at once."""

from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from deltalab.core.spec import Spec
from deltalab.data.chat import TooLong
from deltalab.data.tasks import DataSpec
from deltalab.deltas import any_spec
from deltalab.quant.linear import Quantisation

DEFAULT_ADAPT = [{"method": "lora", "r": 8, "alpha": 16.0, "dropout": 0.05, "targets": "q,v"}]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class OptimSpec(Spec):
    """AdamW and its schedule.

    batch: samples in one optimizer step, over all processes. accumulate: in how many pieces a process computes it,
    which changes memory and not the result; `run.tokens` makes more of them where needed. warmup: fraction of the steps. clip: largest gradient norm, null for none.
    steps or epochs: one of them; one epoch if neither is given. Weight decay is for matrices only.
    paged: 32 or 8, the bits of moments that bitsandbytes moves to CPU memory while a GPU is full; null for torch's AdamW.
    """

    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.06
    clip: PositiveFloat | None = 1.0
    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    batch: PositiveInt = 8
    accumulate: PositiveInt = 1
    paged: Literal[32, 8] | None = None

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps and self.epochs:
            raise ValueError("give steps or epochs, not both")
        if self.accumulate > self.batch:
            raise ValueError(f"a batch of {self.batch} has no {self.accumulate} pieces to accumulate")
        return self


class RunSpec(Spec):
    """How it runs.

    context: longest sample in tokens; null for the model's own, at most 1024. too_long: what becomes of longer ones.
    checkpoint_every: steps; null for a tenth of the run. keep: checkpoints kept beside the best one.
    dtype: of the computation; in bfloat16 what is trained stays in float32. resume: go on from the last checkpoint.
    pack: samples go through the model one behind the other, without padding; null where a trial finds that the model
    supports it. tokens: of a forward pass at most, padding included: a step is cut into pieces that fit, and a longer
    sample goes alone; null for no limit but where attention masks a packed row. checkpointing: layers are computed
    again in the backward, for less memory. offload: what the backward needs waits in CPU memory; on CUDA alone. None of
    these four changes the result. kernels: auto or plain, see `deltalab.adapt`; null for what the model was adapted with,
    auto in a run from a spec.
    """

    context: PositiveInt | None = None
    too_long: TooLong = "skip"
    checkpoint_every: PositiveInt | None = None
    keep: PositiveInt = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    resume: bool = True
    pack: bool | None = None
    tokens: PositiveInt | None = None
    checkpointing: bool = False
    offload: bool = False
    kernels: Literal["auto", "plain"] | None = None


class EvalSpec(Spec):
    """The loss on held-out data: before, every `every` steps (null: a tenth of the run) and after.

    fraction: of the data held out where the tasks bring no test data. limit: at most so many samples.
    patience: stop after so many evaluations without a lower loss. best: end with the weights of the lowest
    loss rather than the last; always so with `patience`.
    """

    every: PositiveInt | None = None
    fraction: Fraction = 0.05
    limit: PositiveInt = 200
    patience: PositiveInt | None = None
    best: bool = False


class ProbeSpec(Spec):
    """What is looked at every so many steps, see `deltalab.train.probes`: the deltas' weights and spectra, and the representations
    of so many samples."""

    every: PositiveInt = 50
    samples: PositiveInt = 16


class TrackSpec(Spec):
    """An experiment tracker that the run's curves, scores and costs go to as well, see `deltalab.train.tracking`.

    project: of W&B and Trackio; the experiment of MLflow. name, group: of the run there; null for the output folder's name, and
    for none; a sweep sets both. offline: nothing may go over a network. options: more of what the tracker's own start takes:
    wandb.init, trackio.init, torch's SummaryWriter, accelerate's MLflowTracker.
    """

    to: Literal["wandb", "trackio", "tensorboard", "mlflow"]
    project: Annotated[str, Field(min_length=1)] = "deltalab"
    name: str | None = None
    group: str | None = None
    offline: bool = False
    options: dict[str, Any] = {}


def _listed(given: Any) -> Any:
    """`wandb`, `[wandb]`, `{to: wandb}` and nothing, all as a list of mappings."""
    items = [] if given is None else given if isinstance(given, list | tuple) else [given]
    return [{"to": item} if isinstance(item, str) else item for item in items]


class LoopSpec(Spec):
    """What `deltalab.train` needs when model and data are at hand. probe: what is looked at meanwhile; null for nothing.

    track: experiment trackers by name, or with their settings: `[tensorboard, {to: wandb, offline: true}]`. They are no part of
    what a run is: they may be added and left out at any time.
    """

    beside: ClassVar[tuple[str, ...]] = ("track",)

    optim: OptimSpec = OptimSpec()
    run: RunSpec = RunSpec()
    eval: EvalSpec = EvalSpec()
    probe: ProbeSpec | None = None
    track: Annotated[list[TrackSpec], pydantic.BeforeValidator(_listed)] = []
    seed: Annotated[int, Field(ge=0)] = 42

    @pydantic.field_validator("track")
    @classmethod
    def _once(cls, track: list[TrackSpec]) -> list[TrackSpec]:
        names = [one.to for one in track]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]} stands there twice")
        return track


class TrainSpec(LoopSpec):
    """A whole run: load `model`, adapt it, train it on `data`, write the adapter and a record to `output`.

    quantize: the linears of its blocks to nf4, int8 or int4-group while it is loaded, see `deltalab.load`. head: null for what
    the model has, but an encoder gets one of classes where the tasks are choices. validation: that share of each task's training
    data is held out in the place of its test data, which is not touched: to choose settings by. retain: tasks that the base knew
    already; their loss before and after is what was forgotten. costs: also measure what the finished adapter costs, see
    `deltalab.train.costs`.
    """

    model: str
    head: Literal["CausalLM", "SequenceClassification"] | None = None
    quantize: Quantisation | None = None
    adapt: Annotated[list[any_spec()], Field(min_length=1)] = Field(DEFAULT_ADAPT)
    data: Annotated[list[DataSpec], Field(min_length=1)]
    validation: Fraction = 0.0
    retain: list[DataSpec] = []
    costs: bool = True
    output: str | None = None
