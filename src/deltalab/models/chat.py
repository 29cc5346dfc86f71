"""A conversation with a model: with one of its adapters, or with several beside each other.

A voice is an adapter by name, or `base`, the model without any. Each voice that is asked keeps its own turns, for a
reply is part of what the next one answers to. A question that fails leaves no trace.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import write_text
from deltalab.deltas.peft_format import load_adapter
from deltalab.models.generate import generate, require_settings
from deltalab.models.named import BASE, put_on, require_named, speaking


class Stop(Exception):
    """Raised by `on_text`: the reply ends here."""


@dataclass(frozen=True)
class Settings:
    """How replies are drawn, see `deltalab.generate`."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def changed(self, name: str, text: str) -> "Settings":
        """With one value from its text. Raises: UserError for an unknown name, or a value out of range."""
        key, types = name.replace("-", "_"), {"max_new_tokens": int, "temperature": float, "top_p": float, "seed": int}
        if key not in types:
            raise UserError(f"there is no setting '{name}'.", nearest=nearest(key, types) or [*types])
        try:
            value = types[key](text)
        except ValueError:
            raise UserError(f"{key} is a number.", found=text, next=f"/set {key} {getattr(self, key)}") from None
        if key != "seed":
            require_settings(**{key: value})
        return replace(self, **{key: value})


@dataclass
class Answer:
    """Replies by voice. long: voices whose reply came to its largest number of tokens. stopped: from outside."""

    replies: dict[str, str] = field(default_factory=dict)
    long: list[str] = field(default_factory=list)
    stopped: bool = False


class Session:
    """A conversation and the adapters that it can be led with.

    folders: name -> adapter folder, see `deltalab.models.named`. active: the voices that are asked, the first adapter
    at the beginning. Raises: UserError as `deltalab.load_adapter`.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase,
        folders: Mapping[str, Path | None] | None = None, *, settings: Settings | None = None, system: str | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        self.settings, self.system = settings or Settings(), system
        self.folders = {BASE: None, **(folders or {})}
        self.active = put_on(model, folders or {})[:1]
        self._turns: dict[str, list[dict[str, str]]] = {name: [] for name in self.active}
        self._asked = 0

    def load(self, name: str, folder: str | Path) -> None:
        """Put one more adapter on the model; who is asked stays. Raises: UserError as `deltalab.load_adapter`."""
        if name in self.folders:
            raise UserError(f"'{name}' is taken.", found=", ".join(self.folders), next=f"/load {name}2 {folder}")
        load_adapter(self.model, Path(folder).expanduser(), adapter=name)
        self.folders[name] = Path(folder)

    def use(self, *names: str) -> None:
        """Ask these voices from now on. One that is new here goes on with the turns of the first that was asked.

        Raises: UserError for an unknown name, or one given twice.
        """
        for name in names:
            require_named(self.model, name)
        if len(set(names)) < len(names):
            raise UserError(f"'{names[0]}' is named twice.", next="name different adapters, or base")
        there = self._turns[self.active[0]]
        self._turns = {name: list(self._turns.get(name, there)) for name in names}
        self.active = list(names)

    def ask(self, question: str, on_text: Callable[[str, str], None] = lambda name, piece: None) -> Answer:
        """A reply of every active voice. on_text(voice, piece) is called while they come, and may raise `Stop`.

        A single voice's turns keep what came before a stop; of several the question is forgotten.
        Raises: UserError as `deltalab.generate`; then nothing is kept.
        """
        answer, heard = Answer(), ""
        seed = self.settings.seed + self._asked
        options = {key: getattr(self.settings, key) for key in ("max_new_tokens", "temperature", "top_p")}
        for name in self.active:
            heard = ""

            def hear(piece: str, name: str = name) -> None:
                nonlocal heard
                heard += piece
                on_text(name, piece)

            with speaking(self.model, name):
                turns = [*self.messages(name), {"role": "user", "content": question}]
                try:
                    (reply,) = generate(self.model, self.tokenizer, [turns], seed=seed, on_text=hear, **options)
                except Stop:
                    answer.stopped = True
                    answer.replies[name] = heard
                    break
            answer.replies[name] = reply.text
            answer.long += [] if reply.finished else [name]
        self._asked += 1
        if not answer.stopped or (len(self.active) == 1 and heard.strip()):
            for name, text in answer.replies.items():
                self._turns[name] += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        return answer

    def messages(self, name: str) -> list[dict[str, str]]:
        """What an active voice has before it: the system prompt, if any, and the turns."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self._turns[name]]

    def undo(self) -> str:
        """Forget the last question and its replies; returns the question. Raises: UserError if there is none."""
        if not self._turns[self.active[0]]:
            raise UserError("there is nothing to undo: the conversation is empty.")
        question = self._turns[self.active[0]][-2]["content"]
        for turns in self._turns.values():
            del turns[-2:]
        return question

    def reset(self) -> None:
        """Forget every turn; the system prompt, the settings and the adapters stay."""
        self._turns = {name: [] for name in self.active}
        self._asked = 0

    def save(self, path: str | Path) -> Path:
        """Write the conversation, a line of JSON for each active voice: `adapter` and `messages`. Returns the path.

        Raises: UserError if there is nothing to save, or a file there already.
        """
        path = Path(path).expanduser()
        if path.exists():
            raise UserError(f"'{path}' is there already.", next="another name")
        if not self._turns[self.active[0]]:
            raise UserError("there is nothing to save: the conversation is empty.")
        about: dict[str, Any] = {"model": getattr(self.model.config, "_name_or_path", "")}
        rows = [{**about, "adapter": name, "messages": self.messages(name)} for name in self.active]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path
