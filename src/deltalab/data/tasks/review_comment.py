"""Review comments, of CodeReviewer's tasks (Li et al. 2022, arXiv:2203.09095): what a reviewer says of a change."""

from collections.abc import Sequence
from typing import Any, Literal

from deltalab.data.chat import Conversation
from deltalab.data.files import Row
from deltalab.data.metrics import Measures, rouge_l, smoothed_bleu
from deltalab.data.tasks.base import RepliesTask, filled


class ReviewCommentTask(RepliesTask):
    """Changes (`patch`) with the comment `msg`: CodeReviewer's rows. prompt: with `{patch}` in it. new_tokens: of a reply."""

    task: Literal["review-comment"] = "review-comment"
    prompt: str = "Review this change:\n{patch}"

    def score(self, said: Sequence[Any], asked: Sequence[Conversation]) -> Measures:
        """bleu4, smoothed as CodeReviewer has it, and rouge_l."""
        wanted = [c.messages[-1]["content"] for c in asked]
        return {**smoothed_bleu(said, wanted), **rouge_l(said, wanted)}

    def wanted(self, row: Row) -> bool:
        """Rows with a comment that do not say that they are of another task."""
        return row.values.get("task", "msg") == "msg" and bool(row.values.get("msg"))

    def conversation(self, row: Row) -> Conversation:
        return Conversation.of(filled(self.prompt, {"patch": row.text("patch")}), row.text("msg").strip())
