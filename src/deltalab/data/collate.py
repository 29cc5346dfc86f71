"""Samples to padded tensors, and the order in which an epoch sees them."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from deltalab.core.shapes import Int
from deltalab.data.chat import IGNORED, Encoded

WINDOW = 16
"""Batches that are sorted by length together: most of the padding is saved, and batches still mix."""


def collate(
    samples: Sequence[Encoded], pad_id: int, side: Literal["right", "left"] = "right"
) -> dict[str, Int[Tensor, "batch seq"]]:
    """`input_ids`, `attention_mask` and `labels`, padded to the longest sample: (batch, seq), int64.

    Of samples for a classifier `labels` are the classes, (batch,), and `token_type_ids` come with them where they have them.
    """
    length = max(len(sample.input_ids) for sample in samples)
    ids = torch.full((len(samples), length), pad_id, dtype=torch.long)
    labels = torch.full((len(samples), length), IGNORED, dtype=torch.long)
    mask = torch.zeros((len(samples), length), dtype=torch.long)
    for row, sample in enumerate(samples):
        n = len(sample.input_ids)
        place = slice(0, n) if side == "right" else slice(length - n, length)
        ids[row, place] = torch.tensor(sample.input_ids, dtype=torch.long)
        labels[row, place] = torch.tensor(sample.labels, dtype=torch.long)
        mask[row, place] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if samples[0].choice is not None:
        batch["labels"] = torch.tensor([sample.choice for sample in samples])
    if samples[0].types is not None:
        batch["token_type_ids"] = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            batch["token_type_ids"][row, mask[row] == 1] = torch.tensor(sample.types)
    return batch


def epoch_order(
    lengths: Sequence[int], batch: int, *, seed: int, epoch: int, by_length: bool = True
) -> list[list[int]]:
    """The batches of one epoch, as indices: every sample once, the last batch maybe smaller.

    by_length: near lengths together, for batches that are padded; otherwise samples as they are drawn.
    A pure function of its arguments, which is what makes a resumed run see the same data.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if not by_length:
        return [order[start : start + batch].tolist() for start in range(0, len(order), batch)]
    window = batch * WINDOW
    for start in range(0, len(order), window):
        part = order[start : start + window]
        order[start : start + window] = part[np.argsort([-lengths[i] for i in part], kind="stable")]
    batches = [[int(i) for i in order[start : start + batch]] for start in range(0, len(order), batch)]
    return [batches[i] for i in rng.permutation(len(batches))]
