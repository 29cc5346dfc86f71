"""Samples one behind the other in one row, without padding; and which samples go through the model together.

A packed row says by `position_ids`, which begin at 0 with each sample, where one ends. Attention has to stay within the
samples: transformers makes such a mask from the positions, if there is no `attention_mask`, and flash attention and ours
read the cumulative lengths. A mask of ones passed along lets each sample see those before it, without a word.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from deltalab.data.chat import IGNORED, Encoded

Batch = dict[str, Any]
"""Arguments of a model's forward beside `labels`: tensors, and the ints max_length_q and max_length_k."""
Pieces = list[list[int]]
"""Samples by number: each list is one forward pass."""


def pack(samples: Sequence[Encoded]) -> Batch:
    """One row of all samples in order: `input_ids`, `labels` and `position_ids`, (1, tokens), int64.

    Beside them, by the names that transformers has for flash attention, `cu_seq_lens_q` and `cu_seq_lens_k`: where each
    sample begins and the last one ends, (samples + 1,), int32; `max_length_q` and `max_length_k`: the longest, an int.
    Labels are as they were, but for each sample's first, which no token of its own predicts: it is -100.
    """
    there = [sample for sample in samples if sample.input_ids]
    lengths = [len(sample.input_ids) for sample in there]
    ends = np.cumsum([0, *lengths])
    positions = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
    labels = np.array([label for sample in there for label in sample.labels], np.int64)
    labels[ends[:-1]] = IGNORED
    ids = np.array([token for sample in there for token in sample.input_ids], np.int64)
    bounds, longest = torch.from_numpy(ends.astype(np.int32)), max(lengths)
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def placed(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


class PackedCollator:
    """Packs what `transformers.Trainer` gives a collator: rows with `input_ids`, and `labels` if not all tokens count.

        Trainer(model, args, PackedCollator(), data)

    A batch of `per_device_train_batch_size` rows becomes one row of their tokens. The model has to take it, which
    `deltalab.train.trial.require_packing(model)` tries. Raises: ValueError for rows whose labels are of another length.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """The packed row, without an attention mask."""
        samples = []
        for row in rows:
            ids = _plain(row["input_ids"])
            labels = _plain(row["labels"]) if row.get("labels") is not None else list(ids)
            if len(labels) != len(ids):
                raise ValueError(f"a row has {len(ids)} tokens and {len(labels)} labels")
            samples.append(Encoded(ids, labels))
        return pack(samples)


def cut(
    lengths: Sequence[int], *, packed: bool, budget: int | None = None, pieces: int = 1, processes: int = 1
) -> list[Pieces]:
    """The samples of a step, by number, as each process computes them: [process][piece][sample].

    lengths: of the samples, in tokens. budget: tokens of a piece, with its padding if it is not packed; a longer sample
    is a piece of its own. There are as few pieces as the budget allows (first-fit decreasing, or fewer), but at least
    `pieces` in each process. Every process has as many as the others, or they would wait for each other; what is left
    over is empty, and comes before the pieces with samples. A pure function of its arguments.
    """
    each = min(pieces, -(-len(lengths) // processes)) or 1
    if not packed and budget is None:
        shares = [list(range(rank, len(lengths), processes)) for rank in range(processes)]
        return [sorted(map(list, _parted(share, each)), key=bool) for share in shares]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    make = _rows if packed else _rectangles
    found = make(order, lengths, budget, each * processes, processes)
    found.sort(key=lambda piece: _size(piece, lengths, packed))
    ranks = [*range(processes), *reversed(range(processes))]  # there and back, so that the sums are near
    return [[p for i, p in enumerate(found) if ranks[i % len(ranks)] == rank] for rank in range(processes)]


def _rows(order: list[int], lengths: Sequence[int], budget: int | None, least: int, multiple: int) -> Pieces:
    """Pieces whose sums are at most the budget, as even as they come: the longest left goes where there is most room."""
    if budget is None:
        return _even(order, lengths, _multiple(least, multiple), None) or []
    alone = [[i] for i in order if lengths[i] > budget]
    rest = [i for i in order if lengths[i] <= budget]
    fitting = _first_fit(rest, lengths, budget)
    fewest = -(-sum(lengths[i] for i in rest) // budget)
    for n in range(fewest, len(fitting) + 1):  # now and then fewer than first-fit has
        wanted = _multiple(max(n + len(alone), least), multiple) - len(alone)
        if (even := _even(rest, lengths, wanted, budget)) is not None:
            return alone + even
    wanted = _multiple(max(len(fitting) + len(alone), least), multiple)
    return _more(alone + fitting, wanted)


def _first_fit(order: list[int], lengths: Sequence[int], budget: int) -> Pieces:
    """First-fit decreasing: each sample into the first piece that it fits in."""
    found: Pieces = []
    room: list[int] = []
    for i in order:
        at = next((k for k, left in enumerate(room) if left >= lengths[i]), len(room))
        if at == len(room):
            found.append([])
            room.append(budget)
        found[at].append(i)
        room[at] -= lengths[i]
    return found


def _even(order: list[int], lengths: Sequence[int], n: int, budget: int | None) -> Pieces | None:
    """n pieces, each sample into the smallest so far; None if one is over the budget then."""
    found: Pieces = [[] for _ in range(n)]
    sums = [(0, 0, k) for k in range(n)]  # a heap of (tokens, samples, piece)
    for i in order:
        tokens, inside, at = sums[0] if n else (0, 0, 0)
        if not n or (budget is not None and tokens + lengths[i] > budget):
            return None
        found[at].append(i)
        heapq.heapreplace(sums, (tokens + lengths[i], inside + 1, at))
    return found


def _rectangles(order: list[int], lengths: Sequence[int], budget: int | None, least: int, multiple: int) -> Pieces:
    """Runs of near lengths, padded to their first: as many samples each as the budget has room for."""
    assert budget is not None
    found: Pieces = []
    for i in order:
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= budget:
            found[-1].append(i)
        else:
            found.append([i])
    return _more(found, _multiple(max(len(found), least), multiple))


def _more(pieces: Pieces, n: int) -> Pieces:
    """n pieces: the largest are halved; empty ones where each is a single sample already."""
    pieces = list(pieces)
    while len(pieces) < n:
        at = max(range(len(pieces)), key=lambda k: len(pieces[k]))
        first, second = _parted(pieces[at], 2)
        pieces[at : at + 1] = [list(first), list(second)]
    return pieces


def _parted(samples: Sequence[int], n: int) -> Iterable[Sequence[int]]:
    """n runs of nearly equal length, the longer ones first; some are empty if there are fewer samples."""
    return (samples[part[0] : part[-1] + 1] if len(part) else [] for part in np.array_split(np.arange(len(samples)), n))


def _size(piece: list[int], lengths: Sequence[int], packed: bool) -> int:
    """Tokens that the model sees of a piece."""
    inside = [lengths[i] for i in piece]
    return sum(inside) if packed else len(inside) * max(inside, default=0)


def _multiple(n: int, of: int) -> int:
    return -(-max(n, 1) // of) * of


def _plain(values: Any) -> list[int]:
    return [int(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]
