"""Code refinement: the method as it should be. Bugs fixed (Tufano et al. 2019; CodeXGLUE), or what a review led to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from deltalab.core.errors import UserError
from deltalab.data.chat import Conversation
from deltalab.data.files import Row, read_text
from deltalab.data.metrics import Measures, corpus_bleu, exact_match
from deltalab.data.tasks.base import RepliesTask, filled

PAIRS = (("buggy", "fixed"), ("initial", "approved"), ("old", "new"))
"""Columns of a row, or parts of the names of two files of equal lines: before and after."""


class CodeRefinementTask(RepliesTask):
    """Pairs of code: rows with the columns of a pair and maybe a `comment`, or a text file with its partner beside it, a
    line a method: `train.buggy.txt` and `train.fixed.txt`.

    prompt: with `{code}` and maybe `{comment}` in it. new_tokens: of a reply.
    """

    task: Literal["code-refinement"] = "code-refinement"
    prompt: str = "Refine this code:\n{code}"
    new_tokens: PositiveInt = 128

    def score(self, said: Sequence[Any], asked: Sequence[Conversation]) -> Measures:
        """bleu4 of the whole set, and exact; unchanged: of the code as it was, what a model gets that does nothing."""
        wanted = [c.messages[-1]["content"] for c in asked]
        untouched = corpus_bleu([c.meta["code"] for c in asked], wanted)["bleu4"]
        return {**corpus_bleu(said, wanted), **exact_match(said, wanted), "unchanged_bleu4": untouched}

    def read(self, path: str, *, split: str, names: tuple[str, ...] = ()) -> list[Row]:
        place = Path(path).expanduser()
        if place.suffix != ".txt":
            return super().read(path, split=split, names=names)
        found = next(((a, b) for a, b in PAIRS if a in place.name), None)
        if found is None:
            raise UserError(f"'{path}' has no partner: its name says neither {', '.join(a for a, _ in PAIRS[:-1])} nor {PAIRS[-1][0]}.")  # fmt: skip
        before, after = found
        sides = [read_text(str(p)).splitlines() for p in (place, place.with_name(place.name.replace(before, after)))]
        if len(sides[0]) != len(sides[1]):
            raise UserError(f"'{path}' has {len(sides[0])} lines, and its partner {len(sides[1])}.")
        return [Row({before: a, after: b}, f"{path}, line {n}") for n, (a, b) in enumerate(zip(*sides, strict=True), 1)]

    def conversation(self, row: Row) -> Conversation:
        before, after = next((pair for pair in PAIRS if set(pair) <= row.values.keys()), PAIRS[0])
        code, comment = row.text(before).strip(), str(row.values.get("comment") or "")
        asked = filled(self.prompt, {"comment": comment, "code": code})
        return Conversation.of(asked, row.text(after).strip(), code=code)
