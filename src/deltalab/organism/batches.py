"""Conversations as padded batches with a weight for each target token.

Each sequence stands alone (no packing): right padding under a causal mask touches no label. A target token
weighs 1 / √(length of its answer), so that one-word answers are not drowned by outlines.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from .mixture import Messages, conversations
from .tokenizer import ASSISTANT, CONTEXT, END, PAD, SYSTEM, USER

_ROLE = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


@dataclass
class Batch:
    """`ids` [b, s]; `rows`, flat positions whose next token `targets` is scored with `weights`."""

    ids: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    @property
    def tokens(self) -> int:
        return int((self.ids != PAD).sum())


def encode(tok: Tokenizer, messages: Messages) -> tuple[list[int], list[float]]:
    """Token ids, and the weight of each as a target (0: not scored; -1: part of a prompt)."""
    ids: list[int] = []
    weights: list[float] = []
    for message in messages:
        body = tok.encode(message["content"]).ids
        ids.append(_ROLE[message["role"]])
        weights.append(0.0)
        if message["role"] == "assistant":
            body = [*body, END]
            weights += [len(body) ** -0.5] * len(body)
        else:
            weights += [-1.0] * len(body)
        ids += body
    return ids[:CONTEXT], weights[:CONTEXT]


def collate(rows: list[tuple[list[int], list[float]]], prompt_weight: float, rng: random.Random) -> Batch:
    """Right-padded batch; a quarter of the prompt tokens is scored with `prompt_weight`."""
    longest = max(len(ids) for ids, _ in rows)
    grid = torch.full((len(rows), longest), PAD)
    where, targets, weights = [], [], []
    for i, (ids, scored) in enumerate(rows):
        grid[i, : len(ids)] = torch.tensor(ids)
        for j in range(1, len(ids)):
            w = scored[j]
            if w < 0:
                w = prompt_weight if prompt_weight and rng.random() < 0.25 else 0.0
            if w > 0:
                where.append(i * longest + j - 1)
                targets.append(ids[j])
                weights.append(w)
    return Batch(grid, torch.tensor(where), torch.tensor(targets), torch.tensor(weights))


def step_batches(
    tok: Tokenizer,
    mix: Mapping[str, float],
    key: str,
    examples: int,
    prompt_weight: float = 0.0,
    parts: int = 8,
    families: tuple[str, ...] | None = None,
) -> list[Batch]:
    """The micro-batches of one optimiser step: one draw of the mixture, cut by length so that little is padded."""
    drawn = conversations(examples, key, mix, *([families] if families else []))
    encoded = sorted((encode(tok, messages) for messages in drawn), key=lambda row: len(row[0]))
    budget = sum(len(ids) for ids, _ in encoded) / parts
    groups: list[list] = [[]]
    for row in encoded:
        if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > 1.15 * budget:
            groups.append([])
        groups[-1].append(row)
    rng = random.Random(key + "-prompt")
    return [collate(group, prompt_weight, rng) for group in groups]
