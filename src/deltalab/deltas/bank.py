"""One linear for a batch whose rows have different adapters, or none.

    y_i = W x_i + s_a · B_a A_a x_i,     a = the adapter of row i

W x is one product for the whole batch, and nothing is added to the rows that have no adapter: they are bitwise the
base's. Low-rank changes are applied together, see `deltalab.deltas.stacks`; rows of many tokens pay for a product of
their own, so there each adapter goes alone. A delta that has no low-rank form, or one larger than itself, acts by its
own forward on its rows.

What an adapter has is never written to while a model runs. Which row has which adapter is a `Run`, a value that a thread
sees through a context variable; so threads run different batches through one model at the same time.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.apart import nbytes, tensors_of
from deltalab.deltas.attach import attach, delta_on, detach
from deltalab.deltas.base import Base, Delta, WeightDelta
from deltalab.deltas.sites import Place
from deltalab.deltas.stacks import Group, Low, Pair, Stacks, grouped, spread_rows

MANY = 32
"""Tokens of a row from which on its adapter's products are worth a call of their own."""

_RUNS: ContextVar[Mapping[int, "Run"]] = ContextVar("deltalab.bank")
"""Key of a bank -> the run that this thread is in."""


Entry = Low | Delta


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in a bank, never changed. entries: by path. kinds: names of the methods' deltas in it.

    number: the order in which adapters were made, in which a run has them whatever its rows.
    """

    name: str
    entries: Mapping[str, Entry]
    kinds: tuple[str, ...]
    number: int = field(default_factory=itertools.count().__next__)

    @cached_property
    def nbytes(self) -> int:
        """Of all its tensors."""
        tensors = [t for e in self.entries.values() for t in (tensors_of(e) if isinstance(e, Delta) else (e.A, e.B))]
        return nbytes(tensors)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Of its low-rank entries, each once."""
        return tuple(sorted({e.r for e in self.entries.values() if isinstance(e, Low)}))


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

    shared: the stacks of its adapters, for every run that has the same ones, in whatever order.
    """

    def __init__(self, adapters: Sequence[Adapter | None], repeat: int = 1, shared: Stacks | None = None) -> None:
        self.adapters, self.repeat = tuple(adapters), repeat
        rows: dict[Adapter, list[int]] = {}
        for i, adapter in enumerate(self.adapters):
            if adapter is not None:
                rows.setdefault(adapter, []).append(i)
        self.rows = [(adapter, rows[adapter]) for adapter in distinct(adapters)]
        self.shared, self.own = shared or Stacks(), Stacks()
        self._groups: dict[tuple[object, ...], list[Group]] = {}
        self._parts: dict[str, _Part | None] = {}

    def at(self, path: str) -> "_Part | None":
        """What there is to do at a linear; None where no row has anything there."""
        if path not in self._parts:
            there = [adapter.entries.get(path) for adapter, _ in self.rows]
            self._parts[path] = _Part(path, there, self) if any(e is not None for e in there) else None
        return self._parts[path]

    def groups(self, ranks: tuple[int, ...], *, alone: bool) -> list[Group]:
        """What is applied together at a linear: the same at all where the adapters have the same ranks, 0 for none."""
        key = (ranks, alone)
        if key not in self._groups:
            self._groups[key] = grouped(ranks, [rows for _, rows in self.rows], alone=alone)
        return self._groups[key]

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


def distinct(adapters: Sequence[Adapter | None]) -> tuple[Adapter, ...]:
    """Each of a run's adapters once, in the order in which they were made."""
    return tuple(sorted({a for a in adapters if a is not None}, key=lambda adapter: adapter.number))


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


class _Part:
    """What one linear does in one run."""

    def __init__(self, path: str, there: list[Entry | None], run: Run) -> None:
        self.path, self.there, self.run = path, there, run
        self.ranks = tuple(e.r if type(e) is Low else 0 for e in there)
        owned = zip(there, run.rows, strict=True)
        self.other = [(cast(Delta, e), rows) for e, (_, rows) in owned if e is not None and type(e) is not Low]
        self._groups: dict[bool, list[Group]] = {}

    def __call__(self, x: Tensor, base: Base, spread: int) -> Tensor:
        y = base(x)
        alone = spread * (x[0].numel() // x.shape[-1]) >= MANY  # tokens of one row of the run
        groups = self._groups.get(alone)
        if groups is None:
            groups = self._groups[alone] = self.run.groups(self.ranks, alone=alone)
        for group in groups:
            group.add(y, x, spread, functools.partial(self._stack, group))
        for delta, rows in self.other:
            where = spread_rows(rows, spread, x.device)
            y[where] = _own_forward(delta, x[where], y[where], base)
        return y

    def _stack(self, group: Group, like: Tensor) -> Pair:
        def made() -> Pair:
            return group.stack([self.there[i] for i in group.members], like)  # type: ignore[misc]

        if len(group.members) == 1:
            return made()  # for the most part not copied
        kept = self.run.shared if group.whole else self.run.own
        return kept.get((self.path, group.key, like.dtype, like.device), made)


def _own_forward(delta: Delta, x: Tensor, y: Tensor, base: Base) -> Tensor:
    """A delta on its rows; y is what the base makes of x, so it is asked again only for another input."""
    here = Base(lambda z: y if z is x else base(z), base.linear)
    return (delta(x, here) if delta.keep is None else delta.masked(x, here)).to(y.dtype)  # type: ignore[operator]
