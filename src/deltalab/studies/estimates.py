"""What the stages of a drift study will need, before anything runs: from the model's shape and the data's length.

Times assume 6 floating-point operations a parameter and token in training and 2 in reading (Kaplan et al. 2020,
arXiv:2001.08361), at the speed at which this machine multiplies matrices of the model's size, less what small models
lose between the multiplications. They are good to a factor of two or three, which tells minutes from days.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from deltalab.core.errors import UserError
from deltalab.data.chat import encode_all
from deltalab.deltas.base import ParameterSpec, weight_of
from deltalab.deltas.select import linears, scored_linears, select
from deltalab.models.load import BUNDLED, check_folder, load
from deltalab.studies.behaviour import questions
from deltalab.studies.drift import DriftStudySpec
from deltalab.studies.stages import Estimate, Stage
from deltalab.train.run import context_of

BYTES = 4  # of a weight: fp32, in which measures are defined
EFFICIENCY = 0.25
READING = 0.2  # of the training speed, for the one-token steps of generation


class Facts(NamedTuple):
    """parameters: of the model; scored: weights in its blocks; trained: parameters of the delta; tokens: in each data set
    as it is used; replies: tokens to be generated in one evaluation."""

    parameters: int
    scored: int
    trained: int
    tokens: dict[str, float]
    replies: int


def estimated(spec: DriftStudySpec, steps: Sequence[Stage]) -> list[Stage]:
    """The stages with their estimates; without any where the model's shape cannot be had without fetching it."""
    model, tokenizer = _shape(spec.model)
    if model is None:
        return list(steps)
    facts = _facts(spec, model, tokenizer)
    rate = EFFICIENCY * _flops(model)
    return [dataclasses.replace(step, estimate=_estimate(step.name, spec, facts, rate)) for step in steps]


def _estimate(name: str, spec: DriftStudySpec, f: Facts, rate: float) -> Estimate:
    weights = f.parameters * BYTES
    match name.partition(":")[0]:
        case "scores":
            seconds = 6 * f.parameters * (f.tokens["safety"] + f.tokens["utility"]) / rate
            return Estimate(seconds, weights + f.scored * BYTES, 2 * f.scored * BYTES)
        case "groups":
            return Estimate(None, weights + f.scored * (1 + spec.groups.nulls / 8), 5 * f.scored / 8)
        case "tune":
            measures = spec.groups.nulls / 8 + 2  # bits of each null, and the entries of one matrix at a time
            checkpoints = (spec.tune.run.keep + 1) * f.trained * 3 * BYTES
            return Estimate(
                6 * f.parameters * f.tokens["tune"] / rate,
                weights + f.trained * 4 * BYTES + f.scored * measures,
                checkpoints + f.scored,
            )
        case "evaluate":
            return Estimate(2 * f.parameters * f.replies / (READING * rate), weights, f.replies * 8)
    return Estimate()


def _facts(spec: DriftStudySpec, model: nn.Module, tokenizer: Any) -> Facts:
    trained = 0
    parameters = dict(model.named_parameters())
    modules = linears(model)
    for item in spec.tune.adapt:
        if isinstance(item, ParameterSpec):
            trained += sum(parameters[name].numel() for name in item.parameters(model))
            continue
        for path in select(model, item.targets, item.layers):
            out, in_ = weight_of(modules[path]).shape
            trained += sum(
                p.numel() for p in item.build(out, in_, dtype=torch.float32, device=torch.device("meta")).parameters()
            )
    asked = questions(spec.evaluate, spec.seed)
    replies = sum(map(len, asked.prompts.values())) * spec.evaluate.max_new_tokens + len(asked.skills) * 24
    scored = sum(m.weight.numel() for m in scored_linears(model).values())
    return Facts(sum(p.numel() for p in parameters.values()), scored, trained, _tokens(spec, model, tokenizer), replies)


def _tokens(spec: DriftStudySpec, model: nn.Module, tokenizer: Any) -> dict[str, float]:
    """Tokens that each stage reads."""
    loop = spec.tune.loop(spec.seed)
    context = context_of(model, loop)
    encoded = {name: encode_all(tokenizer, [c for task in tasks for c in task.train()], context, loop.run.too_long)
               for name, tasks in (("safety", spec.safety), ("utility", spec.utility), ("tune", spec.tune.data))}  # fmt: skip
    tune = encoded["tune"]
    optim = spec.tune.optim
    steps = optim.steps or -(-len(tune) // optim.batch) * (optim.epochs or 1)
    found = {
        name: float(sum(len(s.input_ids) for s in encoded[name][: spec.score.samples]))
        for name in ("safety", "utility")
    }
    return found | {"tune": steps * optim.batch * tune.tokens / len(tune)}


def _shape(name: str) -> tuple[Any, Any]:
    """The model without its weights (the bundled one is small enough to load), and its tokenizer; None, None if unknown.

    Raises: UserError for a folder that is no model's.
    """
    if name.split(":")[0] == BUNDLED:
        return load(name)
    folder = Path(name).expanduser()
    if folder.exists() or name.startswith((".", "/", "~")):
        check_folder(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None, None
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config), tokenizer


def _flops(model: nn.Module) -> float:
    """Operations a second in multiplying 256 rows by a matrix of the model's size."""
    out, in_ = max((weight_of(m).shape for m in scored_linears(model).values()), key=lambda shape: shape[0] * shape[1])
    if not out * in_:
        raise UserError("the model has no weights to score.")
    a, b = torch.ones(256, min(in_, 4096)), torch.ones(min(in_, 4096), min(out, 4096))
    _ = a @ b
    began = time.perf_counter()
    for _ in range(3):
        _ = a @ b
    return 3 * 2 * a.shape[0] * b.numel() / (time.perf_counter() - began)
