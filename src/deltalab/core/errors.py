"""Errors that a user can act on.

A message has four parts: what was asked, what was found, the nearest options, the next command. The command line
prints a `UserError` without a traceback; everything else is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A mistake in what the user asked for, with what to do about it.

    asked: the request and why it fails, one sentence. found: what is there instead. nearest: the closest options.
    next: the command, call or edit that gets further.
    """

    def __init__(self, asked: str, *, found: str = "", nearest: Sequence[str] = (), next: str = "") -> None:
        self.asked, self.found, self.nearest, self.next = asked, found, tuple(nearest), next
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.asked]
        if self.found:
            lines.append(f"  found: {self.found}")
        if self.nearest:
            lines.append(f"  nearest: {', '.join(self.nearest)}")
        if self.next:
            lines.append(f"  next: {self.next}")
        return "\n".join(lines)


def nearest(name: str, options: Iterable[str], n: int = 3) -> list[str]:
    """The `n` options closest to `name`: by spelling first, then by a shared substring."""
    options = list(dict.fromkeys(options))
    close = difflib.get_close_matches(name, options, n=n, cutoff=0.5)
    inside = [o for o in options if o not in close and name and (name in o or o in name)]
    return (close + inside)[:n]
