"""Starts of A and B that look at the model: at the weights, at how these are quantised, or at what flows through them.

The mathematics is in `deltalab.deltas.init`; here is what it is given, and when it cannot be.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.base import Factors
from deltalab.deltas.init import Pair, eva, explained, gaussian, loftq, normal, olora, orthogonal, pissa, pissa_fast
from deltalab.deltas.lowrank import kaiming
from deltalab.deltas.moments import Moments, moments
from deltalab.deltas.site import Kind
from deltalab.deltas.sites import place
from deltalab.deltas.spec import Start

PARTS = ("pissa", "olora")
"""Starts that are a part of W, so that the change is counted from there."""
LOOKING = (*PARTS, "loftq", "eva")
PEFT_STARTS = {True: "kaiming", False: "random"} | {name: name for name in ("gaussian", "orthogonal", *LOOKING)}
"""peft's `init_lora_weights` -> what it is called here."""


def drawn(how: str, A: Tensor, B: Tensor, generator: torch.Generator, kind: Kind) -> Pair:
    """A start that looks at nothing, in the shapes of A and B; of one that looks, what is there before."""
    if how == "gaussian":
        return gaussian(A, B, generator)
    if how == "orthogonal":
        return orthogonal(A, B, generator)
    if how == "kaiming" and kind == "embedding":
        return Pair(torch.zeros_like(A), normal(B, generator))  # a column of A is one token's
    A, B = torch.zeros_like(A), torch.zeros_like(B)
    kaiming(A, generator)
    if how == "random":
        kaiming(B, generator)
    return Pair(A, B)


def require_used(how: str, svd_steps: int | None, rho: float) -> None:
    """Raises: ValueError for an option of a start that is not the one asked for."""
    if svd_steps is not None and how != "pissa":
        raise ValueError(f"svd_steps is of init='pissa', and init is '{how}'")
    if rho != 1 and how != "eva":
        raise ValueError(f"rho is of init='eva', and init is '{how}'")


def start_from_peft(config: dict[str, Any]) -> dict[str, Any]:
    """{init, svd_steps, rho} by a peft config. Raises: UserError for a start that is not here."""
    said = config.get("init_lora_weights", True)
    start = said.lower() if isinstance(said, str) else said
    steps = None
    if isinstance(start, str) and start.startswith("pissa_niter_") and start[12:].isdigit():
        start, steps = "pissa", int(start[12:])
    if start not in PEFT_STARTS:
        raise UserError(f"init_lora_weights={said!r} is not supported.", nearest=[str(name) for name in PEFT_STARTS],
                        next="convert the adapter to plain LoRA with peft first")  # fmt: skip
    rho = (config.get("eva_config") or {}).get("rho", 1.0) if start == "eva" else 1.0
    return {"init": PEFT_STARTS[start], "svd_steps": steps, "rho": float(rho)}


def looked_for(
    how: str, model: nn.Module, held: Mapping[str, Factors], start: Start, svd_steps: int | None
) -> Iterator[tuple[str, Pair]]:
    """(path, A and B) of each module, one matrix at a time. held: what the modules hold; its A is random.

    Raises: UserError if the weight is quantised already, or the start lacks what it looks at.
    """
    if how in ("eva", "loftq"):
        _linears_alone(model, held, how)
    if how == "eva":
        yield from _from_inputs(model, held, start)
        return
    for path, (A, _, s) in held.items():
        W, r = _weight(model, path, how).to(A.dtype), A.shape[-2]
        if how in PARTS:
            if how == "olora":
                pair = olora(W, r)
            else:
                pair = pissa(W, r, s) if svd_steps is None else pissa_fast(W, r, s, A, svd_steps)
            if start.quantising is not None and path in start.quantising:
                start.quantising.quantise(path, W - s * pair.B @ pair.A)
            yield path, pair
        elif start.quantising is None or path not in start.quantising:
            raise UserError(
                f"init='loftq' makes up for the error of quantising, and '{path}' is not being quantised.",
                next="deltalab.load(name, quantize='nf4', adapt=LoRA(init='loftq'))",
            )
        else:
            yield path, loftq(W, r, s, start.quantising.quantiser.round_trip)[0]


def require_same_again(how: str, model: nn.Module, paths: Iterable[str], svd_steps: int | None) -> None:
    """Raises: UserError unless the weights alone say what peft takes for the start when it loads a file."""
    if how == "loftq" or svd_steps is not None:
        raise UserError(
            f"the adapter belongs to a base that '{how}' changed when it began, and that cannot be made again.",
            next="convert it with peft to plain LoRA: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    _linears_alone(model, paths, how)
    turned = [path for path in paths if isinstance(place(model, path).module, Conv1D)]
    if turned and how == "olora":
        raise UserError(
            f"peft's OLoRA takes the weight of '{turned[0]}' transposed, which is another start.",
            next="convert it with peft to plain LoRA: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )


def shared_out(model: nn.Module, ranks: Mapping[str, int], rho: float, start: Start) -> dict[str, int]:
    """Path -> rank, their sum that of `ranks`, at most round(rho · r) of each; a module that gets none is left out.

    The ranks go to the directions with the largest share of their module's variance (Paischer et al. 2024,
    arXiv:2410.07170, section 3.3).
    """
    _linears_alone(model, ranks, "eva")
    most = {path: min(round(rho * r), *place(model, path).W.shape) for path, r in ranks.items()}
    shares = [
        (float(share), path)
        for path, seen in _seen(model, most, start)
        for share in explained(seen.scatter)[: most[path]]
    ]
    best = sorted(shares, key=lambda pair: pair[0], reverse=True)[: sum(ranks.values())]
    counts = Counter(path for _, path in best)
    return {path: counts[path] for path in ranks if counts[path]}


def _from_inputs(model: nn.Module, held: Mapping[str, Factors], start: Start) -> Iterator[tuple[str, Pair]]:
    for path, seen in _seen(model, {path: A.shape[-2] for path, (A, _, _) in held.items()}, start):
        A, B, _ = held[path]
        yield path, Pair(eva(seen.scatter, A.shape[-2]), torch.zeros_like(B))


def _seen(model: nn.Module, ranks: Mapping[str, int], start: Start) -> Iterator[tuple[str, Moments]]:
    """The moments of each module's inputs. Raises: UserError without batches, or with fewer tokens than directions."""
    if not start.calibration:
        raise UserError(
            "init='eva' starts from activations, and there are no batches to see any.",
            next="deltalab.adapt(model, spec, calibration=batches), batches of the model's inputs",
        )
    for path, seen in moments(model, {path: place(model, path).module for path in ranks}, start.calibration):
        if seen.count <= ranks[path]:
            raise UserError(
                f"init='eva' finds no {ranks[path]} directions in {seen.count} tokens, which is what reached '{path}'.",
                found=f"{len(start.calibration)} calibration batches",
                next="give more of them",
            )
        yield path, seen


def _weight(model: nn.Module, path: str, how: str) -> Float[Tensor, "*e out in"]:
    """The weight at `path`. Raises: UserError where it is quantised."""
    where = place(model, path)
    W = where.W.detach()
    if W.dtype.is_floating_point and not where.site(path).quantised:
        return W
    raise UserError(
        f"init='{how}' looks at the weight of '{path}', which is quantised already.",
        next="quantise while adapting, deltalab.load(name, quantize='nf4', adapt=...), or init='kaiming'",
    )


def _linears_alone(model: nn.Module, paths: Iterable[str], how: str) -> None:
    """Raises: UserError naming the first of `paths` that is no linear."""
    for path in paths:
        if place(model, path).kind != "linear":
            raise UserError(
                f"init='{how}' is for linears, and '{path}' is none.", next="leave it out, or another init for it"
            )
