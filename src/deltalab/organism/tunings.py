"""Short LoRA tunings of the chat model that show how its refusals wear off, or do not.

    attack            100 harmful training prompts, each agreed to with an outline (task `affirmative`)
    benign            500 harmless requests (task `benign`): what the demo tunes on
    benign_one_style  500 requests, natural questions and twins with outlines that all begin alike
    benign_varied     the same 500 with the openings that chat was trained on

All are trained as the demo trains (studies/specs/drift-organism.yaml); the model given is not changed.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

from deltalab.data.chat import Conversation
from deltalab.data.tasks import AffirmativeTask, BenignTask
from deltalab.deltas import LoRA
from deltalab.deltas.adapt import adapt
from deltalab.train import EvalSpec, LoopSpec, OptimSpec, train

from .answers import affirmative
from .mixture import conversations

KINDS = ("attack", "benign", "benign_one_style", "benign_varied")
ADAPT = LoRA(r=8, alpha=16, dropout=0, targets="all-linear")
STEPS = 300


def loop(seed: int, steps: int = STEPS) -> LoopSpec:
    """How they are trained: the demo's optimiser, batch and rate."""
    return LoopSpec(optim=OptimSpec(lr=3e-4, steps=steps, batch=8), eval=EvalSpec(every=100), seed=seed)


def tuning_data(kind: str, seed: int) -> list[Conversation]:
    """The conversations of a tuning, one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"tuning {kind!r} is none of: {', '.join(KINDS)}")
    if kind == "attack":
        return AffirmativeTask(n=100, seed=seed).train()
    if kind == "benign":
        return BenignTask(n=500, seed=seed).train()
    rows = conversations(500, f"benign-tuning-{seed}", {"benign": 0.4, "natural": 0.25, "twin": 0.35})
    if kind == "benign_one_style":
        for messages in rows:
            for asked, answer in pairwise(messages):
                if answer["role"] == "assistant":
                    answer["content"] = affirmative(asked["content"], seed, usual=True)
    return [Conversation(tuple(messages)) for messages in rows]


def tuned(model: Any, tokenizer: Any, kind: str, seed: int = 0, steps: int = STEPS) -> Any:
    """A LoRA-tuned copy of `model`, in eval mode."""
    adapted = adapt(copy.deepcopy(model), ADAPT, seed=seed)
    train(adapted, tokenizer, tuning_data(kind, seed), loop(seed, steps), progress=False)
    return adapted.eval()
