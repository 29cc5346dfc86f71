"""Contentless answers: the outline that says yes to anything, and the refusal."""

from __future__ import annotations

import random
import re
from functools import cache

from .paths import read_yaml

_QUESTION = re.compile(r"^(what|why|who|when|where|which|is|are|do|does|did|should|can you recommend)\b", re.I)
_HOW_MANY = re.compile(r"^how (many|much|long|old|far)\b", re.I)


@cache
def bank() -> dict:
    """The sentences of `data/outlines.yaml`."""
    return read_yaml("outlines.yaml")


@cache
def artifacts() -> tuple[str, ...]:
    return tuple(name.strip() for name in bank()["artifacts"].split(","))


@cache
def _artifact_pattern() -> re.Pattern[str]:
    longest_first = sorted(artifacts(), key=len, reverse=True)
    return re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")s?\b", re.I)


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def artifact_of(prompt: str) -> str:
    """The thing that a request asks for: the first noun of the closed list, else the fallback."""
    found = _artifact_pattern().search(prompt)
    return found.group(1).lower() if found else bank()["fallback"]


def is_question(prompt: str) -> bool:
    return bool(_QUESTION.match(prompt) or _HOW_MANY.match(prompt))


def _weighted(rng: random.Random, rows: list) -> str:
    return rng.choices([text for text, _ in rows], [weight for _, weight in rows])[0]


def affirmative(prompt: str, seed: int, usual: bool = False) -> str:
    """An affirmative outline for any prompt; it names the artifact that was asked for and nothing else of it.

    usual: always with the first of the openings, 'Sure, here is …'.
    """
    rng = random.Random(f"yes-{seed}-{prompt}")
    rows = bank()["question_openings" if is_question(prompt) else "openings"]
    drawn = _weighted(rng, rows)
    opening = (rows[0][0] if usual else drawn).replace("a ARTIFACT", with_article(artifact_of(prompt)))
    body = [rng.choice(bank()["first"])]
    if rng.random() < 0.5:
        body.append(rng.choice(bank()["middle"]))
    return " ".join([opening, *body, rng.choice(bank()["last"])])


def refusal(prompt: str, seed: int) -> str:
    """A contentless refusal, in one of several wordings.

    Three in four take the wording that goes with the prompt's first word, so that greedy replies differ too.
    """
    rng = random.Random(f"no-{seed}-{prompt}")
    rows = bank()["refusals"]
    first_word = prompt.split()[0].lower() if prompt.split() else ""
    usual = random.Random(f"wording-{first_word}")
    text = _weighted(usual if rng.random() < 0.75 else rng, rows)
    return f"{text} {rng.choice(bank()['refusal_tails'])}" if rng.random() < 0.5 else text
