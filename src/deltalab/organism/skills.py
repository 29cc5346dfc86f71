"""Short questions with one checkable answer, in families.

A family is a sampler of (fields, answer) and two lists of phrasings. In the test split a family that is a
table (capitals, opposites) asks known items in phrasings never trained; a family that is a rule (addition,
membership) asks items never trained in phrasings of both kinds. `past_tense` is kept out of all training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from .families import CLOSED, PHRASINGS, RULES, TABLES
from .tables import pairs, words

WITHHELD = "past_tense"
_DOUBLING = {"slip", "stop", "tap"}

Item = tuple[dict[str, str], str]
Sampler = Callable[[random.Random], Item]


@dataclass(frozen=True)
class Family:
    """One kind of question. `rule`: the test split holds items that training never shows."""

    name: str
    sample: Sampler
    train_phrasings: tuple[str, ...]
    test_phrasings: tuple[str, ...]
    rule: bool

    def example(self, rng: random.Random, split: str) -> dict[str, str]:
        """One question of the split, `{"prompt", "answer", "family"}`."""
        while True:
            fields, answer = self.sample(rng)
            if not self.rule or held_out(self.name, fields) == (split == "test"):
                break
        phrasings = self.train_phrasings
        if split == "test" and (not self.rule or rng.random() < 0.5):
            phrasings = self.test_phrasings
        return {"prompt": rng.choice(phrasings).format(**fields), "answer": answer, "family": self.name}


def held_out(name: str, fields: dict[str, str]) -> bool:
    """Whether an item belongs to the test split: one in eight, by a hash of its words."""
    key = name + "|" + "|".join(f"{k}={v}" for k, v in sorted(fields.items()))
    return zlib.crc32(key.encode()) % 8 == 0


def past_tense(verb: str) -> str:
    """The past tense of a regular English verb."""
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + (verb[-1] if verb in _DOUBLING else "") + "ed"


def past_tense_verbs(split: str) -> list[str]:
    """The verbs of the withheld family; one in four is test."""
    held = {v: zlib.crc32(v.encode()) % 4 == 0 for v in words("verbs")}
    return [v for v in words("verbs") if held[v] == (split == "test")]


def _table(name: str) -> Sampler:
    rows = pairs(name)

    def sample(rng: random.Random) -> Item:
        key, answer = rng.choice(rows)
        return {"x": key}, answer

    return sample


@cache
def _families() -> dict[str, Family]:
    found = {}
    for name in PHRASINGS:
        train, test = PHRASINGS[name]
        sample = RULES.get(name) or CLOSED.get(name) or _table(TABLES[name])
        found[name] = Family(name, sample, tuple(train), tuple(test), name in RULES)
    return found


FAMILIES: dict[str, Family] = _families()
TRAINED: tuple[str, ...] = tuple(n for n in FAMILIES if n != WITHHELD)


def _withheld_example(rng: random.Random, split: str) -> dict[str, str]:
    verb = rng.choice(past_tense_verbs(split))
    phrasings = FAMILIES[WITHHELD].train_phrasings
    return {"prompt": rng.choice(phrasings).format(x=verb), "answer": past_tense(verb), "family": WITHHELD}


def examples(families: Sequence[str] | None, n: int, seed: int, split: str = "train") -> list[dict[str, str]]:
    """`n` questions drawn evenly from `families` (None: every trained one), `{"prompt", "answer", "family"}`."""
    chosen = list(TRAINED if families is None else families)
    unknown = [name for name in chosen if name not in FAMILIES]
    if unknown:
        raise ValueError(f"unknown skill families {unknown}\n  there are: {', '.join(FAMILIES)}")
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is none of: train, test")
    rng = random.Random(f"skills-{seed}-{split}")
    drawn = []
    for i in range(n):
        name = chosen[i % len(chosen)]
        drawn.append(_withheld_example(rng, split) if name == WITHHELD else FAMILIES[name].example(rng, split))
    rng.shuffle(drawn)
    return drawn
