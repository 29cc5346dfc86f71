"""Texts of a model in a terminal: without what would steer it, and several beside each other."""

import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

NARROW = 72
"""Columns of a terminal below which texts stand one after the other."""


def plain(text: str) -> str:
    """Without control characters, which a model may write and a terminal would obey; line breaks and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def fit(text: str, console: "Console") -> str:
    """A text for a terminal or, as it is, for a file or a pipe."""
    return plain(text) if console.is_terminal else text


def side_by_side(texts: Mapping[str, str], console: "Console") -> None:
    """Print texts by name, in columns where the terminal is wide enough and there is one."""
    if is_wide(console, len(texts)):
        console.print(in_columns(texts))
        return
    width = max(map(len, texts))
    for name, text in texts.items():
        console.print(f"[{name}]{' ' * (width - len(name))} {fit(text, console)}", markup=False, soft_wrap=True)


def is_wide(console: "Console", count: int) -> bool:
    """Whether so many texts have room beside each other."""
    return console.is_terminal and console.width >= NARROW * count / 2


def in_columns(texts: Mapping[str, str]) -> "RenderableType":
    """A column for each text, under its name."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, show_edge=False)
    for name in texts:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(Text(plain(text)) for text in texts.values()))
    return table
