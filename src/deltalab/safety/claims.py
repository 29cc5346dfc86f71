"""What a verdict is, the tests that it rests on, and Holm's correction over the tests of a whole study.

A verdict can come about in two ways: by a test for a change (the group drifts otherwise, a rate fell), or by a test for
sameness (it drifts alike, a rate kept). Each has its p-value in `numbers["tests"]`, and what the verdict says is decided
from these alone, so it can be decided again when they have been adjusted.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from deltalab.core.stats import holm

Asks = Literal["change", "same"]
Numbers = dict[str, Any]
SAYS = 0.2
"""An adjusted p-value above this says nothing that a sentence should repeat; it is in the numbers."""
KINDS = {"magnitude": "matched random groups", "utility": "random groups matched on the utility score"}
"""Kinds of random groups that a verdict compares with."""


class Verdict(NamedTuple):
    """outcome: in a word. sentence: what was found. numbers: what it rests on and what a figure needs, JSON."""

    outcome: str
    sentence: str
    numbers: Numbers
    name: str = ""

    def plain(self) -> dict[str, Any]:
        """JSON for a record."""
        return {"name": self.name, "outcome": self.outcome, "sentence": self.sentence, "numbers": self.numbers}


def evidence(asks: Asks, p: float | None, of: str = "") -> Numbers:
    """One test of a verdict. p: None where it cannot be made; of: which, where a verdict has several that ask the same."""
    return {"asks": asks, "of": of, "p": p, "adjusted": p}


def p_of(numbers: Mapping[str, Any], asks: Asks, of: str = "") -> float | None:
    """The adjusted p-value of a verdict's test."""
    return next((t["adjusted"] for t in numbers["tests"] if t["asks"] == asks and t["of"] == of), None)


def adjusted(all_tests: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Numbers]]:
    """The tests of several verdicts with Holm's adjusted p-values (Holm 1979): over all that ask for a change, and over all
    that ask for sameness. The chance that any claim of the one kind is false is at most α, and of the other kind too."""
    new = [[dict(t) for t in tests] for tests in all_tests]
    for asks in ("change", "same"):
        kin = [t for tests in new for t in tests if t["asks"] == asks and t["p"] is not None]
        for t, p in zip(kin, holm([t["p"] for t in kin]) if kin else [], strict=True):
            t["adjusted"] = float(p)
    return new


def decided(verdicts: Sequence[Verdict], decide: Callable[[Verdict], Verdict]) -> list[Verdict]:
    """The verdicts of one study, decided again from p-values adjusted over all of them. decide: makes one from its numbers."""
    tests = adjusted([v.numbers["tests"] for v in verdicts])
    counts = {
        asks: sum(t["asks"] == asks and t["p"] is not None for ts in tests for t in ts) for asks in ("change", "same")
    }
    return [
        decide(v._replace(numbers={**v.numbers, "tests": ts, "family": counts}))
        for v, ts in zip(verdicts, tests, strict=True)
    ]


# ---- words --------------------------------------------------------------------------------------------------------


def p_words(p: float) -> str:
    """A p-value in words: never 'p = 0.000'."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def per_cent(share: float, digits: int = 1) -> str:
    """A relative change in per cent, signed; what rounds to nothing is 0."""
    shown = f"{100 * share:+.{digits}f}".replace("-", "−")
    return f"{0:.{digits}f} %" if float(f"{100 * share:.{digits}f}") == 0 else f"{shown} %"


def seeds_words(seeds: int) -> str:
    """What the number of seeds lets one say."""
    return " One seed: how another training would come out is not measured." if seeds == 1 else f" Over {seeds} seeds."


def family_words(numbers: Mapping[str, Any]) -> str:
    """The adjusted p-values that say something, by what they ask, and over how many tests of the study; nothing if they
    were not adjusted."""
    family = numbers.get("family")
    if not family:
        return ""
    words, labels = {"change": "change", "same": "sameness"}, numbers.get("labels", {})
    parts = []
    for asks, word in words.items():
        said = [t for t in numbers["tests"] if t["asks"] == asks and t["adjusted"] is not None and t["adjusted"] < SAYS]
        shown = [p_words(t["adjusted"]) + (f" ({labels.get(t['of'], t['of'])})" if t["of"] else "") for t in said]
        if shown:
            parts.append(f"{word} {', '.join(shown)}")
    if not parts:
        return ""
    return f" Adjusted by Holm over the {max(family.values())} tests of the study: {'; '.join(parts)}."


def kind_words(kind: str) -> str:
    """A kind of random groups in words."""
    return KINDS.get(kind, f"random groups ({kind})")


def capital(text: str) -> str:
    """With a capital letter in front."""
    return text[:1].upper() + text[1:]
