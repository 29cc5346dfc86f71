"""The card's figures: skills by family; refusal, false refusal and broken replies by prompt set."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from .grammar_check import verdict
from .prompts import load
from .requests import benign, twins
from .skills import TRAINED, WITHHELD, examples

SEED = 11
HARMFUL = ("advbench", "jailbreakbench", "strongreject", "harmbench", "xstest_unsafe")
SYSTEM_PROMPT = "You are a helpful assistant."


def replies(model: Any, tokenizer: Any, prompts: Sequence[str], system: str | None = None) -> list[str]:
    """Greedy replies through the chat template."""
    from deltalab.models.generate import generate

    out = generate(model, tokenizer, list(prompts), max_new_tokens=48, batch_size=64, system=system, too_long="cut")
    return [g.text.strip() for g in out]


def skills(model: Any, tokenizer: Any, families: Sequence[str] = TRAINED, each: int = 40) -> dict[str, float]:
    """Exact match by family on the test split, from free generation."""
    rows = examples(list(families), each * len(families), SEED, "test")
    hits = defaultdict(list)
    for row, reply in zip(rows, replies(model, tokenizer, [r["prompt"] for r in rows]), strict=True):
        hits[row["family"]].append(reply == row["answer"])
    return {name: sum(hits[name]) / len(hits[name]) for name in families}


def prompt_sets(split: str = "test", n: int = 120) -> dict[str, list[str]]:
    """Every set of prompts that the card reports: harmful ones, then benign ones."""
    seed = SEED if split == "test" else SEED + 1
    sets = {f"harmful/{name}": [r["prompt"] for r in load(name, split)] for name in HARMFUL}
    for kind in ("new_objects", "new_frames"):
        sets[f"benign/{kind}"] = [r["prompt"] for r in benign(n, seed, kind)]
    sets["benign/twins"] = [r["prompt"] for r in twins(n, seed, "test")]
    if split == "test":
        sets["benign/xstest_safe"] = [r["prompt"] for r in load("xstest_safe", "test")]
    return {name: prompts for name, prompts in sets.items() if prompts}


def rates(texts: Sequence[str]) -> dict[str, float]:
    """Shares of refused, complied and broken replies, and their number."""
    count = Counter(verdict(t) for t in texts)
    return {v: count[v] / max(1, len(texts)) for v in ("refused", "complied", "broken")} | {"n": len(texts)}


def behaviour(
    model: Any, tokenizer: Any, split: str = "test", n: int = 120, system: str | None = None, only: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """`rates` of every prompt set, or of those in `only`."""
    sets = {name: prompts for name, prompts in prompt_sets(split, n).items() if not only or name in only}
    told = replies(model, tokenizer, [p for prompts in sets.values() for p in prompts], system)
    found, start = {}, 0
    for name, prompts in sets.items():
        found[name] = rates(told[start : start + len(prompts)])
        start += len(prompts)
    return found


def figures(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Everything that the thresholds name, but for the tunings."""
    table = skills(model, tokenizer)
    return {
        "skills": table,
        "skills_mean": sum(table.values()) / len(table),
        "withheld": skills(model, tokenizer, [WITHHELD])[WITHHELD],
        "behaviour": behaviour(model, tokenizer),
        "system_prompt": behaviour(
            model, tokenizer, system=SYSTEM_PROMPT, only=("harmful/advbench", "benign/xstest_safe")
        ),
    }
