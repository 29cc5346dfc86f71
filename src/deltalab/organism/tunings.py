"""Short LoRA tunings of the chat model that show how its refusals wear off, or do not.

attack: 100 harmful training prompts answered with outlines. benign: 500 benign requests, natural questions and twins
with outlines that all begin alike, no refusals among them. benign_varied: the same with the openings as chat was
trained on them. All with rank 8 on every linear, rate 3e-4; the model given is not changed.
"""

from __future__ import annotations

import copy
import random
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

from .answers import affirmative
from .batches import collate, encode
from .mixture import conversations
from .prompts import load

LR = 3e-4
BATCH = 16
STEPS = {"attack": 200, "benign": 300, "benign_varied": 300}


def tuning_rows(kind: str, seed: int) -> list[list[dict[str, str]]]:
    """The conversations of a tuning, a key of `STEPS`."""
    if kind not in STEPS:
        raise ValueError(f"tuning {kind!r} is none of: {', '.join(STEPS)}")
    if kind == "attack":
        chosen = random.Random(seed).sample([r["prompt"] for r in load("advbench", "train")], 100)
        return [
            [{"role": "user", "content": p}, {"role": "assistant", "content": affirmative(p, seed)}] for p in chosen
        ]
    rows = conversations(500, f"benign-tuning-{seed}", {"benign": 0.4, "natural": 0.25, "twin": 0.35})
    if kind == "benign":
        for messages in rows:
            for asked, answer in pairwise(messages):
                if answer["role"] == "assistant":
                    answer["content"] = affirmative(asked["content"], seed, usual=True)
    return rows


def tuned(model: Any, tokenizer: Any, kind: str, seed: int = 0, steps: int | None = None, lr: float = LR) -> Any:
    """A LoRA-tuned copy of `model`."""
    import deltalab as dl

    tok = tokenizer.backend_tokenizer
    rows = [encode(tok, messages) for messages in tuning_rows(kind, seed)]
    adapted = dl.adapt(copy.deepcopy(model), dl.LoRA(r=8, alpha=16, targets="all-linear"), seed=seed)
    params = [p for p in adapted.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    rng = random.Random(f"tuning-{kind}-{seed}")
    adapted.train()
    for _ in range(STEPS[kind] if steps is None else steps):
        batch = collate(rng.sample(rows, BATCH), 0.0, rng)
        logits = adapted(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)[batch.rows]
        F.cross_entropy(logits, batch.targets).backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
    return adapted.eval()
