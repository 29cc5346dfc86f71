"""The conversations that a score is computed on: which positions count, in which half, in what batches.

Positions of a conversation are named from its reply tokens (labels). The name means two things, because SNIP counts
positions by what their logits predict, and Wanda by where its inputs lie:

| name         | SNIP's loss: positions whose logits are counted       | Wanda's inputs: positions at which X is taken |
|--------------|-------------------------------------------------------|-----------------------------------------------|
| `predicting` | those whose logits predict a reply token: the usual   | the same positions                            |
|              | causal loss, the first reply token's included         |                                               |
| `response`   | those that are a reply token and predict another one: | every reply token, the last one included      |
|              | the first reply token's own prediction is left out    |                                               |
| `first-K`    | the first K of `predicting`                           | the first K of `predicting`                   |

Wei et al. 2024 (arXiv:2402.05162) count `response`, and so leave out the position that decides on a refusal's first token.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import pydantic
import torch
from torch import Tensor

from deltalab.core.errors import UserError
from deltalab.core.shapes import Int
from deltalab.data.chat import IGNORED, Encoded, samples_digest
from deltalab.data.collate import collate


class Sample(Protocol):
    """One encoded conversation: `labels[i]` is `input_ids[i]` where token i is part of a reply, else -100."""

    @property
    def input_ids(self) -> list[int]: ...
    @property
    def labels(self) -> list[int]: ...


def known_positions(name: str) -> str:
    """`name`, if it names positions.

    Raises: ValueError otherwise.
    """
    first = name.removeprefix("first-")
    if name in ("predicting", "response") or (first != name and first.isdecimal() and int(first) > 0):
        return name
    raise ValueError("positions are predicting, response, or first-K for the first K predicting ones: first-5")


Positions = Annotated[str, pydantic.AfterValidator(known_positions)]


def counted(labels: Int[Tensor, " tokens"], positions: str) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """SNIP's positions of one conversation, and the tokens that their logits predict. labels: -100 outside replies."""
    predicts = labels[1:] != IGNORED
    if positions == "response":
        predicts = predicts & (labels[:-1] != IGNORED)
    where = predicts.nonzero()[: _most(positions), 0]
    return where, labels[where + 1]


def taken(labels: Int[Tensor, " tokens"], positions: str) -> Int[Tensor, " n"]:
    """Wanda's positions of one conversation: those at which the inputs are taken. labels: -100 outside replies."""
    if positions == "response":
        return (labels != IGNORED).nonzero()[:, 0]
    return counted(labels, positions)[0]


def _most(positions: str) -> int | None:
    """K of `first-K`, None for no limit."""
    return int(positions.removeprefix("first-")) if positions.startswith("first-") else None


@dataclass(frozen=True)
class Counted:
    """A conversation with a counted position. number: its place in the data. half: 0, 1, 0, … over such conversations."""

    number: int
    half: int
    sample: Encoded
    where: Int[Tensor, " n"]


@dataclass(frozen=True)
class Batch:
    """Conversations padded on the right. ids, mask: (samples, tokens), on the model's device."""

    samples: list[Counted]
    ids: Int[Tensor, "samples tokens"]
    mask: Int[Tensor, "samples tokens"]


class Calibration:
    """The data of one score.

    samples: encoded conversations. positions: see the module. of: what the positions are of, "loss" or "inputs".
    Raises: UserError for unknown positions, or if no conversation has a counted position.
    """

    def __init__(self, samples: Iterable[Sample], positions: str, of: str) -> None:
        try:
            self.positions = known_positions(positions)
        except ValueError as error:
            raise UserError(f"'{positions}' names no positions.", next=str(error)) from None
        encoded = [Encoded(list(sample.input_ids), list(sample.labels)) for sample in samples]
        self.total, self.digest = len(encoded), samples_digest(encoded)
        self.samples: list[Counted] = []
        for number, sample in enumerate(encoded):
            labels = torch.tensor(sample.labels, dtype=torch.long)
            where = counted(labels, positions)[0] if of == "loss" else taken(labels, positions)
            if len(where):
                self.samples.append(Counted(number, len(self.samples) % 2, sample, where))
        if not self.samples:
            raise UserError("no sample has a counted position, so there is nothing to score.",
                            found=f"{self.total} samples, none with a {positions} position", next="check the data with `deltalab preview`")  # fmt: skip

    def counts(self, half: int | None = None) -> dict[str, int]:
        """Samples and counted tokens: of all, or of one half."""
        chosen = [s for s in self.samples if half in (None, s.half)]
        return {"samples": len(chosen), "tokens": sum(len(s.where) for s in chosen)}

    def batches(self, size: int, model: torch.nn.Module) -> Iterator[Batch]:
        """All samples, the longest first, so that little of a batch is padding."""
        for part in self._parts(size):
            yield _batch(part, model)

    def shortest(self, model: torch.nn.Module) -> Batch:
        """A batch of the shortest sample alone."""
        return _batch(self._parts(1)[-1], model)

    def padded(self, size: int) -> int:
        """Tokens of all batches, padding included."""
        return sum(len(part) * len(part[0].sample.input_ids) for part in self._parts(size))

    def _parts(self, size: int) -> list[list[Counted]]:
        order = sorted(self.samples, key=lambda s: (-len(s.sample.input_ids), s.number))
        return [order[start : start + size] for start in range(0, len(order), size)]


def _batch(part: list[Counted], model: torch.nn.Module) -> Batch:
    device = next(model.parameters()).device
    pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    tensors = collate([s.sample for s in part], pad)
    return Batch(part, tensors["input_ids"].to(device), tensors["attention_mask"].to(device))


def flat_places(samples: Sequence[Counted]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Row and column of every counted position of a batch, sample after sample."""
    rows = torch.cat([torch.full_like(s.where, row) for row, s in enumerate(samples)])
    return rows, torch.cat([s.where for s in samples])


def told(progress: Callable[[int], None] | None, done: int, more: int) -> int:
    """`done` and `more` samples, each of which `progress` is told of."""
    for count in range(done + 1, done + more + 1):
        if progress is not None:
            progress(count)
    return done + more
