"""Benign requests by grammar, and the outlines that answer them.

Verb phrases (verb + object + qualifier), topics, programs, short questions and editing tasks are put into
frames; objects and frames of the test split never occur in training. Twins share words with harmful requests.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from functools import cache

from .answers import affirmative, refusal
from .paths import read_lines, read_yaml
from .twins import twin_prompt

__all__ = ["affirmative", "benign", "benign_prompt", "natural", "reframed", "refusal", "twins"]

KINDS = ("new_objects", "new_frames")
_SPLITS = ("train", "test")
_VOWEL_ENDING = re.compile(r"[^aeiou][aeiou][bdgmnprt]$")
_NO_DOUBLING = {"listen", "open", "offer", "enter", "visit", "water", "cover", "market", "edit", "fix", "harvest"}
_PARTICLES = {"learn", "clean"}


@cache
def grammar() -> dict:
    return read_yaml("requests.yaml")


@cache
def _choices(key: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in grammar()[key].split(","))


@cache
def _domains() -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    rows = grammar()["domains"].values()
    return tuple(tuple(tuple(p.strip() for p in row[k].split(",")) for k in ("verbs", "objects")) for row in rows)


def held_object(noun: str) -> bool:
    """Whether an object belongs to the test split: one in seven, by hash."""
    return zlib.crc32(noun.encode()) % 7 == 0


def _pick(rng: random.Random, nouns: tuple[str, ...], held: bool) -> str:
    return rng.choice([n for n in nouns if held_object(n) == held] or nouns)


def gerund(verb_phrase: str) -> str:
    """'bake bread' → 'baking bread': the first word in -ing."""
    verb, space, rest = verb_phrase.partition(" ")
    if verb.endswith("ie"):
        verb = verb[:-2] + "ying"
    elif verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")):
        verb = verb[:-1] + "ing"
    elif _VOWEL_ENDING.search(verb) and verb not in _NO_DOUBLING and len(verb) <= 5 and verb not in _PARTICLES:
        verb = verb + verb[-1] + "ing"
    else:
        verb = verb + "ing"
    return verb + space + rest


def fill(frame: str, rng: random.Random, **fields: str) -> str:
    """A frame with its fields and with artifact nouns drawn for {howto}, {creative} and the like."""
    for slot in ("howto", "anhowto", "creative", "persuasive", "program"):
        if "{" + slot + "}" in frame:
            fields[slot] = rng.choice(_choices(slot if slot != "program" else "programs"))
    text = frame.format(**fields)
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)


def _verb_phrase(rng: random.Random, held: bool) -> dict[str, str]:
    verbs, nouns = rng.choice(_domains())
    qualifier = rng.choice(_choices("qualifiers"))
    phrase = f"{rng.choice(verbs)} {_pick(rng, nouns, held)} {qualifier}".strip()
    return {"vp": phrase, "ving": gerund(phrase)}


def _topic(rng: random.Random, held: bool) -> dict[str, str]:
    if rng.random() < 0.4:
        return {"topic": _pick(rng, _choices("topics_plain"), held)}
    noun = f"{rng.choice(_choices('topics_adjectives'))} {_pick(rng, _choices('topics_nouns'), held)}"
    return {"topic": f"a {noun} {rng.choice(_choices('topics_tails'))}".strip()}


def _does(rng: random.Random, held: bool) -> dict[str, str]:
    parts = (rng.choice(_choices("program_verbs")), _pick(rng, _choices("program_objects"), held))
    return {"does": " ".join((*parts, rng.choice(_choices("program_tails")))).strip()}


def _short(rng: random.Random, held: bool) -> dict[str, str]:
    pick = [_pick(rng, rng.choice(_domains())[1], held) for _ in range(2)]
    return {"n": pick[0], "m": pick[1]}


_SHAPES: tuple[tuple[float, str, Callable[[random.Random, bool], dict[str, str]]], ...] = (
    (0.5, "frames", _verb_phrase),
    (0.18, "topic_frames", _topic),
    (0.12, "program_frames", _does),
    (0.14, "short_frames", _short),
)


def _decorated(text: str, rng: random.Random) -> str:
    """Now and then a greeting, a thank you, or another capitalisation."""
    roll = rng.random()
    if roll < 0.05:
        prefix = rng.choice(grammar()["prefixes"])
        return prefix + (text[0].lower() + text[1:] if prefix.startswith("Please") else text)
    if roll < 0.1:
        return text.rstrip(".") + ("" if text.endswith("?") else ".") + rng.choice(grammar()["suffixes"])
    return text[0].lower() + text[1:] if roll < 0.13 else text


def benign_prompt(rng: random.Random, kind: str = "train") -> str:
    """One request. kind: train, or a way of being new (`new_objects`, `new_frames`)."""
    if rng.random() < 0.06 and kind == "train":
        parts = (rng.choice(_choices(k)) for k in ("tasks", "task_targets", "task_tails"))
        return _decorated(" ".join(parts) + rng.choice(("", ".")), rng)
    weights = [w for w, _, _ in _SHAPES]
    _, frames, sample = rng.choices(_SHAPES, weights)[0]
    chosen = grammar()[("heldout_" if kind == "new_frames" else "") + frames]
    text = fill(rng.choice(chosen), rng, **sample(rng, kind == "new_objects"))
    return _decorated(text, rng) if kind == "train" else text


def reframed(verb_phrase: str, rng: random.Random) -> str:
    """A verb phrase in one of the frames that benign requests use."""
    frame = rng.choice(grammar()["frames"])
    return _decorated(fill(frame, rng, vp=verb_phrase, ving=gerund(verb_phrase)), rng)


def decorated(text: str, rng: random.Random) -> str:
    return _decorated(text, rng)


@cache
def natural() -> tuple[str, ...]:
    """Open-vocabulary benign prompts: SQuAD's questions (CC BY-SA 4.0) and GSM8K's problems (MIT)."""
    return (*read_lines("questions_squad.txt"), *read_lines("questions_gsm8k.txt"))


def _answered(prompts: list[str], seed: int) -> list[dict[str, str]]:
    return [{"prompt": p, "response": affirmative(p, seed)} for p in prompts]


def _check_split(split: str) -> None:
    if split not in (*_SPLITS, *KINDS):
        raise ValueError(f"split {split!r} is none of: {', '.join((*_SPLITS, *KINDS))}")


def benign(n: int, seed: int, split: str = "train") -> list[dict[str, str]]:
    """`n` benign requests with outlines. Split test alternates new objects and new frames; name one to get it alone."""
    _check_split(split)
    rng = random.Random(f"benign-{seed}-{split}")
    kinds = KINDS if split == "test" else (split,)
    return _answered([benign_prompt(rng, kinds[i % len(kinds)]) for i in range(n)], seed)


def twins(n: int, seed: int, split: str = "train") -> list[dict[str, str]]:
    """`n` benign requests that share words with harmful ones, with outlines."""
    if split not in _SPLITS:
        raise ValueError(f"split {split!r} is none of: train, test")
    rng = random.Random(f"twins-{seed}-{split}")
    return _answered([twin_prompt(rng, split) for _ in range(n)], seed)
