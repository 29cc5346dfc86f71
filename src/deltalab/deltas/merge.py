"""A model without its deltas that computes what the adapted one does, and what becomes of linears that keep codes.

W' = W + ΔW is exact for a weight that is kept as such, apart from rounding to its dtype. Codes cannot hold every W':

    dequantise   the linear becomes a plain one with W' = Ŵ + ΔW: nothing is lost, and its memory is a plain linear's
    requantise   it gets the codes of W': the memory stays, and Q(W') − W' is lost
    correct      the same, and the best approximation of rank r of what is lost, W' − Q(W') ≈ B A, stays beside the codes as
                 an adapter (Li et al. 2023, LoftQ, arXiv:2310.08659, alg. 1, with W' in place of the weight)

An adapter of rank r on a quantised linear is that already, Ŵ + B A with nothing lost: correcting is for changes of a larger
rank than the one that may stay, or of none. What each way costs a model is measured by `deltalab.measure.merging`.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.shapes import Float
from deltalab.deltas.attach import adapted_modules, detach
from deltalab.deltas.base import Delta, Factors, WeightDelta
from deltalab.deltas.copying import copied
from deltalab.deltas.factored import put_factors
from deltalab.deltas.fuse import unfuse
from deltalab.deltas.init import Pair, loftq
from deltalab.deltas.select import model_name
from deltalab.deltas.sites import Place, is_quantised, place
from deltalab.deltas.switch import forget
from deltalab.deltas.weights import Adaptation, adaptation, attached, delta_weight, mark_of, merged_weight
from deltalab.quant import foreign
from deltalab.quant.base import QuantisedLinear, plain_linear

Into = Literal["dequantise", "requantise", "correct"]
RANK = 8
"""Of a correction, where none is asked for."""


def merged(
    model: nn.Module, into: str = "dequantise", *, rank: int | None = None, steps: int | None = None
) -> nn.Module:
    """A model that computes what the adapted one does, apart from rounding each merged weight to what keeps it.

    It shares the memory of every tensor that no delta touched; the adapted model stays as it is.
    into: what a quantised linear under a delta becomes, see above; one without a delta keeps its codes. A group-quantised
    one keeps codes and scales in all of them where the change goes into its offsets (QA-LoRA), which is exact.
    rank: of a correction, 8 if not given; the result is then a quantised model with an adapter, saved as both.
    steps: of a correction, how often codes and factors are fitted to what the other leaves, 1 if not given.
    Raises: UserError if a delta depends on the input and so has no adapted weight, codes are asked for where none are,
    or a linear is quantised in a way that is not read here.
    """
    state, deltas = adaptation(model), attached(model)
    _refuse_unmergeable(deltas)
    correction = _correction(into, rank, steps)
    if into != "dequantise" and not any(_has_codes(place(model, path)) for path in deltas):
        raise UserError(f"into='{into}' is for quantised linears, and no delta of {model_name(model)} is on one.",
                        next="leave it out: plain linears are merged as they are; or deltalab.load(name, quantize=...)")  # fmt: skip
    plain = _without_deltas(model, state, deltas)
    left: dict[str, Factors] = {}
    for path in deltas:
        where = place(plain, path)
        if foreign.kind(where.module) is not None:
            if correction is None:
                dtype = getattr(model, "dtype", where.dtype)
                plain.set_submodule(path, plain_linear(where.module, merged_weight(model, path), dtype))
                continue
            plain.set_submodule(path, foreign.own(where.module))
            where = place(plain, path)
        if not isinstance(where.module, QuantisedLinear):
            value = where.oriented(merged_weight(model, path)).to(where.dtype)
            kept = nn.Parameter(value.contiguous(), requires_grad=where.parameter.requires_grad)
            where.module.register_parameter(where.name, kept)
        elif not where.module.absorb(delta_weight(model, path)):
            W = merged_weight(model, path)
            if correction is None:
                plain.set_submodule(path, where.module.plain(W))
                continue
            made, pair = corrected(where.module, W, *correction)
            plain.set_submodule(path, made.train(where.module.training))
            if pair is not None:
                left[path] = Factors(*pair, 1.0)
    for path, delta in deltas.items():
        _merge_bias(place(plain, path), delta)
    foreign.settle(plain)
    forget(plain, state)
    if left:
        put_factors(plain, left)
        adaptation(plain).prepared.update({path: mark_of(place(plain, path).W) for path in left})
    return plain


def dequantised(model: nn.Module) -> nn.Module:
    """Every quantised linear of a model without deltas becomes a plain one, in place; returns the model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantisedLinear):
            model.set_submodule(path, module.plain(module.weight))
        elif foreign.kind(module) is not None:
            model.set_submodule(path, plain_linear(module, foreign.weight_of(module), getattr(model, "dtype")))  # noqa: B009
    foreign.settle(model)
    return model


class Correction(NamedTuple):
    """rank 0: none, the codes alone."""

    rank: int
    steps: int


def corrected(
    linear: QuantisedLinear, W: Float[Tensor, "out in"], rank: int, steps: int = 1
) -> tuple[QuantisedLinear, Pair | None]:
    """The linear whose codes are for W, and A (r, in), B (out, r) with Ŵ + B A ≈ W; None for rank 0.

    With one step the codes are those of W, and B A is the best that its rank allows: ‖W − Ŵ − B A‖ is what the other
    singular values of W − Ŵ make up. More steps fit the codes to W − B A again, which mostly, not always, leaves less.
    """
    if not rank:
        return linear.requantised(W), None

    def round_trip(V: Tensor) -> Tensor:
        return linear.requantised(V).weight.to(W.dtype)

    pair, rest = loftq(W, min(rank, *W.shape), 1.0, round_trip, steps)
    return linear.requantised(rest), pair


def require_way(into: str, rank: int | None = None, steps: int | None = None) -> None:
    """Raises: UserError for a way to merge that there is none of, or an option that is not of this one."""
    _correction(into, rank, steps)


def _correction(into: str, rank: int | None, steps: int | None) -> Correction | None:
    """None to dequantise. Raises: UserError for another way, or an option that is not of this one."""
    if into not in get_args(Into):
        raise UserError(
            f"'{into}' is no way to merge into codes.", nearest=nearest(into, get_args(Into)) or get_args(Into)
        )
    for name, value in (("rank", rank), ("steps", steps)):
        if value is not None and into != "correct":
            raise UserError(f"{name}={value} is of a correction, and into is '{into}'.", next="into='correct'")
        if value is not None and value < 1:
            raise UserError(f"{name}={value} corrects nothing.", next=f"{name}=1 or more, or into='requantise'")
    if into == "dequantise":
        return None
    return Correction(0, 1) if into == "requantise" else Correction(rank or RANK, steps or 1)


def _refuse_unmergeable(deltas: dict[str, Delta]) -> None:
    for path, delta in deltas.items():
        if not isinstance(delta, WeightDelta):
            raise UserError(
                f"the delta on '{path}' depends on the input, so it has no merged weight.",
                found=type(delta).__name__,
                next="keep it beside its base: deltalab.save_adapter, and deltalab.load_adapter where it is used",
            )


def _has_codes(where: Place) -> bool:
    return where.kind == "linear" and is_quantised(where.module)


def _without_deltas(model: nn.Module, state: Adaptation, deltas: dict[str, Delta]) -> nn.Module:
    """A copy of the model that shares its tensors, own parameters that train apart, with nothing attached."""
    memo: dict[int, Any] = {id(delta): None for delta in deltas.values()} | {id(state): None}
    for name, parameter in model.named_parameters():
        if ".delta." in name:
            continue
        if type(parameter) is not nn.Parameter:  # of another library, with more in it than values
            memo[id(parameter)] = parameter
        else:
            value = parameter.detach()
            memo[id(parameter)] = nn.Parameter(
                value.clone() if name in state.start else value,
                requires_grad=state.was_trainable.get(name, parameter.requires_grad),
            )
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    plain: nn.Module = copied(model, memo)
    if "_hf_hook" not in plain.__dict__:  # a trainer's own forward, of which a copy still runs the adapted model
        plain.__dict__.pop("forward", None)
    for module in adapted_modules(plain):
        detach(module)
    unfuse(plain)
    return plain


@torch.no_grad()
def _merge_bias(where: Place, delta: Delta) -> None:
    bias = where.module._parameters.get("bias") if where.kind == "linear" else None
    if bias is not None and isinstance(delta, WeightDelta):
        changed = delta.adapted_bias(bias)
        if changed is not bias:
            where.module.register_parameter("bias", nn.Parameter(changed, requires_grad=bias.requires_grad))
