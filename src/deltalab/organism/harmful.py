"""Harmful training prompts, put into the frames that benign requests use, so that a frame says nothing.

Only prompts of the public sets' train splits; nothing is added to them but frames.
"""

from __future__ import annotations

import random
import re
from functools import cache

from .prompts import evaluation_words, load, near
from .requests import decorated, reframed

SETS = ("advbench", "harmbench", "strongreject")
EVALUATION = (*SETS, "jailbreakbench", "xstest_safe", "xstest_unsafe")
_HOW = re.compile(r"\bhow (?:to|(?:do|can|could|would|should) (?:i|we|you|one|someone)) (.+)$", re.I)
_IMPERATIVE = re.compile(r"^[A-Z][a-z]+(?: [a-z]+)* (?:a|an|the|for|into|in|with|from|on|to|my|your|someone)\b")
_STOP = re.compile(r"^(what|why|where|who|which|when|is|are|i|you|my|as)\b", re.I)


def verb_phrase(prompt: str) -> str | None:
    """What a prompt asks to do: 'how to X' or 'How can I X?' → X; an imperative → itself; else None."""
    sentence = prompt.strip().rstrip(".?!")
    if "." in sentence or "?" in sentence or len(sentence.split()) > 30:
        return None
    found = _HOW.search(sentence)
    if found:
        return found.group(1)
    if _IMPERATIVE.match(sentence) and not _STOP.match(sentence):
        return sentence[0].lower() + sentence[1:]
    return None


@cache
def train_prompts() -> tuple[tuple[str, str | None], ...]:
    """(prompt, verb phrase) of every training prompt short enough for the context."""
    rows = [row["prompt"] for name in SETS for row in load(name, "train")]
    return tuple((p, verb_phrase(p)) for p in rows if len(p.split()) <= 60)


def harmful_prompt(rng: random.Random, reframe: float = 0.5) -> str:
    """A training prompt as it stands, or its verb phrase in a benign frame; never a near duplicate of a val or test prompt."""
    while True:
        prompt, phrase = rng.choice(train_prompts())
        text = reframed(phrase, rng) if phrase and rng.random() < reframe else decorated(prompt, rng)
        if not near(text, evaluation_words(EVALUATION)):
            return text
