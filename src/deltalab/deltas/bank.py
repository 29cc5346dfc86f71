"""One linear for a batch whose rows have different adapters, or none.

    y_i = W x_i + s_a · B_a A_a x_i,     a = the adapter of row i

W x is one product for the whole batch, and nothing is added to the rows that have no adapter: they are bitwise the
base's. Low-rank changes are applied together (Chen et al. 2023, Punica, arXiv:2310.18547): adapters of like rank with a
like number of rows are stacked, each padded with zeros to the largest of its stack (at most twice its size), and a
batched product with all A and one with all B do for them. Rows of many tokens pay for a product of their own, so there
each adapter goes alone and nothing is padded. A delta that has no low-rank form, or one larger than itself, acts by its
own forward on its rows.

Nothing here is written to while a model runs. Which row has which adapter is a `Run`, a value that a thread sees through
a context variable; so threads run different batches through one model at the same time.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.apart import nbytes, tensors_of
from deltalab.deltas.attach import attach, delta_on, detach
from deltalab.deltas.base import Base, Delta, WeightDelta
from deltalab.deltas.sites import Place

MANY = 32
"""Tokens of a row from which on its adapter's products are worth a call of their own."""

_RUNS: ContextVar[Mapping[int, "Run"]] = ContextVar("deltalab.bank")
"""Key of a bank -> the run that this thread is in."""


class Low(NamedTuple):
    """ΔW = B A, with A (r, in) and B, the scale in it, kept as (r, out)."""

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "r out"]

    @property
    def bucket(self) -> int:
        """Ranks that are stacked together: up to the same power of two."""
        return (len(self.A) - 1).bit_length()


Entry = Low | Delta


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in a bank, never changed. entries: by path. kinds: names of the methods' deltas in it."""

    name: str
    entries: Mapping[str, Entry]
    kinds: tuple[str, ...]

    @cached_property
    def nbytes(self) -> int:
        """Of all its tensors."""
        tensors = [t for e in self.entries.values() for t in (tensors_of(e) if isinstance(e, Delta) else e)]
        return nbytes(tensors)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Of its low-rank entries, each once."""
        return tuple(sorted({len(e.A) for e in self.entries.values() if isinstance(e, Low)}))


@torch.no_grad()
def entry(delta: Delta, where: Place) -> Entry:
    """What a bank keeps of a delta: A and B where it is low-rank and they are no larger than its own tensors."""
    if where.kind != "linear" or delta.keep is not None or not isinstance(delta, WeightDelta):
        return delta
    factors = delta.factors()
    if factors is None or nbytes([factors.A, factors.B]) > nbytes(tensors_of(delta)):
        return delta
    return Low(factors.A.detach().clone(), (factors.s * factors.B.detach()).mT.contiguous())


class Run:
    """Which adapter each row of a batch has, None for the base. repeat: sequences of the batch for each row (beams).

    It keeps the stacks that its products need, so a run that is taken up again makes none.
    """

    def __init__(self, adapters: Sequence[Adapter | None], repeat: int = 1) -> None:
        self.adapters, self.repeat = tuple(adapters), repeat
        self._parts: dict[str, _Part | None] = {}

    def at(self, path: str) -> "_Part | None":
        """What there is to do at a linear; None where no row has anything there."""
        if path not in self._parts:
            rows: dict[int, tuple[Entry, list[int]]] = {}
            for i, adapter in enumerate(self.adapters):
                found = None if adapter is None else adapter.entries.get(path)
                if found is not None:
                    rows.setdefault(id(found), (found, []))[1].append(i)
            self._parts[path] = _Part(list(rows.values())) if rows else None
        return self._parts[path]

    def spread(self, x: Tensor, path: str) -> int:
        """Consecutive rows of x for each row of the run: beams, and tokens where a model flattens them into one.

        Raises: UserError if x has another number of rows.
        """
        n, rows = len(self.adapters), x.shape[0]
        flattened = x.ndim == 2 and x.is_floating_point() and rows % n == 0
        if rows in (n, n * self.repeat) or flattened:
            return rows // n
        raise UserError(
            f"the bank was told of {n} rows, and '{path}' gets {rows}.",
            found=f"repeat={self.repeat}",
            next="bank.rows with one name, or None, for each row of the batch; repeat=the number of beams",
        )


class BankDelta(Delta):
    """A bank on one linear or embedding. It has no tensors: what it adds is its thread's run."""

    def __init__(self, bank: int, path: str) -> None:
        super().__init__()
        self.bank, self.path = bank, path

    def init(self, generator: torch.Generator) -> None:
        """There is nothing to start."""

    def forward(self, x: Tensor, base: Base) -> Float[Tensor, "*lead out"]:
        run = _RUNS.get({}).get(self.bank)
        part = None if run is None else run.at(self.path)
        if run is None or part is None:
            return base(x)
        return part(x, base, run.spread(x, self.path))


@contextlib.contextmanager
def running(bank: int, run: Run) -> Iterator[None]:
    """Within the block this thread's forwards through the bank's linears are those of `run`."""
    token = _RUNS.set({**_RUNS.get({}), bank: run})
    try:
        yield
    finally:
        _RUNS.reset(token)


def sit(where: Mapping[str, Place], bank: int) -> dict[str, Place]:
    """A bank on all these places at once: adding an adapter then touches no module. Returns those that it is on.

    Raises: UserError as `attach`; an embedding that takes no delta is passed over.
    """
    on: dict[str, Place] = {}
    try:
        for path, place in where.items():
            try:
                attach(place, BankDelta(bank, path))
                on[path] = place
            except UserError:
                if place.kind != "embedding":
                    raise
    except BaseException:
        get_up(on, bank)
        raise
    return on


def get_up(where: Mapping[str, Place], bank: int) -> None:
    """Off again, where the bank still is."""
    for place in where.values():
        delta = delta_on(place)
        if isinstance(delta, BankDelta) and delta.bank == bank:
            detach(place.module)


class _Stack(NamedTuple):
    """Changes applied together: D adapters, each on the same number of rows of x.

    rows: of x, the adapters' one after the other, padding (a row once more) among them. real: which are no padding; None
    for all. to: their places in y. A: (D, r, in), B: (D, r, out).
    """

    rows: slice | Tensor
    real: Tensor | None
    to: Tensor
    A: Tensor
    B: Tensor


class _Part:
    """What one linear does in one run."""

    def __init__(self, entries: list[tuple[Entry, list[int]]]) -> None:
        self.low = [(e, rows) for e, rows in entries if isinstance(e, Low)]
        self.other = [(e, rows) for e, rows in entries if isinstance(e, Delta)]
        self._stacks: dict[tuple[object, ...], list[_Stack]] = {}

    def __call__(self, x: Tensor, base: Base, spread: int) -> Tensor:
        y = base(x)
        if self.low:
            tokens = spread * (x[0].numel() // x.shape[-1])  # of one row of the run
            for stack in self._stacks_for(x, spread, alone=tokens >= MANY):
                _add(y, x, stack)
        for delta, rows in self.other:
            where = _spread(rows, spread, x.device)
            y[where] = _own_forward(delta, x[where], y[where], base)
        return y

    def _stacks_for(self, x: Tensor, spread: int, *, alone: bool) -> list[_Stack]:
        key = (spread, alone, x.dtype, x.device)
        if key not in self._stacks:
            buckets: dict[object, list[tuple[Low, list[int]]]] = {}
            for low, rows in self.low:
                like = id(low) if alone else (low.bucket, (len(rows) - 1).bit_length())
                buckets.setdefault(like, []).append((low, rows))
            with torch.inference_mode(False), torch.no_grad():
                self._stacks[key] = [_stack(bucket, spread, x) for bucket in buckets.values()]
        return self._stacks[key]


def _stack(bucket: list[tuple[Low, list[int]]], spread: int, x: Tensor) -> _Stack:
    """Adapters and their rows, padded with zeros and with rows that are there already, for inputs like x."""
    r, most = max(len(low.A) for low, _ in bucket), max(len(rows) for _, rows in bucket)
    padded = [row for _, rows in bucket for row in rows + [rows[0]] * (most - len(rows))]
    real = [i * most + j for i, (_, rows) in enumerate(bucket) for j in range(len(rows))]
    whole = len(real) == len(padded)
    return _Stack(
        _sliced(padded, spread, x.device),
        None if whole else _spread(real, spread, x.device),
        _spread([padded[i] for i in real], spread, x.device),
        _stacked([low.A for low, _ in bucket], r).to(x.device, x.dtype),
        _stacked([low.B for low, _ in bucket], r).to(x.device, x.dtype),
    )


def _stacked(sides: list[Tensor], r: int) -> Float[Tensor, "adapters r n"]:
    """Each with rows of zeros up to r; a single one is not copied."""
    if len(sides) == 1:
        return sides[0].unsqueeze(0)
    return torch.stack([nn.functional.pad(side, (0, 0, 0, r - len(side))) for side in sides])


def _add(y: Tensor, x: Tensor, stack: _Stack) -> None:
    """y += B A x on the rows of a stack, in place."""
    adapters, taken = len(stack.A), x[stack.rows]
    low = torch.bmm(taken.reshape(adapters, -1, x.shape[-1]), stack.A.mT)
    if isinstance(stack.rows, slice) and y.is_contiguous() and y.dtype == low.dtype:  # no padding, for it repeats rows
        y[stack.rows].view(adapters, -1, y.shape[-1]).baddbmm_(low, stack.B)
        return
    change = torch.bmm(low, stack.B).reshape(*taken.shape[:-1], -1).to(y.dtype)
    y.index_add_(0, stack.to, change if stack.real is None else change[stack.real])


def _own_forward(delta: Delta, x: Tensor, y: Tensor, base: Base) -> Tensor:
    """A delta on its rows; y is what the base makes of x, so it is asked again only for another input."""
    here = Base(lambda z: y if z is x else base(z), base.linear)
    return (delta(x, here) if delta.keep is None else delta.masked(x, here)).to(y.dtype)  # type: ignore[operator]


def _spread(rows: list[int], spread: int, device: torch.device) -> Tensor:
    """Rows of a batch that has `spread` of them for each."""
    each = torch.tensor(rows, device=device).unsqueeze(1) * spread + torch.arange(spread, device=device)
    return each.flatten()


def _sliced(rows: list[int], spread: int, device: torch.device) -> slice | Tensor:
    """The same, as a slice where they follow each other."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0] * spread, (rows[0] + len(rows)) * spread)
    return _spread(rows, spread, device)
