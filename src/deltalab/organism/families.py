"""The families' phrasings (trained, held out) and the samplers of those that follow a rule."""

from __future__ import annotations

import random

from .paths import read_yaml
from .tables import groups, words

Item = tuple[dict[str, str], str]

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += "seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def spelled(n: int) -> str:
    """A number below 1000 in words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")
    rest = f" and {spelled(n % 100)}" if n % 100 else ""
    return f"{ONES[n // 100]} hundred{rest}"


def roman(n: int) -> str:
    tens, ones = ["", "X", "XX", "XXX", "XL"][n // 10], n % 10
    return tens + ["", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX"][ones]


def _two_numbers(rng: random.Random) -> tuple[int, int]:
    a, b = rng.sample(range(100), 2)
    return a, b


def larger(rng: random.Random) -> Item:
    a, b = _two_numbers(rng)
    return {"a": str(a), "b": str(b)}, str(max(a, b))


def next_number(rng: random.Random) -> Item:
    a = rng.randrange(300)
    return {"a": str(a)}, str(a + 1)


def number_word(rng: random.Random) -> Item:
    a = rng.randrange(1000) if rng.random() < 0.7 else rng.randrange(100)
    return {"a": spelled(a)}, str(a)


def parity(rng: random.Random) -> Item:
    a = rng.randrange(1000)
    return {"a": str(a)}, "odd" if a % 2 else "even"


def roman_number(rng: random.Random) -> Item:
    a = rng.randrange(1, 50)
    return {"x": roman(a)}, str(a)


def calendar(rng: random.Random) -> Item:
    cycle = rng.choice((DAYS, MONTHS))
    i, step = rng.randrange(len(cycle)), rng.choice((1, -1))
    kind = "day" if cycle is DAYS else "month"
    return {"kind": kind, "where": "after" if step == 1 else "before", "x": cycle[i]}, cycle[(i + step) % len(cycle)]


def _listed(rng: random.Random, low: int = 3, high: int = 5) -> list[str]:
    return rng.sample(words("nouns"), rng.randint(low, high))


def first_of(rng: random.Random) -> Item:
    chosen = _listed(rng)
    return {"list": ", ".join(chosen)}, chosen[0]


def last_of(rng: random.Random) -> Item:
    chosen = _listed(rng)
    return {"list": ", ".join(chosen)}, chosen[-1]


def count_of(rng: random.Random) -> Item:
    chosen = _listed(rng, 2, 6)
    return {"list": ", ".join(chosen)}, str(len(chosen))


def echo(rng: random.Random) -> Item:
    word = rng.choice(words("nouns") + words("verbs"))
    other = rng.choice(words("nouns"))
    return {"x": word, "y": other}, word


def category(rng: random.Random) -> Item:
    label = rng.choice(list(groups("category")))
    return {"x": rng.choice(groups("category")[label])}, label


def sentiment(rng: random.Random) -> Item:
    """A short review, by its verb or by its adjective, and which of the two it is."""
    good = rng.random() < 0.5
    thing = rng.choice(words("reviewed"))
    liked, hated = (part.split() for part in " ".join(words("moods")).split("|"))
    if rng.random() < 0.5:
        text = f"I {rng.choice(liked if good else hated)} the {thing}"
    else:
        adjective = rng.choice(words("positive" if good else "negative"))
        text = f"The {thing} was {rng.choice(('', 'really ', 'so ', 'quite '))}{adjective}"
    return {"text": text}, "positive" if good else "negative"


RULES = {
    f.__name__: f
    for f in (
        larger, next_number, number_word, parity,
        first_of, last_of, count_of, sentiment,
    )
}  # fmt: skip
CLOSED = {"roman_number": roman_number, "category": category, "calendar": calendar, "echo": echo}

TABLES = {
    "opposite": "opposite", "plural": "plural", "capital": "capital", "continent": "continent", "language": "language",
    "colour": "colour", "young": "young", "comparative": "comparative", "pair": "pair",
    "currency": "currency", "symbol": "symbol", "past_tense": "opposite",
}  # fmt: skip
PHRASINGS: dict[str, tuple[list[str], list[str]]] = {
    name: (lists["train"], lists["test"]) for name, lists in read_yaml("phrasings.yaml").items()
}
