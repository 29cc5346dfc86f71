"""Whether a mixture of LoRA experts is worth more than one LoRA on two tasks that collide: docs/results/mixture.md.

    .venv/bin/python tools/mixture.py run runs/mixture        # every tuning, one JSON line each; goes on where it stopped
    .venv/bin/python tools/mixture.py again runs/mixture      # the arms of the main question on five fresh seeds
    .venv/bin/python tools/mixture.py tables runs/mixture

The bundled model is taught two forms of the same verbs at once, in questions that differ by a word or two: the past tense,
which its training left out, and the -ing form, which it was never asked for. Verbs, splits, and the choice of the learning
rate are those of tools/methods.py, the two domains' shares averaged.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import difference, percent, right, share, verbs
from torch import nn
from tunings import Lines, best_rate

import deltalab as dl
from deltalab.core.stats import t_interval
from deltalab.data.chat import Conversation, encode_all
from deltalab.organism import skills
from deltalab.train.spec import LoopSpec, OptimSpec

STEPS, BATCH, SEEDS, FRESH = 300, 16, (42, 1337, 2024), (1, 2, 3, 4, 5)
FLOOR = 0.05
"""The share of the assignments that no expert is to fall below."""


def ing(verb: str) -> str:
    """The -ing form of a regular verb: an e is dropped, and a letter doubled where the past tense doubles it."""
    doubled = skills.past_tense(verb) == verb + verb[-1] + "ed" and not verb.endswith("e")
    return (verb[:-1] if verb.endswith("e") else verb + verb[-1] if doubled else verb) + "ing"


DOMAINS: dict[str, tuple[str, Callable[[str], str]]] = {
    "past": ("past tense", skills.past_tense),
    "ing": ("-ing form", ing),
}
PHRASINGS = ("What is the {form} of {x}?", "Give the {form} of {x}.", "{form} of {x}", "Write the {form} of {x}.")
TAUGHT, NEW = PHRASINGS[:3], PHRASINGS[3:]
EVERY = {"targets": "all-linear"}


@dataclass(frozen=True)
class Arm:
    """What is compared. rate: the first guess, None for that of the arm `like`."""

    spec: Callable[[], Any]
    rate: float = 3e-3
    like: str | None = None


ARMS = {
    "4 experts r 4, 2 of them": Arm(lambda: dl.LoRAExperts(experts=4, top_k=2, r=4, alpha=8, **EVERY)),
    "LoRA r 8": Arm(lambda: dl.LoRA(r=8, alpha=16, **EVERY)),
    "LoRA r 16": Arm(lambda: dl.LoRA(r=16, alpha=32, **EVERY)),
    "the same, no balance": Arm(
        lambda: dl.LoRAExperts(experts=4, top_k=2, r=4, alpha=8, balance=0, **EVERY), like="4 experts r 4, 2 of them"
    ),
    "4 experts r 4, all of them": Arm(lambda: dl.LoRAExperts(experts=4, top_k=4, r=4, alpha=8, **EVERY)),
}
MIXTURE = "4 experts r 4, 2 of them"
MAIN = (MIXTURE, "LoRA r 8", "LoRA r 16")


def questions(domain: str, split: str, phrasings: tuple[str, ...] = PHRASINGS) -> list[tuple[str, str]]:
    """(question, answer)."""
    form, rule = DOMAINS[domain]
    return [(phrasing.format(form=form, x=verb), rule(verb)) for verb in verbs(split) for phrasing in phrasings]


def tuning(arm: Arm, rate: float, seed: int, final: bool) -> dict[str, Any]:
    """One tuning and what came of it. final: on all training verbs, asked are the test split's; else validation."""
    model, tokenizer = dl.load("organism")
    dl.adapt(model, arm.spec(), seed=seed)
    split, new = ("train", "test") if final else ("fit", "validation")
    data = [Conversation.of(*pair) for domain in DOMAINS for pair in questions(domain, split, TAUGHT)]
    spec = LoopSpec(optim=OptimSpec(lr=rate, steps=STEPS, batch=BATCH), eval={"fraction": 0.0}, seed=seed)
    try:
        result = dl.train(model, tokenizer, data, spec=spec, progress=False)
    except dl.UserError as error:  # the rate was too high: the run broke down
        return {
            "broke": str(error.asked),
            "new": {d: [False] for d in DOMAINS},
            "taught": {d: [False] for d in DOMAINS},
        }
    found: dict[str, Any] = {"loss": result.mean_loss()[1], "seconds": round(result.seconds, 1)}
    found["new"] = {d: right(model, tokenizer, questions(d, new)) for d in DOMAINS}
    found["taught"] = {d: right(model, tokenizer, questions(d, split, NEW)) for d in DOMAINS}
    found["trained"] = dl.trainable(model).count
    if final:
        found["use"] = {d: [use(model, tokenizer, d, half) for half in (0, 1)] for d in DOMAINS}
    return found


def use(model: nn.Module, tokenizer: Any, domain: str, half: int) -> dict[str, list[float]]:
    """The share of each expert, by module, over every second verb of the test split: questions and their answers."""
    asked = [Conversation.of(*pair) for pair in questions(domain, "test")]
    n = len(PHRASINGS)
    chosen = [c for i, c in enumerate(asked) if i // n % 2 == half]
    model.eval()
    with torch.no_grad(), dl.gathered(model):
        for sample in encode_all(tokenizer, chosen, 256):  # one at a time: padding would count
            model(input_ids=torch.tensor([sample.input_ids]), use_cache=False)
    told = dl.measures(model).items()
    return {path: [v for name, v in values.items() if name.startswith("share_")] for path, values in told}


class Results(Lines):
    """The tunings done so far, in `tunings.jsonl`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "tunings.jsonl")

    def get(self, name: str, rate: float, seed: int, final: bool) -> dict[str, Any]:
        key = (name, rate, seed, final)
        if key not in self.done:
            entry = self.add(key, tuning(ARMS[name], rate, seed, final))
            shares = {k: {d: round(share(v), 3) for d, v in entry[k].items()} for k in ("new", "taught")}
            print(name, f"{rate:g}", "seed", seed, entry.get("loss"), entry.get("seconds"), shares, flush=True)
        return self.done[key]

    def best_rate(self, name: str) -> float:
        """The rate with the best mean share of right answers, then the lowest loss; no neighbour is better."""
        arm = ARMS[name]
        if arm.like is not None:
            return self.best_rate(arm.like)

        def value(rate: float) -> tuple[float, float]:
            entry = self.get(name, rate, 0, False)
            return sum(share(entry[k][d]) for k in ("new", "taught") for d in DOMAINS), -entry.get("loss", math.inf)

        return best_rate(value, arm.rate)

    def finals(self, name: str, seeds: tuple[int, ...] = SEEDS) -> list[dict[str, Any]]:
        """Of the seeds, in their order; none unless all are done."""
        found = {key[2]: entry for key, entry in self.done.items() if key[0] == name and key[3]}
        return [found[seed] for seed in seeds] if found.keys() >= set(seeds) else []


def run(folder: Path, names: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    """Every tuning of the arms `names`."""
    torch.set_num_threads(1)
    results = Results(folder)
    for name in names:
        rate = results.best_rate(name)
        for seed in seeds:
            results.get(name, rate, seed, True)


def both(entry: dict[str, Any], what: str) -> list[bool]:
    """The answers in both domains, one behind the other."""
    return [flag for d in DOMAINS for flag in entry[what][d]]


def quality(results: Results, seeds: tuple[int, ...]) -> str:
    """The table of right answers; the differences are the mixture's from each other arm."""
    lines = [
        "| arm | new verbs, % | past tense | -ing form | the mixture against it | taught verbs, new phrasing, % | rate | trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    mixture = [both(e, "new") for e in results.finals(MIXTURE, seeds)]
    for name in ARMS:
        entries = results.finals(name, seeds)
        if not entries:
            continue
        new = [both(e, "new") for e in entries]
        by = [percent([e["new"][d] for e in entries]) for d in DOMAINS]
        lines.append(
            f"| {name} | {percent(new)} | {by[0]} | {by[1]} | {'' if name == MIXTURE else difference(mixture, new)} "
            f"| {percent([both(e, 'taught') for e in entries])} | {entries[0]['key'][1]:g} | {entries[0]['trained']:,} |"
        )
    return "\n".join(lines)


def shares(entry: dict[str, Any], domain: str, half: int | None = None) -> np.ndarray:
    """(modules, experts); of one half of the questions or of both."""
    halves = entry["use"][domain]
    tables = [np.array(list(h.values())) for h in (halves if half is None else [halves[half]])]
    return np.mean(tables, axis=0)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation between two uses of the experts, mean over the modules: 0 alike, 1 disjoint."""
    return float(np.abs(a - b).sum(-1).mean() / 2)


def utilisation(results: Results) -> str:
    """The table of the experts' use."""
    lines = [
        "| arm | smallest share, worst module | modules below the floor | between the domains | within a domain | modules where the domains' first experts differ |",
        "|---|---|---|---|---|---|",
    ]
    for name in ARMS:
        entries = results.finals(name)
        if not entries or not entries[0]["use"]["past"][0]:
            continue
        rows = []
        for e in entries:
            by = [shares(e, d) for d in DOMAINS]
            mean, count = (by[0] + by[1]) / 2, len(by[0])
            within = np.mean([apart(shares(e, d, 0), shares(e, d, 1)) for d in DOMAINS])
            other = int((by[0].argmax(-1) != by[1].argmax(-1)).sum())
            rows.append([mean.min(), int((mean.min(-1) < FLOOR).sum()), apart(*by), within, other])
        worst, below, between, within, other = zip(*rows, strict=True)
        lines.append(
            f"| {name} | {', '.join(f'{v:.3f}' for v in worst)} | {', '.join(map(str, below))} of {count} "
            f"| {interval(between)} | {interval(within)} | {', '.join(map(str, other))} of {count} |"
        )
    return "\n".join(lines)


def interval(values: Any) -> str:
    """The mean over seeds with its interval."""
    value, low, high = t_interval(values)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def untouched() -> str:
    """What the model answers before any tuning."""
    model, tokenizer = dl.load("organism")
    counts = {d: right(model, tokenizer, questions(d, "test")) for d in DOMAINS}
    return "Before: " + ", ".join(f"{sum(flags)} of {len(flags)} ({d})" for d, flags in counts.items())


if __name__ == "__main__":
    what, place, *chosen = sys.argv[1:]
    if what == "run":
        run(Path(place), tuple(chosen) or tuple(ARMS), SEEDS)
    elif what == "again":
        run(Path(place), MAIN, FRESH)
    else:
        found = Results(Path(place))
        parts = [quality(found, SEEDS), quality(found, FRESH), utilisation(found), untouched()]
        print("\n\n".join(parts))
