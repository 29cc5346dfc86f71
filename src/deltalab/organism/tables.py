"""The word tables in `data/words.yaml`, parsed."""

from __future__ import annotations

from functools import cache

from .paths import read_yaml


@cache
def _raw() -> dict[str, str]:
    return read_yaml("words.yaml")


@cache
def pairs(name: str) -> tuple[tuple[str, str], ...]:
    """(key, answer) rows of a table."""
    rows = [row.split() for row in _raw()[name].split(";") if row.strip()]
    return tuple((key.replace("_", " "), answer.replace("_", " ")) for key, answer in rows)


@cache
def words(name: str) -> tuple[str, ...]:
    """A plain list of words, in order, without repeats."""
    return tuple(dict.fromkeys(_raw()[name].split()))


@cache
def groups(name: str) -> dict[str, tuple[str, ...]]:
    """Lists by label, from "label: a b c | label: d e"."""
    found = {}
    for part in _raw()[name].split("|"):
        label, _, members = part.partition(":")
        found[label.strip()] = tuple(members.split())
    return found
