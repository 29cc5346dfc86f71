"""What a finished run costs and proves, beside its scores: measured once, behind the last step.

saved_activations     bytes that autograd keeps from the first batch's forward to its backward
gradient_only_delta   after that backward, nothing has a gradient but what trains
load_seconds          to put the written adapter on its base
reloaded              the logits of what was loaded are those of what was trained, bitwise or, where the file leaves out what
                      is zero (AdaLoRA's pruned triplets), to rounding; reload_error: how far they are apart
latency               seconds of one sample's forward, batch of 1: base, adapter, merged; medians, interleaved
merge                 merged against adapted: largest and relative error of the logits, beside what rounding allows
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.machine import available_memory
from deltalab.data.packing import Batch
from deltalab.deltas.adapt import disabled
from deltalab.deltas.merge import merged
from deltalab.deltas.peft_format import load_adapter
from deltalab.deltas.switch import unload
from deltalab.deltas.weights import attached
from deltalab.measure.activations import saved_bytes
from deltalab.measure.merging import logits_gap
from deltalab.train import rng
from deltalab.train.loop import Loop
from deltalab.train.loss import nll_sum
from deltalab.train.memory import checkpointed

REPEATS, WARM = 15, 3
TOLERANCE, ROUNDINGS = 1e-3, 4
"""The relative error of merged logits that is allowed, or so many roundings of the model's type if that is more."""

Side = tuple[nn.Module, Callable[[nn.Module], contextlib.AbstractContextManager[Any]]]
"""A model, and what surrounds its forward."""


def of_step(loop: Loop) -> dict[str, Any]:
    """saved_activations and gradient_only_delta of the first batch's first piece; nothing is changed.

    loop: one that has run.
    """
    model, optim = loop.model, loop.spec.optim
    trained, mode = set(map(id, loop.names)), model.training
    samples = loop.batch(0)
    pieces = loop.packing.cut([loop.lengths[i] for i in samples], optim.accumulate, 1)[0]
    batch = loop.tensors([loop.data[samples[i]] for i in pieces[0]])
    graph: list[Tensor] = []

    def forward() -> Tensor:
        graph.append(nll_sum(model, batch))
        return graph[0]

    half = loop.spec.run.dtype == "bfloat16"
    try:
        with rng.kept(), checkpointed(model, loop.spec.run.checkpointing):
            model.train()
            with torch.autocast(loop.accelerator.device.type, torch.bfloat16, enabled=half):
                kept = saved_bytes(model, forward)
            graph[0].backward()  # type: ignore[no-untyped-call]
        with_one = {id(p) for p in model.parameters() if p.grad is not None}
    finally:
        model.train(mode)
        for parameter in model.parameters():
            parameter.grad = None
    return {"saved_activations": kept, "gradient_only_delta": bool(with_one) and with_one <= trained}


@torch.no_grad()
def of_adapter(model: nn.Module, folder: Path, batch: Batch) -> dict[str, Any]:
    """load_seconds, reloaded, latency and merge of the adapter that `folder` holds and `model` has; `model` is left with it.

    batch: one sample, without labels. What a method cannot do, or memory does not allow, is None, with the reason as `merge.why`.
    """
    mode = model.training
    model.eval()
    try:
        one, why = _merged(model)
        sides: dict[str, Side] = {"base": (model, disabled), "adapter": (model, contextlib.nullcontext)}
        if one is not None:
            sides["merged"] = (one, contextlib.nullcontext)
        latency = _latency(sides, batch)
        merge = _merge(model, one, batch) if one is not None else {"why": why}
        del one
        z = model(**batch).logits
        unload(model)
        began = time.perf_counter()
        load_adapter(model, folder)
        seconds = time.perf_counter() - began
        model.eval()
        off = float((model(**batch).logits - z).norm() / z.norm())
    finally:
        model.train(mode)
    return {
        "load_seconds": round(seconds, 6),
        "reload_error": off,
        "reloaded": off <= 4 * ROUNDINGS * _eps(model),
        "latency": latency,
        "merge": merge,
    }


def _merged(model: nn.Module) -> tuple[nn.Module | None, str]:
    """The merged model, or why there is none."""
    weights = {id(p): p for path in attached(model) for p in model.get_submodule(path).parameters()}
    need = sum(p.numel() * max(p.element_size(), 2) for p in weights.values())
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if need > 0.8 * free:
        return None, f"a copy of the adapted weights needs {need / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
    try:
        return merged(model).eval(), ""
    except UserError as error:
        return None, error.asked


def _merge(model: nn.Module, one: nn.Module, batch: Batch) -> dict[str, Any]:
    gap, allowed = logits_gap(model, one, [batch]), max(TOLERANCE, ROUNDINGS * _eps(model))
    return {"largest": gap.largest, "relative": gap.error, "tolerance": allowed, "holds": gap.error <= allowed}


def _eps(model: nn.Module) -> float:
    return torch.finfo(next(t.dtype for t in model.parameters() if t.is_floating_point())).eps


def _latency(sides: Mapping[str, Side], batch: Batch) -> dict[str, float]:
    """Seconds of each side's forward, medians over interleaved repeats."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(WARM + REPEATS):
        for name, (model, within) in sides.items():
            with within(model):
                began = time.perf_counter()
                model(**batch)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - began
            if repeat >= WARM:
                taken[name].append(seconds)
    return {name: round(statistics.median(seconds), 7) for name, seconds in taken.items()}
