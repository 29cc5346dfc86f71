"""Review necessity, of CodeReviewer's tasks (Li et al. 2022, arXiv:2203.09095): does a change need a comment."""

from typing import ClassVar, Literal

from deltalab.data.files import Row
from deltalab.data.tasks.choice import ChoiceTask


class ReviewNecessityTask(ChoiceTask):
    """Changes (`patch`) with y, 1 where a reviewer had something to say: CodeReviewer's rows."""

    task: Literal["review-necessity"] = "review-necessity"
    prompt: str = "Does this change need a review comment?\n{patch}"

    labels: ClassVar = ("no", "yes")
    texts: ClassVar = {"patch": ("patch",)}
    label_columns: ClassVar = ("y",)
    positive: ClassVar = 1

    def wanted(self, row: Row) -> bool:
        """Rows that say that they are of another task are left out."""
        return row.values.get("task", "cls") == "cls"
