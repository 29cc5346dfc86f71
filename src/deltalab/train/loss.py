"""The loss: negative log-likelihood of the counted tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltalab.core.shapes import Float
from deltalab.data.chat import IGNORED, Encoded


def nll_sum(model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
    """−Σ log p(token) over the counted tokens of a padded batch, in fp32. Position i − 1 predicts token i."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    return F.cross_entropy(logits[:, :-1][counted].float(), labels[counted], reduction="sum")


def mean_nll(
    model: nn.Module, samples: Sequence[Encoded], batch: int, tensors: Callable[[Sequence[Encoded]], dict[str, Tensor]]
) -> float:
    """The mean over all counted tokens of `samples`, `batch` of near lengths at a time. tensors: pads and places them."""
    order = sorted(samples, key=lambda sample: len(sample.input_ids))
    total, counted = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            total += float(nll_sum(model, tensors(part)).double())
            counted += sum(count(sample) for sample in part)
    return total / max(counted, 1)


def count(sample: Encoded) -> int:
    """Tokens that the loss counts: a first token has no position that predicts it."""
    return sum(label != IGNORED for label in sample.labels[1:])
