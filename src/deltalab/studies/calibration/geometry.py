"""What random groups moved and scored in real trainings of the bundled organism: made once, kept in a folder.

The group whose place they take is the set difference of SNIP scores, refusals without useful answers; the random groups
are matched to it on the count and the quantiles of |W| in each matrix, as a study's are.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from deltalab.core.files import replacing
from deltalab.core.stats import Floats
from deltalab.data.chat import Encoded, encode_all
from deltalab.data.tasks import BenignTask, RefusalsTask, SkillsTask
from deltalab.deltas import any_spec
from deltalab.deltas.adapt import adapt, base_weight, delta_weight
from deltalab.deltas.merge import merged
from deltalab.deltas.peft_format import load_adapter, save_adapter
from deltalab.deltas.select import scored_linears
from deltalab.measure.drift import measured
from deltalab.measure.entry_sums import Draws, Listed
from deltalab.models.load import load
from deltalab.safety.bins import bins_of
from deltalab.safety.groups import Group, difference, top
from deltalab.safety.nulls import Nulls
from deltalab.safety.scores import snip
from deltalab.train import train
from deltalab.train.spec import EvalSpec, LoopSpec, OptimSpec

DEFAULT_ADAPT = {"method": "lora", "r": 8, "alpha": 16.0, "targets": "all-linear"}
LOOP = LoopSpec(optim=OptimSpec(lr=3e-4, steps=100, batch=8), eval=EvalSpec(fraction=0.0))
Q, P = 0.02, 0.02
CONTEXT = 512
TOGETHER = 64
"""Draws that are added up at a time."""
SPLITS, OF_SPLIT = 5, 64
"""Disjoint sets of refusals for the selection trap, and the size of each."""
Say = Callable[[str], None]


class Size(NamedTuple):
    """How much is made. seeds: tunings. groups: random groups whose drift is kept. scored: of those whose scores are, after
    `scored_seeds` of the tunings, on each of `samples` refusals. shuffled: copies of the group with rows and columns shuffled."""

    seeds: int = 24
    groups: int = 20000
    scored: int = 400
    scored_seeds: int = 16
    samples: int = 128
    shuffled: int = 2000


def tunings(folder: Path, seeds: int, say: Say) -> list[Path]:
    """One adapter a seed: LoRA of every linear on benign requests, 100 steps."""
    found = [folder / str(seed) for seed in range(seeds)]
    spec: Any = pydantic.TypeAdapter(any_spec()).validate_python(DEFAULT_ADAPT)
    data = BenignTask(n=500).train()
    for seed, place in enumerate(found):
        if place.is_dir():
            continue
        model, tokenizer = load("organism")
        adapt(model, [spec], seed=seed)
        result = train(model, tokenizer, data, LOOP.but(seed=seed), progress=False)
        save_adapter(model, place)
        say(f"tuning {seed}: {result}")
    return found


def kept(file: Path, make: Callable[[], dict[str, np.ndarray]], say: Say) -> dict[str, np.ndarray]:
    """Arrays that are made once."""
    if not file.is_file():
        arrays = {name: np.ascontiguousarray(array) for name, array in make().items()}
        with replacing(file) as tmp:
            save_file(arrays, tmp)
        say(f"made {file.name}")
    return dict(load_file(file))


def the_group(model: nn.Module, tokenizer: Any) -> Group:
    """The group whose place random ones take: the top 2 % by SNIP on refusals without the top 2 % on useful answers."""
    useful = [*SkillsTask(n=64).train(), *BenignTask(n=64).train()]
    safety = snip(model, encoded(tokenizer, RefusalsTask(limit=128).train()))
    return difference(safety, snip(model, encoded(tokenizer, useful)), P, Q, "row", "safety-only")


def encoded(tokenizer: Any, conversations: Sequence[Any]) -> list[Encoded]:
    """Conversations as samples."""
    return list(encode_all(tokenizer, conversations, CONTEXT, "skip"))


# ---- drift --------------------------------------------------------------------------------------------------------


def drift_of_groups(model: nn.Module, adapters: Sequence[Path], draws: Draws) -> dict[str, np.ndarray]:
    """`l2_per_sqrt` and `cosine_distance` of each random group in each tuning, (seeds, groups)."""
    sums = np.zeros((len(draws), 2 * len(adapters) + 2))
    changes = changes_of(model, adapters)
    for path in draws.paths:
        w = base_weight(model, path).double().flatten()
        columns = [torch.ones_like(w), w * w]
        for change in changes(path):
            d = change.double().flatten()
            columns += [d * d, w * d]
        add_up(torch.stack(columns, 1).float(), draws.indices(path), sums)
    found: dict[str, list[Floats]] = {"l2_per_sqrt": [], "cosine_distance": []}
    for seed in range(len(adapters)):
        moved = sums[:, 2 * seed + 2 : 2 * seed + 4]
        five = np.concatenate([sums[:, :2], moved, np.zeros((len(draws), 1))], 1)
        for name, values in found.items():
            values.append(measured(five)[name])
    return {name: np.stack(values) for name, values in found.items()}


def changes_of(model: nn.Module, adapters: Sequence[Path]) -> Callable[[str], Iterable[torch.Tensor]]:
    """For a path, ΔW of each tuning."""
    tuned = [tuned_model(adapter) for adapter in adapters]
    return lambda path: (delta_weight(one, path) for one in tuned)


def tuned_model(adapter: Path) -> nn.Module:
    """The organism with an adapter on it."""
    model, _ = load("organism")
    load_adapter(model, adapter)
    return model


def add_up(table: torch.Tensor, draws: Iterator[torch.Tensor], sums: np.ndarray) -> None:
    """Adds the rows of `table`, (entries, columns), that each draw names to its row of `sums`, (draws, columns).

    In fp32: a sum's rounding, 1e-6 of it, is nothing beside the per mille by which groups differ.
    """
    done = 0
    while some := list(itertools.islice(draws, TOGETHER)):
        starts = torch.tensor([0, *np.cumsum([len(index) for index in some])[:-1]])
        found = nn.functional.embedding_bag(torch.cat(some).long(), table.float(), starts, mode="sum")
        sums[done : done + len(some)] += found.double().numpy()
        done += len(some)


class Shuffled:
    """Copies of a group with the rows and the columns of each matrix shuffled: as clustered as the group, and elsewhere."""

    def __init__(self, group: Group, n: int, seed: int = 0) -> None:
        self.group, self.n, self.seed, self.paths = group, n, seed, list(group)

    def __len__(self) -> int:
        return self.n

    def indices(self, path: str) -> Iterator[torch.Tensor]:
        """Flat indices of copy after copy."""
        out, in_ = self.group.shapes[path]
        rows, columns = np.divmod(self.group.indices(path).numpy(), in_)
        for copy in range(self.n):
            rng = np.random.default_rng([self.seed + copy, self.paths.index(path)])
            yield torch.from_numpy(rng.permutation(out)[rows] * in_ + rng.permutation(in_)[columns])


# ---- scores -------------------------------------------------------------------------------------------------------


def scores_of_groups(
    adapters: Sequence[Path], group: Group, draws: Nulls, samples: Sequence[Encoded], say: Say
) -> dict[str, np.ndarray]:
    """Mean SNIP score of each random group on each sample, before and after each tuning, (1 + seeds, groups, samples).

    After: of the merged weights. Group 0 is the group itself.
    """
    base, _ = load("organism")
    out = np.zeros((1 + len(adapters), 1 + len(draws), len(samples)))
    for number in range(1 + len(adapters)):
        model = base if number == 0 else merged(tuned_model(adapters[number - 1]))
        each = [snip(model, [sample]) for sample in samples]
        for path in draws.paths:
            table = torch.stack([scores[path].float().flatten() for scores in each], 1)
            add_up(table, iter([group.indices(path)]), out[number, :1])
            add_up(table, draws.indices(path), out[number, 1:])
        say(f"scores of model {number} of {len(adapters)}")
    return {"scores": out / group.count}


def selection(
    model: nn.Module, adapters: Sequence[Path], samples: Sequence[Encoded], q: float = 0.01
) -> dict[str, np.ndarray]:
    """The mean SNIP score, on each split, of the top `q` that each split chose, and of all entries.

    chosen: (models, by which split chosen, on which split measured); every: (models, on which split measured). Model 0 is
    the organism as it was; groups are chosen on it.
    """
    splits = [list(samples[n * OF_SPLIT : (n + 1) * OF_SPLIT]) for n in range(SPLITS)]
    first = [snip(model, split) for split in splits]
    groups = [top(scores, q, "global", f"top on split {n}") for n, scores in enumerate(first)]
    chosen, every = np.zeros((1 + len(adapters), SPLITS, SPLITS)), np.zeros((1 + len(adapters), SPLITS))
    for number in range(1 + len(adapters)):
        tuned = None if number == 0 else merged(tuned_model(adapters[number - 1]))
        for at, split in enumerate(splits):
            scores = first[at] if tuned is None else snip(tuned, split)
            every[number, at] = sum(float(scores[path].double().sum()) for path in scores) / groups[0].total
            for by, group in enumerate(groups):
                total = sum(float(scores[path].double().flatten()[group.indices(path)].sum()) for path in group)
                chosen[number, by, at] = total / group.count
    return {"chosen": chosen, "every": every}


def made(folder: Path, size: Size, say: Say) -> dict[str, dict[str, np.ndarray]]:
    """All of it, from what `folder` has already: drift, drift of shuffled copies and of their nulls, scores, selection."""
    adapters = tunings(folder / "tunings", size.seeds, say)
    model, tokenizer = load("organism")
    place = folder / "group"
    if not place.is_dir():
        the_group(model, tokenizer).save(place)
    group = Group.load(place)
    weights = {path: base_weight(model, path) for path in scored_linears(model)}
    matched = Nulls(group, size.groups, 1, bins_of(weights))
    counted = Nulls(group, size.shuffled, 10**6)
    refusals = encoded(tokenizer, RefusalsTask().train())
    fresh = refusals[128 : 128 + size.samples]  # the first 128 chose the group
    return {
        "drift": kept(folder / "drift.safetensors", lambda: drift_of_groups(model, adapters, matched), say),
        "counted": kept(folder / "counted.safetensors", lambda: drift_of_groups(model, adapters[:5], counted), say),
        "shuffled": kept(folder / "shuffled.safetensors", lambda: drift_of_groups(model, adapters[:5], Shuffled(group, size.shuffled)), say),
        "itself": kept(folder / "itself.safetensors", lambda: drift_of_groups(model, adapters, Listed([group])), say),
        "scores": kept(
            folder / "scores.safetensors",
            lambda: scores_of_groups(adapters[: size.scored_seeds], group, Nulls(group, size.scored, 1, bins_of(weights)), fresh, say), say,
        ),
        "selection": kept(folder / "selection.safetensors", lambda: selection(model, adapters[:5], refusals), say),
    }  # fmt: skip
