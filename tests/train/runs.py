"""A small training run that other processes can start too."""

import os
import random
import signal
from pathlib import Path

import numpy as np
import torch

from deltalab.data.chat import Conversation
from deltalab.deltas import AdaLoRA, LoRA, Train
from deltalab.deltas.adapt import adapt
from deltalab.deltas.peft_format import save_adapter, trained_state
from deltalab.train import EvalSpec, LoopSpec, OptimSpec, RunSpec, TrainResult, train
from tests.helpers import byte_tokenizer, tiny_llama

WORDS = "a quick brown fox jumps over the lazy dog and runs away from it all day long".split()


def conversations(n: int = 24, seed: int = 0) -> list[Conversation]:
    """Questions and replies of very different lengths."""
    rng = random.Random(seed)
    return [
        Conversation.of(
            " ".join(rng.choices(WORDS, k=rng.randint(1, 6))), " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
        )
        for _ in range(n)
    ]


def spec(steps: int = 12, **fields) -> LoopSpec:
    """A short run with dropout, warm-up, evaluations and checkpoints."""
    optim = OptimSpec(lr=5e-3, steps=steps, batch=4, weight_decay=0.1)
    return LoopSpec(
        **{
            "optim": optim,
            "run": RunSpec(checkpoint_every=3),
            "eval": EvalSpec(every=4, fraction=0.2),
            "seed": 7,
            **fields,
        }
    )


class Noise:
    """A probe that draws from every generator, as one may by accident."""

    name, every = "noise", 3

    def measure(self, model, step):
        random.random()
        draw = np.random.rand() + float(torch.rand(()))
        # Python's own generator is not compared: the shape checks of the tests draw from it too
        return {"draw": draw, "norm": float(sum(t.double().norm() for t in trained_state(model).values()))}


class At:
    """A probe that does something after a step."""

    name, every = "at", 1

    def __init__(self, step, do):
        self.step, self.do = step, do

    def measure(self, model, step):
        if step == self.step:
            self.do(model)
        return {}


def interrupt(model) -> None:
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def adapted(kind: str = "lora", seed: int = 0):
    """A tiny model with something to train."""
    what = {
        "lora": LoRA(r=4, alpha=8, dropout=0.2, targets="all-linear"),
        "adalora": AdaLoRA(init_r=4, target_r=2, dropout=0.2, targets="all-linear"),
        "full": Train("full"),
        "both": [LoRA(r=2, dropout=0.1), Train("norms")],
    }[kind]
    return adapt(tiny_llama(hidden=16, layers=1, mlp=24, seed=seed), what, seed=1)


def run(folder: str | Path | None, kind: str = "lora", steps: int = 12, probes=None, **fields) -> TrainResult:
    """Train; with a folder, leave the adapter there."""
    torch.set_num_threads(1)
    model = adapted(kind)
    result = train(
        model,
        byte_tokenizer(),
        conversations(),
        spec(steps, **fields),
        folder=folder,
        probes=[Noise()] if probes is None else probes,
        progress=False,
    )
    if folder is not None:
        save_adapter(model, Path(folder) / "adapter")
    return result
