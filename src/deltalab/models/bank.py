"""Many adapters on one base, for batches whose rows have different ones.

A bank sits on every linear and embedding of the model from its beginning; an adapter is then an entry of a table. The
table is never written to: `add` and `remove` put a changed copy in its place, and a run keeps the adapters that it
began with until it ends. So adapters come and go while other threads run the model. The products are in
`deltalab.deltas.bank`.
"""

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import transformers

from deltalab.core.errors import UserError, nearest
from deltalab.deltas.apart import Source, apart, twin
from deltalab.deltas.bank import Adapter, Run, distinct, entry, get_up, running, sit
from deltalab.deltas.base import Delta
from deltalab.deltas.sites import Place, places
from deltalab.deltas.stacks import Stacks
from deltalab.models.generate import Generation, Prompt, generate
from deltalab.models.load import load_tokenizer
from deltalab.quant import foreign

KEPT = 4
"""Assignments of rows, and sets of adapters, whose stacked tensors are kept to be used again; each may be a copy of the
adapters that it uses.
"""

_keys = itertools.count()


class AdapterBank:
    """Adapters by name on one base model, in eval mode; every row of a batch has one of them, or none.

    model: not adapted, on its device, in its dtype. adapters: name -> folder, adapted model, or deltas by path.
    tokenizer: for `generate`; that of the model's name or folder if not given.
    Outside of `rows` the model computes the base. `close` takes the bank off.
    Raises: UserError if the model is adapted, its modules were replaced by others' forwards, or as `add`.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, adapters: Mapping[str, Source] | None = None,
        tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    ) -> None:  # fmt: skip
        self.model, self._tokenizer, self._key = model, tokenizer, next(_keys)
        self._base = twin(model)
        foreign.hold(model)
        self._table: Mapping[str, Adapter] = {}
        self._runs: OrderedDict[tuple[Any, ...], Run] = OrderedDict()
        self._sets: OrderedDict[tuple[Adapter, ...], Stacks] = OrderedDict()
        self._open, self._closed = 0, False
        self._changing, self._running = threading.Lock(), threading.Lock()
        self._training = [module for module in model.modules() if module.training]
        self._places = sit(_fitting(model), self._key)
        model.eval()
        try:
            for name, source in (adapters or {}).items():
                self.add(name, source)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> list[str]:
        """The adapters that are there now, in the order in which they came."""
        return list(self._table)

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters' tensors. Those that a run stacks a second time are copied once more, while it is remembered."""
        return sum(adapter.nbytes for adapter in self._table.values())

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __str__(self) -> str:
        rows = [
            (a.name, ", ".join(a.kinds), ", ".join(map(str, a.ranks)), str(len(a.entries)), f"{a.nbytes:,}")
            for a in self._table.values()
        ]
        head = ("adapter", "delta", "rank", "modules", "bytes")
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows))  # fmt: skip

    def add(self, name: str, source: Source) -> None:
        """Take in an adapter: its folder, a model that it is active on (copied), or deltas by path.

        Other threads may run the model meanwhile. Raises: UserError for a name that is taken, an adapter that cannot be
        read or does not fit, and, by name, for one that acts elsewhere than on linears and embeddings or trains the
        model's own parameters, which all rows share.
        """
        with self._changing:
            self._require_open()
            if name in self._table:
                raise UserError(f"the bank has an adapter '{name}' already.", found=f"adapters: {', '.join(self._table)}",
                                next=f"bank.remove('{name}') first, or another name")  # fmt: skip
            deltas = apart(self._base, source, name)
            self._require_places(name, deltas)
            entries = {path: entry(delta, self._places[path]) for path, delta in deltas.items()}
            kinds = dict.fromkeys(type(delta).__name__.removesuffix("Delta") for delta in deltas.values())
            self._table = {**self._table, name: Adapter(name, entries, tuple(kinds))}

    def remove(self, name: str) -> None:
        """Let an adapter go. What runs with it goes on to its end, and its memory is free after that.

        Raises: UserError for an unknown name.
        """
        with self._changing:
            gone = self._adapter(name, self._table)
            self._table = {other: adapter for other, adapter in self._table.items() if other != name}
        with self._running:
            for key in [key for key in self._runs if gone in key[0]]:
                del self._runs[key]
            for them in [them for them in self._sets if gone in them]:
                del self._sets[them]

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None], *, repeat: int = 1) -> Iterator[None]:
        """Within the block, in this thread: row i of every batch has the adapter names[i], None the base.

        A block keeps the adapters that it began with, and blocks nest: the inner one counts. repeat: sequences of the
        batch for each name, side by side, as beam search makes them.
        Raises: UserError for an unknown name; within the block, for a batch of another size.
        """
        table = self._table
        with self._run(self._adapters(names, table), repeat):
            yield

    def generate(self, prompts: Sequence[Prompt], adapters: Sequence[str | None], **options: Any) -> list[Generation]:
        """Replies to prompts, in their order, each with its adapter; None is the base.

        options: of `deltalab.generate`. Raises: UserError for an unknown name, another number of names, or as that.
        """
        table = self._table
        if len(adapters) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and {len(adapters)} adapters.", next="one name, or None, for each prompt")  # fmt: skip
        if not prompts:
            return []
        given = self._adapters(adapters, table)
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model.config._name_or_path)[1]
        return generate(self.model, self._tokenizer, prompts, **options, around=lambda batch: self._run([given[i] for i in batch], 1))  # fmt: skip

    def close(self) -> None:
        """Take the bank off: bitwise the model that was loaded. A closed bank stays closed.

        Raises: UserError while `rows` blocks are open, in any thread.
        """
        with self._changing, self._running:
            if self._open:
                raise UserError("the bank is in use.", found=f"{self._open} blocks of bank.rows or bank.generate", next="close it when they have ended")  # fmt: skip
            self._closed, self._table = True, {}
            self._runs.clear()
            self._sets.clear()
            get_up(self._places, self._key)
            for module in self._training:
                module.training = True
            self._training = []

    @contextlib.contextmanager
    def _run(self, adapters: Sequence[Adapter | None], repeat: int) -> Iterator[None]:
        with self._running:
            self._require_open()
            run = self._remembered(tuple(adapters), repeat)
            self._open += 1
        try:
            with running(self._key, run):
                yield
        finally:
            with self._running:
                self._open -= 1

    def _remembered(self, adapters: tuple[Adapter | None, ...], repeat: int) -> Run:
        key, them = (adapters, repeat), distinct(adapters)
        shared = self._sets.pop(them, None) or Stacks()
        run = self._runs.pop(key, None) or Run(adapters, repeat, shared)
        if all(self._table.get(adapter.name) is adapter for adapter in them):
            self._runs[key], self._sets[them] = run, run.shared  # the latest are the last
        while len(self._runs) > KEPT:
            self._runs.popitem(last=False)
        while len(self._sets) > KEPT:
            self._sets.popitem(last=False)
        return run

    def _adapters(self, names: Sequence[str | None], table: Mapping[str, Adapter]) -> list[Adapter | None]:
        if isinstance(names, str) or not names:
            raise UserError(f"bank.rows takes a list of names, not {names!r}.", next="one name, or None, for each row: ['fr', None]")  # fmt: skip
        return [None if name is None else self._adapter(name, table) for name in names]

    def _adapter(self, name: str, table: Mapping[str, Adapter]) -> Adapter:
        self._require_open()
        if name not in table:
            raise UserError(f"the bank has no adapter '{name}'.", found=f"adapters: {', '.join(table) or 'none'}",
                            nearest=nearest(str(name), table), next=f"bank.add('{name}', folder)")  # fmt: skip
        return table[name]

    def _require_open(self) -> None:
        if self._closed:
            raise UserError("the bank is closed.", next="deltalab.AdapterBank(model, adapters) makes another")

    def _require_places(self, name: str, deltas: Mapping[str, Delta]) -> None:
        for path, delta in deltas.items():
            if path not in self._places:
                raise UserError(
                    f"adapter '{name}' acts on '{path}', where rows of a batch cannot have adapters of their own.",
                    found=f"{type(delta).__name__.removesuffix('Delta')}; a bank sits on linears and embeddings, outside of a mixture's experts",
                    next="use it alone: deltalab.load_adapter(model, folder, adapter=name), deltalab.set_active",
                )


def _fitting(model: transformers.PreTrainedModel) -> dict[str, Place]:
    """Every place where the rows of a batch are rows of the input. Single experts get the tokens that are sent to them."""
    found = {path: place for path, place in places(model).items() if place.kind in ("linear", "embedding")}
    return {path: place for path, place in found.items() if "experts" not in path.split(".")}
