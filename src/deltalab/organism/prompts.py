"""The harmful prompt sets, split by clusters of near duplicates.

Two prompts are near duplicates at a word Jaccard of .6 or more; clusters (connected groups) run across all sets,
so no test prompt has a near twin in training. Every cluster with a JailbreakBench or XSTest prompt is test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache

from .paths import HERE

NAMES = (
    "advbench",
    "jailbreakbench",
    "strongreject",
    "harmbench",
    "malicious_instruct",
    "xstest_safe",
    "xstest_unsafe",
)
SPLITS = ("train", "val", "test", "all")
THRESHOLD = 0.6
_WORD = re.compile(r"[a-z0-9']+")


def word_set(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.lower()))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a ∩ b| / |a ∪ b|."""
    return len(a & b) / max(1, len(a | b))


def near(text: str, others: Iterable[frozenset[str]]) -> bool:
    """Whether a text is a near duplicate of one of `others`."""
    mine = word_set(text)
    n = len(mine)
    return any(
        len(mine & other) >= THRESHOLD * len(mine | other)
        for other in others
        if THRESHOLD * n <= len(other) <= n / THRESHOLD
    )


@cache
def _rows(name: str) -> tuple[dict, ...]:
    path = HERE / "prompts" / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(
            f"prompt set {name!r} is not bundled: {path} is missing"
            "\n  MaliciousInstruct is bundled only through the StrongREJECT prompts taken from it"
        )
    return tuple(json.loads(path.read_text(encoding="utf-8")))


def load(name: str, split: str = "train") -> list[dict]:
    """The prompts of a set, `{"prompt", "source", "cluster"}`; split: train, val, test or all."""
    if name not in NAMES:
        raise ValueError(f"unknown prompt set {name!r}\n  there are: {', '.join(NAMES)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of: {', '.join(SPLITS)}")
    rows = [row for row in _rows(name) if split in ("all", row["split"])]
    return [{key: row[key] for key in ("prompt", "source", "cluster")} for row in rows]


@cache
def evaluation_words(names: tuple[str, ...]) -> tuple[frozenset[str], ...]:
    """The word sets of the val and test prompts of the sets `names`."""
    return tuple(word_set(row["prompt"]) for name in names for split in ("val", "test") for row in load(name, split))
