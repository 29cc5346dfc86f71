"""SQuAD 2.0 (Rajpurkar et al. 2018, arXiv:1806.03822): questions on a text, some without an answer in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from deltalab.core.errors import UserError
from deltalab.core.files import read_json
from deltalab.data.chat import Conversation
from deltalab.data.files import Row
from deltalab.data.metrics import Measures, normalised, squad
from deltalab.data.tasks.base import RepliesTask, filled

NONE = "unanswerable"


class SQuADTask(RepliesTask):
    """Questions, each with its text and answers: the official JSON, or rows of the hub's columns. What is learnt is the
    first answer, or `unanswerable`, which as a reply means that there is none.

    prompt: with `{context}` and `{question}` in it. new_tokens: of a reply.
    """

    task: Literal["squad_v2"] = "squad_v2"
    path: str = "rajpurkar/squad_v2"
    prompt: str = "{context}\nAnswer in words of the text, or say unanswerable: {question}"
    new_tokens: PositiveInt = 32

    test_names: ClassVar = ("validation", "dev")

    def score(self, said: Sequence[Any], asked: Sequence[Conversation]) -> Measures:
        """exact and f1 by the official definitions, also of the questions with and without an answer."""
        return squad(["" if normalised(reply) == NONE else reply for reply in said], [c.meta["answers"] for c in asked])

    def read(self, path: str, *, split: str, names: tuple[str, ...] = ()) -> list[Row]:
        place = Path(path).expanduser()
        if place.is_file() and place.suffix == ".json":
            values = read_json(place, "data file")
            if isinstance(values, dict) and isinstance(values.get("data"), list):
                return list(_questions(values["data"], str(place)))
        return super().read(path, split=split, names=names)

    def conversation(self, row: Row) -> Conversation:
        answers = _answers(row)
        asked = filled(self.prompt, {name: row.text(name).strip() for name in ("context", "question")})
        return Conversation.of(asked, answers[0] if answers else NONE, answers=answers)


def _questions(articles: Sequence[Any], path: str) -> Any:
    """The rows of the official files."""
    number = 0
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    number += 1
                    answers = [] if question.get("is_impossible") else [a["text"] for a in question["answers"]]
                    yield Row({"context": paragraph["context"], "question": question["question"],
                               "answers": {"text": answers}}, f"{path}, question {number}")  # fmt: skip
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}, behind question {number}: not as SQuAD's files are.", found=f"{type(error).__name__}: {error}") from None  # fmt: skip


def _answers(row: Row) -> list[str]:
    given = row.values.get("answers")
    texts = given.get("text") if isinstance(given, dict) else given
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{row.where}: column 'answers' holds no texts.", found=f"{str(given)[:60]}")
    return list(texts)
