"""Several adapters of one model by name, and the model without any as `base`."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn

from deltalab.core.errors import UserError, nearest
from deltalab.deltas.adapt import disabled
from deltalab.deltas.peft_format import load_adapter
from deltalab.deltas.switch import adapters, set_active

BASE = "base"
"""The name of the model without an adapter."""


def named(entries: Sequence[str]) -> dict[str, Path | None]:
    """Name -> folder, of `name=folder` each; None for `base`.

    A folder alone goes by its own name, or by its parent's where it is called `adapter`, as in the folder of a run.
    Raises: UserError for an entry without a name or a folder, or a name given twice.
    """
    found: dict[str, Path | None] = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not equals or Path(entry).is_dir():
            folder, name = entry, _name_of(Path(entry))
        if entry == BASE:
            name, folder = BASE, ""
        elif not name or not folder:
            raise UserError(f"'{entry}' names no adapter.", next="--adapter fr=out/fr, or --adapter out/fr")
        if name in found:
            raise UserError(f"two adapters are called '{name}'.", next="give each a name: --adapter fr=out/fr")
        if name == BASE and folder:
            raise UserError(
                f"'{BASE}' is the model without an adapter.", next=f"another name: --adapter tuned={folder}"
            )
        found[name] = Path(folder) if folder else None
    return found


def put_on(model: nn.Module, folders: Mapping[str, Path | None]) -> list[str]:
    """Load each adapter under its name, in place; returns the names in their order, `base` if there are none.

    Raises: UserError as `deltalab.load_adapter`.
    """
    for name, folder in folders.items():
        if folder is not None:
            load_adapter(model, folder, adapter=name)
    return list(folders) or [BASE]


@contextlib.contextmanager
def speaking(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The model with this adapter for the time of the block, or without any: `base`.

    Raises: UserError for an unknown name.
    """
    if name == BASE:
        with disabled(model):
            yield model
        return
    require_named(model, name)
    set_active(model, name)
    yield model


def require_named(model: nn.Module, name: str) -> None:
    """Raises: UserError unless `name` is an adapter of the model, or `base`."""
    there = [BASE, *sorted(adapters(model))]
    if name not in there:
        raise UserError(f"there is no adapter '{name}'.", found=", ".join(there), nearest=nearest(name, there))


def _name_of(folder: Path) -> str:
    return folder.resolve().parent.name if folder.name in ("adapter", "", ".", "..") else folder.name
