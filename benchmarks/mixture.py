"""What a mixture of LoRA experts costs.

    .venv/bin/python -m benchmarks mixture

First the delta alone, forward and backward, two ways: every expert on every token with gates that are mostly zero, which is how it
is done, or each expert on its own tokens. Then a training step of a random Llama (hidden 512, 4 layers, 4 × 256 tokens,
deltas on every linear of the blocks), as a ratio to that with LoRA r 8.
"""

import copy
from collections.abc import Callable, Iterator

import torch
import transformers
from torch import Tensor

import deltalab as dl
from benchmarks.harness import Asked, Check, Row, apart, compared, timed
from deltalab.deltas.adapt import param_groups
from deltalab.deltas.lora_experts import mixture

CASES = [
    (512, 1024, 4, 2, 4),
    (512, 1024, 8, 2, 8),
    (512, 1024, 8, 2, 64),
    (512, 1024, 64, 2, 8),
    (512, 2048, 8, 2, 16),
]
"""Tokens, width, experts, top_k, r."""
Run = Callable[[], object]


def sorted_by_expert(x: Tensor, gates: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """What `mixture` computes, each expert on the tokens that it was sent."""
    y = x.new_zeros(len(x), len(B))
    for e in range(len(A)):
        tokens = gates[:, e].detach().nonzero()[:, 0]
        low = x[tokens] @ A[e].T * gates[tokens, e, None]
        y = y.index_add(0, tokens, low @ B[:, e].T)
    return y


def delta(tokens: int, width: int, experts: int, k: int, r: int) -> tuple[dict[str, Run], list[Check]]:
    """Forward and backward of the delta, both ways, and how far they agree."""
    x, A, B = torch.randn(tokens, width), torch.randn(experts, r, width), torch.randn(width, experts, r)
    top, chosen = torch.randn(tokens, experts).softmax(-1).topk(k)
    gates = torch.zeros(tokens, experts).scatter(1, chosen, top)
    leaves = [t.requires_grad_() for t in (x, gates, A, B)]
    checks = [Check("output", apart(mixture(*leaves), sorted_by_expert(*leaves)), 1e-5)]
    ways = {"gated": mixture, "sorted": sorted_by_expert}
    runs: dict[str, Run] = {
        name: lambda way=way: torch.autograd.grad(way(*leaves).sum(), leaves) for name, way in ways.items()
    }  # type: ignore[misc]
    return runs, checks


def training() -> dict[str, Run]:
    """A training step with each delta."""
    config = transformers.LlamaConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1376,
        vocab_size=2048, max_position_embeddings=512,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(5, 2048, (4, 256))
    every = {"targets": "all-linear"}
    specs = {
        "LoRA r 8": dl.LoRA(r=8, **every),
        "LoRA r 16": dl.LoRA(r=16, **every),
        "2 of 4 experts r 4": dl.LoRAExperts(experts=4, top_k=2, r=4, **every),
        "the same, balance 0": dl.LoRAExperts(experts=4, top_k=2, r=4, balance=0, **every),
        "4 of 4 experts r 4": dl.LoRAExperts(experts=4, top_k=4, r=4, **every),
        "2 of 8 experts r 8": dl.LoRAExperts(experts=8, top_k=2, r=8, **every),
    }

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss = model(input_ids=ids, labels=ids).loss
        extra = dl.penalty(model)
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        optimizer.zero_grad()

    steps: dict[str, Run] = {}
    for name, spec in specs.items():
        model = dl.adapt(copy.deepcopy(base), spec)
        optimizer = torch.optim.AdamW(param_groups(model, 1e-4))
        steps[name] = lambda model=model, optimizer=optimizer: step(model, optimizer)  # type: ignore[misc]
    return steps


def rows(asked: Asked) -> Iterator[Row]:
    torch.manual_seed(0)
    for case in CASES[:1] if asked.quick else CASES:
        setting = "{} tokens, width {}, {} experts, {} of them, r {}".format(*case)
        if asked.wants("mixture alone", setting):
            runs, checks = delta(*case)
            seconds = timed(runs, asked.turns(15), 1)
            yield compared("mixture alone", setting, seconds, "sorted", "gated", checks=checks)
    if asked.wants("mixture, a training step"):
        seconds = timed(training(), asked.turns(15), 1)
        for name in list(seconds)[1:]:
            yield compared("mixture, a training step", name, seconds, name, "LoRA r 8", direction="at most")
