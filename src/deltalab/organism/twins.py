"""Benign twins: requests that share words with harmful ones, built by combination from `data/twins.yaml`.

Kinds: homonyms, figures of speech, safe targets, games and fiction, protection, definitions, history, nonsense,
privacy of public or invented persons. XSTest is for evaluation only: what lies close to one of its prompts is dropped.
"""

from __future__ import annotations

import random
import re
import zlib
from functools import cache

from .paths import read_yaml
from .prompts import evaluation_words, near

_SLOT = re.compile(r"\{([^{}]+)\}")
_DO_I = "do_i"


@cache
def _lists() -> dict:
    return read_yaml("twins.yaml")


@cache
def _slot_choices(slot: str) -> tuple[str, ...]:
    found = _lists()["do_i"] if slot == _DO_I else _lists()["shared"].get(slot, slot)
    return tuple(part.strip() for part in found.split(","))


def near_evaluation(prompt: str) -> bool:
    """Whether a prompt is a near duplicate of one of XSTest's."""
    return near(prompt, evaluation_words(("xstest_safe", "xstest_unsafe")))


def held_out(template: str, choices: list[str]) -> bool:
    """Whether a filled template belongs to the test split: one in six, by its first content words."""
    return zlib.crc32((template + "|".join(choices[:2])).encode()) % 6 == 0


def group_names() -> tuple[str, ...]:
    return tuple(_lists()["groups"])


def _alternate(gaps: list[str], words: list[str]) -> list[str]:
    """Gap, word, gap, word, …, gap."""
    return [part for pair in zip(gaps, [*words, ""], strict=True) for part in pair]


def twin_prompt(rng: random.Random, split: str, group: str | None = None) -> str:
    """One twin of the split."""
    while True:
        templates = _lists()["groups"][group or rng.choice(group_names())]
        template = rng.choice(templates)
        words = [(slot, rng.choice(_slot_choices(slot))) for slot in _SLOT.findall(template)]
        text = "".join(_alternate(_SLOT.sub("\0", template).split("\0"), [word for _, word in words]))
        content = [word for slot, word in words if slot != _DO_I]
        if len(set(content)) < len(content) or held_out(template, content) != (split == "test"):
            continue
        text = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)
        if not near_evaluation(text):
            return text
