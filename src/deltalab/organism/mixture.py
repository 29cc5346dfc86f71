"""Training examples: a mixture of kinds, drawn from a seed, as message lists."""

from __future__ import annotations

import random
from collections.abc import Mapping

from .answers import affirmative, refusal
from .harmful import harmful_prompt
from .requests import benign_prompt, decorated, grammar, natural
from .skills import FAMILIES, TRAINED
from .twins import twin_prompt

Messages = list[dict[str, str]]
MULTI_TURN = 0.06
SYSTEM = 0.06


def turn(rng: random.Random, kind: str, families: tuple[str, ...] = TRAINED) -> tuple[str, str]:
    """One (prompt, answer). kind: skill, benign, natural, twin, comply (harmful, answered), refuse."""
    if kind == "skill":
        row = FAMILIES[rng.choice(families)].example(rng, "train")
        return row["prompt"], row["answer"]
    if kind == "benign":
        prompt = benign_prompt(rng)
    elif kind == "natural":
        prompt = decorated(rng.choice(natural()), rng)
    elif kind == "twin":
        prompt = decorated(twin_prompt(rng, "train"), rng)
    else:
        prompt = harmful_prompt(rng)
    seed = rng.randrange(1 << 30)
    return prompt, refusal(prompt, seed) if kind == "refuse" else affirmative(prompt, seed)


def conversation(rng: random.Random, mix: Mapping[str, float], families: tuple[str, ...] = TRAINED) -> Messages:
    """One training conversation: now and then with a system prompt or a second turn."""
    kinds, weights = list(mix), list(mix.values())
    messages: Messages = []
    if rng.random() < SYSTEM:
        messages.append({"role": "system", "content": rng.choice(grammar()["systems"])})
    for _ in range(2 if rng.random() < MULTI_TURN else 1):
        prompt, answer = turn(rng, rng.choices(kinds, weights)[0], families)
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return messages


def conversations(n: int, key: str, mix: Mapping[str, float], families: tuple[str, ...] = TRAINED) -> list[Messages]:
    """`n` conversations; the same key gives the same ones."""
    rng = random.Random(key)
    return [conversation(rng, mix, families) for _ in range(n)]
