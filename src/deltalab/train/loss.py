"""The loss: negative log-likelihood of the counted tokens."""

import inspect
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltalab.core.shapes import Float
from deltalab.data.chat import IGNORED, Encoded
from deltalab.data.packing import Batch
from deltalab.train.head import inner, nll_of_head, told

__all__ = ["count", "mean_nll", "nll_of_logits", "nll_sum", "told"]


def nll_sum(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """−Σ log p(token) over the counted tokens of a batch, padded or packed, in fp32. Position i − 1 predicts token i.

    Everything of the batch beside `labels` goes to the model's forward. Only rows that predict a counted token go
    through the output layer, wherever that can be done. Of a classifier's batch, whose labels are (batch,): of the classes.
    """
    if batch["labels"].ndim == 1:
        arguments = {name: value for name, value in batch.items() if name != "labels"}
        return F.cross_entropy(
            model(**arguments).logits.float(), batch["labels"], ignore_index=IGNORED, reduction="sum"
        )
    loss = nll_of_head(model, batch)
    return nll_of_logits(model, batch) if loss is None else loss


def nll_of_logits(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """The same of the logits that the model gives; of one row of tokens it is asked for the counted ones, if it can be."""
    arguments = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    if len(labels) == 1 and "logits_to_keep" in inspect.signature(type(inner(model)).forward).parameters:
        rows = counted[0].nonzero().squeeze(1)
        logits = model(**arguments, use_cache=False, logits_to_keep=rows).logits[0]
    else:
        logits = model(**arguments, use_cache=False).logits[:, :-1][counted]
    return F.cross_entropy(logits.float(), labels[counted], reduction="sum")


def mean_nll(
    model: nn.Module, batches: Iterable[Sequence[Encoded]], tensors: Callable[[Sequence[Encoded]], Batch]
) -> float:
    """The mean over all counted tokens of the samples. tensors: makes a batch of some samples, where the model is."""
    total, counted = 0.0, 0
    with torch.no_grad():
        for samples in batches:
            total += float(nll_sum(model, tensors(samples)).double())
            counted += sum(count(sample) for sample in samples)
    return total / max(counted, 1)


def count(sample: Encoded) -> int:
    """What the loss counts: tokens, but for the first, which has no position that predicts it; of a classifier's sample one."""
    if sample.choice is not None:
        return int(sample.choice != IGNORED)
    return sum(label != IGNORED for label in sample.labels[1:])
