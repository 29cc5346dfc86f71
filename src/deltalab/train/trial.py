"""Whether a model can be trained on packed samples: found out by trying, before the first step.

Three short samples go through the model one by one, then packed. Every logit has to be the same within rounding: small
beside what it would be if each sample saw those before it. So it does not matter what kind of model it is, or whose
attention it runs.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.data.chat import Encoded
from deltalab.data.collate import collate
from deltalab.data.packing import Batch, Pieces, cut, pack, placed
from deltalab.deltas.measures import gathered
from deltalab.deltas.weights import is_adapted
from deltalab.train import rng
from deltalab.train.spec import RunSpec

LENGTHS = (7, 4, 6)
"""Tokens of the samples that are tried."""
ROUNDING, COARSE = 1e-4, 3e-2
"""Error of a token's logits, relative by norm, that rounding may make in fp32, and where anything is computed in 16 bit."""
SHARE = 0.25
"""Of what a leak would make, so much may be the error in 16 bit."""


MASKED = ("sdpa", "eager", None)
"""Implementations of attention that mask a packed row, and so pay for its square, in place of going sample by sample."""
ROW, ROW_ON_CPU = 2048, 512
"""Tokens of such a row where `run.tokens` says nothing: more cost more than padding does, fewer leave a GPU idle."""


@dataclass(frozen=True)
class Packing:
    """Whether a run packs, and why: what was asked for, or what the trial found. row: tokens of a row at most, or None for
    no limit; masked: in evaluation, where attention masks a packed row.
    """

    packed: bool
    why: str
    row: int | None = None
    masked: int | None = None

    def __str__(self) -> str:
        return f"{'packed' if self.packed else 'padded, near lengths together'}: {self.why}"

    def cut(self, lengths: Sequence[int], pieces: int, processes: int = 1, training: bool = True) -> list[Pieces]:
        """The pieces of each process, see `deltalab.data.packing.cut`."""
        row = self.row if training else self.row or self.masked
        return cut(lengths, packed=self.packed, budget=row, pieces=pieces, processes=processes)

    def batch(self, samples: Sequence[Encoded], pad_id: int, device: torch.device) -> Batch:
        """The arguments of the forward pass of a piece, and its labels, on a device."""
        return placed(pack(samples) if self.packed else collate(samples, pad_id), device)


def choose_packing(run: RunSpec, model: nn.Module, samples: Sequence[Encoded]) -> Packing:
    """What `run.pack` and `run.tokens` mean for this model: null packs where the trial succeeds.

    samples: whose tokens are tried. Raises: UserError if packing is asked for and the model cannot.
    """
    if samples and samples[0].choice is not None:
        if run.pack:
            raise _cannot(model, "a classifier has one output for a row", "leave run.pack out")
        return Packing(False, "a classifier has one output for a row", run.tokens)
    if run.pack is False:
        return Packing(False, "run.pack=false", run.tokens)
    why = why_not_packed(model, samples)
    if why and run.pack:
        raise _cannot(model, why, "leave run.pack out, or set run.pack=false: batches of near lengths, padded")
    if why:
        return Packing(False, why, run.tokens)
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    masked = ROW_ON_CPU if next(model.parameters()).device.type == "cpu" else ROW
    row = run.tokens or (masked if name in MASKED else None)
    return Packing(True, "each sample's logits are those alone", row, masked)


def require_packing(model: nn.Module, samples: Sequence[Encoded] = ()) -> None:
    """Raises: UserError if the model's logits of packed samples are not those of each alone. For other loops than ours."""
    why = why_not_packed(model, samples)
    if why:
        raise _cannot(model, why, "pad its batches, or load it with attn_implementation='sdpa'")


def why_not_packed(model: nn.Module, samples: Sequence[Encoded] = ()) -> str:
    """What is wrong with the logits of packed samples, in a few words; nothing if they are right.

    The passes are those of training, with gradients to come and dropout off, and those of evaluation. Generators, modes
    and what deltas tell of their last forward are left as they were. samples: whose tokens are taken; without them
    some of the vocabulary.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "it is an encoder–decoder"
    tried = _samples(model, samples)
    try:
        with rng.kept(), _undisturbed(model):
            for training in (True, False):
                if why := _wrong(model, tried, training):
                    return why
    except Exception as error:  # whatever a model's forward raises that does not know the arguments of a packed batch
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return ""


def _wrong(model: nn.Module, samples: list[Encoded], training: bool) -> str:
    """Compare the logits, sample by sample; nothing to say of a training pass that is random without dropout too."""
    model.train(training)
    with torch.set_grad_enabled(training):
        alone = [_alone(model, sample) for sample in samples]
        if training and not torch.equal(alone[0], _alone(model, samples[0])):
            return ""
        row = {name: value for name, value in pack(samples).items() if name != "labels"}
        together = _logits(model, row).split(LENGTHS)
        mixed = _alone(model, Encoded([t for s in samples for t in s.input_ids], [])).split(LENGTHS)
    fine = _is_fine(model, alone[0])
    for number, (want, got, leak) in enumerate(zip(alone, together, mixed, strict=True), 1):
        error, leaked = _error(got, want, fine), _error(leak, want, fine)
        if not error <= (ROUNDING if fine else COARSE):
            how = "training" if training else "evaluation"
            return f"the logits of sample {number} of {len(samples)} are off by {error:.1g} in {how}"
        if not fine and number > 1 and error > max(ROUNDING, SHARE * leaked):
            return f"rounding to 16 bit hides whether sample {number} sees the one before"
    return ""


def _alone(model: nn.Module, sample: Encoded) -> Float[Tensor, "tokens vocab"]:
    ids = torch.tensor([sample.input_ids])
    return _logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _logits(model: nn.Module, batch: Batch) -> Float[Tensor, "tokens vocab"]:
    return model(**placed(batch, next(model.parameters()).device), use_cache=False).logits[0].detach()


def _error(got: Float[Tensor, "tokens vocab"], want: Float[Tensor, "tokens vocab"], fine: bool) -> float:
    """The error of a token, relative by norm: the largest; in 16 bit the median, for a router may turn by rounding."""
    sizes = want.double().norm(dim=-1).clamp_min(1e-30)
    errors = (got.double() - want.double()).norm(dim=-1) / sizes
    return float(errors.max() if fine else errors.median())


def _is_fine(model: nn.Module, logits: Float[Tensor, "tokens vocab"]) -> bool:
    """Whether all is computed in fp32 or wider: under autocast the logits are of 16 bit, whatever they are given as."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} | {logits.dtype}
    return not dtypes & {torch.bfloat16, torch.float16} and not torch.equal(logits.bfloat16().to(logits.dtype), logits)


def _samples(model: nn.Module, samples: Sequence[Encoded]) -> list[Encoded]:
    """Random tokens of those that the data has, or of the vocabulary's first."""
    known = sorted({token for sample in samples[:64] for token in sample.input_ids})
    if not known:
        table = model.get_input_embeddings()  # type: ignore[operator]
        known = list(range(min(table.num_embeddings, 1000)))
    drawn = np.random.default_rng(0).choice(known, sum(LENGTHS)).tolist()
    ends = np.cumsum([0, *LENGTHS]).tolist()
    return [Encoded(drawn[a:b], drawn[a:b]) for a, b in itertools.pairwise(ends)]


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Modes put back, no dropout of modules or of rates that a module keeps; deltas told to forget what they gathered."""
    modes = [(module, module.training) for module in model.modules()]
    rates = [
        (module, name, rate) for module, _ in modes for name, rate in vars(module).items()
        if isinstance(rate, float) and ("drop" in name or (name == "p" and "Dropout" in type(module).__name__))
    ]  # fmt: skip
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        with gathered(model) if is_adapted(model) else contextlib.nullcontext():
            yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
        for module, mode in modes:
            module.training = mode
        if is_adapted(model):
            with gathered(model):
                pass


def _cannot(model: nn.Module, why: str, next: str) -> UserError:
    return UserError(
        f"{type(model).__name__} cannot be trained on packed samples.",
        found=why,
        nearest=["llama, mistral, qwen2, qwen3, gemma, phi3, gpt2, gpt_neox with attn_implementation sdpa or eager"],
        next=next,
    )
