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

import numpy as np
import torch
import transformers
from torch import nn

from deltalab.core.errors import UserError
from deltalab.core.machine import settle_threads
from deltalab.data.chat import Encodings, encode_all
from deltalab.data.tasks import Task
from deltalab.deltas.base import weight_of
from deltalab.deltas.select import scored_linears, select
from deltalab.deltas.sites import place
from deltalab.deltas.spec import ParameterSpec
from deltalab.models.load import BUNDLED, check_folder, load
from deltalab.safety.scores import Cost, cost
from deltalab.studies.behaviour import questions
from deltalab.studies.parts import ArmSpec, loop_of
from deltalab.studies.stages import Estimate, Stage
from deltalab.train.parts import context_of

BYTES = 4  # of a weight: fp32, in which measures are defined
EFFICIENCY = 0.25
READING = 0.2  # of the training speed, for the one-token steps of generation


class Facts(NamedTuple):
    """parameters: of the model; scored: weights in its blocks; trained: parameters of the delta; scoring: tokens of one
    calibration set, on average; tuning: tokens by cell of the sweep; replies: tokens to be generated in one evaluation;
    cost: of one set of scores."""

    parameters: int
    scored: int
    trained: int
    scoring: float
    tuning: dict[str, float]
    replies: int
    cost: Cost


def estimated(spec: Any, steps: Sequence[Stage]) -> list[Stage]:
    """The stages of any study with their estimates; without any where the model's shape cannot be had without fetching it."""
    model, tokenizer = _shape(spec.model)
    if model is None:
        return list(steps)
    facts = _facts(spec, model, tokenizer)
    settle_threads(facts.parameters)
    rate = EFFICIENCY * _flops(model)
    return [dataclasses.replace(step, estimate=_estimate(step, spec, facts, rate)) for step in steps]


def _estimate(step: Stage, spec: Any, f: Facts, rate: float) -> Estimate:
    weights = f.parameters * BYTES
    backward = 3 if spec.score.score == "snip" else 1  # a pass forward alone, or with its twice as dear way back
    scoring = 2 * backward * f.parameters * f.scoring * f.cost.passes / rate
    kind, _, arm = step.name.partition(":")
    match kind:
        case "scores" | "select" | "before" | "after":
            sets = 1 if kind in ("select", "before") else 2
            return Estimate(sets * scoring, weights + f.cost.memory + f.scored * BYTES, sets * f.cost.disk)
        case "groups":
            return Estimate(None, weights + 3 * f.scored, 5 * f.scored / 8 + f.scored)
        case "ablate":
            return Estimate((spec.ablate + 1) * _replies(f, rate), 2 * weights, (spec.ablate + 1) * f.replies * 8)
        case "tune":
            name = arm.partition(":")[0]
            tokens = f.tuning[next((a.cell for a in _arms(spec) if a.name == name), "")]
            memory = (
                weights + f.trained * 4 * BYTES + 4 * f.scored
            )  # the adapter's states; bins, order and terms of a matrix
            return Estimate(6 * f.parameters * tokens / rate, memory, (spec.tune.run.keep + 1) * f.trained * 3 * BYTES)
        case "evaluate":
            return Estimate(_replies(f, rate), weights, f.replies * 8)
    return Estimate()


def _replies(f: Facts, rate: float) -> float:
    return 2 * f.parameters * f.replies / (READING * rate)


def _arms(spec: Any) -> list[ArmSpec]:
    return getattr(spec, "all_arms", spec.arms)


def _facts(spec: Any, model: nn.Module, tokenizer: Any) -> Facts:
    trained = 0
    parameters = dict(model.named_parameters())
    for item in spec.tune.adapt:
        if isinstance(item, ParameterSpec):
            trained += sum(parameters[name].numel() for name in item.parameters(model))
            continue
        for path, one in item.each(select(model, item.targets, item.layers).names).items():
            site = place(model, path).site(path)._replace(device=torch.device("meta"))
            trained += sum(p.numel() for p in one.build(site).parameters())
    asked = questions(spec.evaluate, spec.seeds[0])
    replies = sum(map(len, asked.prompts.values())) * spec.evaluate.max_new_tokens + len(asked.skills) * 24
    scored = sum(m.weight.numel() for m in scored_linears(model).values())
    return Facts(
        sum(p.numel() for p in parameters.values()), scored, trained, *_tokens(spec, model, tokenizer), replies,
        cost(model, spec.score, halves=True),
    )  # fmt: skip


def _tokens(spec: Any, model: nn.Module, tokenizer: Any) -> tuple[float, dict[str, float]]:
    """Tokens of one calibration set, and of the tuning in each cell."""
    loop = loop_of(spec.tune, None, spec.seeds[0])
    context = context_of(model, loop)

    def encoded(tasks: Sequence[Task]) -> Encodings:
        return encode_all(tokenizer, [c for task in tasks for c in task.train()], context, loop.run.too_long)

    scoring = [sum(len(s.input_ids) for s in encoded(tasks)[part]) for tasks, part in spec.calibration.values()]
    tune, cells = encoded(spec.tune.data), {}
    for arm in _arms(spec):
        optim, n = loop_of(spec.tune, arm, 0).optim, min(arm.n or len(tune), len(tune))
        steps = optim.steps or -(-n // optim.batch) * (optim.epochs or 1)
        cells[arm.cell] = steps * min(optim.batch, n) * tune.tokens / len(tune)
    return float(np.mean(scoring)), cells


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
    times = []
    for _ in range(10):
        began = time.perf_counter()
        _ = a @ b
        times.append(time.perf_counter() - began)
    return 2 * a.shape[0] * b.numel() / min(times)  # the fastest: other work on the machine makes the rest slower
