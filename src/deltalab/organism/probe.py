"""Exact match under teacher forcing: whether the answer is the model's greedy continuation, in one forward pass."""

from __future__ import annotations

from collections import defaultdict

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from .forward import hidden_states
from .skills import examples
from .tokenizer import ASSISTANT, END, PAD, USER


@torch.no_grad()
def exact(model: LlamaForCausalLM, tok: Tokenizer, rows: list[dict[str, str]], batch: int = 128) -> list[bool]:
    """For each {"prompt", "answer"}: greedy decoding would give the answer and end."""
    coded = []
    for row in rows:
        prompt = [USER, *tok.encode(row["prompt"]).ids, ASSISTANT]
        coded.append((prompt, [*tok.encode(row["answer"]).ids, END]))
    hits = []
    for start in range(0, len(coded), batch):
        group = coded[start : start + batch]
        grid = torch.full((len(group), max(len(p) + len(a) for p, a in group)), PAD)
        for i, (p, a) in enumerate(group):
            grid[i, : len(p) + len(a)] = torch.tensor(p + a)
        best = F.linear(hidden_states(model, grid), model.model.embed_tokens.weight).argmax(-1)
        for i, (p, a) in enumerate(group):
            hits.append(best[i, len(p) - 1 : len(p) - 1 + len(a)].tolist() == a)
    return hits


def skill_table(
    model: LlamaForCausalLM, tok: Tokenizer, families: list[str] | None = None, each: int = 24, seed: int = 0
) -> dict[str, float]:
    """Exact match of every family on its test split."""
    from .skills import TRAINED

    names = list(families or TRAINED)
    rows = examples(names, each * len(names), seed, "test")
    found = defaultdict(list)
    for row, hit in zip(rows, exact(model, tok, rows), strict=True):
        found[row["family"]].append(hit)
    return {name: sum(found[name]) / len(found[name]) for name in names}
