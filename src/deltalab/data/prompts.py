"""Prompts out of a file, and conversations out of its rows."""

from collections.abc import Sequence
from pathlib import Path

from deltalab.core.errors import UserError
from deltalab.data.files import Row, read_rows, read_text

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
CHATS = ("messages", "conversations")
ASKED: dict[str, tuple[str, ...]] = {"prompt": (), "instruction": ("input", "context"), "question": ()}
"""The column of a prompt -> the columns that may hold what it is about."""


def read_prompts(path: str | Path) -> list[str | list[dict[str, str]]]:
    """The prompts in a file, in order: each line of a .txt; each row of a .jsonl, .json, .csv or .tsv.

    A row holds `prompt`, `instruction` (with `input` or `context`) or `question`, or `messages`, whose last reply is left out.
    Raises: UserError, naming file and line, if it is missing, empty, malformed, or a prompt is blank.
    """
    if Path(path).suffix == ".txt":
        return [*lines(read_text(str(path)))]
    return [prompt_of(row) for row in read_rows(str(path))]


def lines(text: str) -> list[str]:
    """A prompt for each line that is not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def prompt_of(row: Row) -> str | list[dict[str, str]]:
    """The prompt in a row, see `read_prompts`."""
    for key in CHATS:
        if key in row.values:
            turns = turns_of(row, row.values[key])
            while turns and turns[-1]["role"] == "assistant":
                turns.pop()
            if not any(turn["role"] == "user" for turn in turns):
                raise UserError(f"{row.where}: no user's message to reply to.", found=f"{len(turns)} other messages")
            return turns
    for ask, about in ASKED.items():
        if ask in row.values:
            text = row.text(ask)
            extra = next((row.text(key) for key in about if row.values.get(key)), "")
            if not text.strip():
                raise UserError(f"{row.where}: the {ask} is blank.", next="leave the row out")
            return text + (f"\n\n{extra}" if extra.strip() else "")
    raise UserError(
        f"{row.where}: no prompt in it.",
        found=f"columns: {', '.join(row.values) or 'none'}",
        nearest=[*ASKED, CHATS[0]],
    )


def turns_of(row: Row, messages: object) -> list[dict[str, str]]:
    """Messages of a row as `{"role": …, "content": …}`. Raises: UserError, naming the message, if they are none."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(
            f"{row.where}: messages must be a list with a message in it.",
            found=f"{type(messages).__name__} {str(messages)[:60]}",
        )
    turns = []
    for number, message in enumerate(messages, 1):
        where = f"{row.where}, message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{where}: a message must be an object with role and content.", found=str(message)[:60])
        role = message.get("role", message.get("from"))
        if role not in ROLES:
            raise UserError(f"{where}: role {role!r} is not known.", nearest=sorted(set(ROLES)))
        content = Row(message, where).text("content" if "content" in message or "value" not in message else "value")
        turns.append({"role": ROLES[role], "content": content})
    return turns
