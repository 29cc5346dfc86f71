"""What a line that begins with a slash does in `deltalab chat`: each returns what is to be shown."""

from collections.abc import Callable

from deltalab.core.errors import UserError, nearest
from deltalab.models.chat import Session
from deltalab.models.named import BASE


class Quit(Exception):
    """The session ends."""


class Commands:
    """The commands of one session. `run(line)` does one and returns its text."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.known: dict[str, tuple[str, str, Callable[[str], str]]] = {
            "adapters": ("", "list the adapters", self.adapters),
            "use": ("NAME", f"talk to this adapter; {BASE} is the model without one", self.use),
            "compare": ("A B …", "ask these beside each other, from the next question on; /use ends it", self.compare),
            "load": ("NAME FOLDER", "put one more adapter on the model", self.load),
            "system": ("TEXT", "set the system prompt; - takes it away; without TEXT show it", self.system),
            "set": ("NAME VALUE", "temperature, top-p, max-new-tokens, seed; without a name show them", self.set),
            "undo": ("", "forget the last question and its replies", self.undo),
            "reset": ("", "forget the whole conversation", self.reset),
            "save": ("FILE", "write the conversation as .jsonl", self.save),
            "help": ("", "this list", self.help),
            "quit": ("", "end; so does Ctrl-D. Ctrl-C stops a reply", self.quit),
        }

    def run(self, line: str) -> str:
        """Do the command in a line. Raises: UserError for an unknown one, or a mistake in it; `Quit` at the end."""
        word, _, rest = line.removeprefix("/").partition(" ")
        if word not in self.known:
            raise UserError(
                f"'/{word}' is no command.",
                nearest=[f"/{name}" for name in nearest(word, self.known)],
                next="/help; a question that begins with a slash takes two: //",
            )
        return self.known[word][2](rest.strip())

    def adapters(self, rest: str) -> str:
        width = max(map(len, self.session.folders))
        lines = []
        for name, folder in self.session.folders.items():
            mark = "*" if name in self.session.active else " "
            lines.append(f"{mark} {name:<{width}}  {folder or 'the model without an adapter'}")
        return "\n".join(lines)

    def use(self, rest: str) -> str:
        (name,) = self._words("use", rest, 1)
        self.session.use(name)
        return f"talking to {name}"

    def compare(self, rest: str) -> str:
        names = rest.split()
        if len(names) < 2:
            raise UserError("/compare takes two names.", found=rest or "none", next=f"/compare {BASE} {self._other()}")
        self.session.use(*names)
        return f"asking {', '.join(names)} beside each other"

    def load(self, rest: str) -> str:
        name, folder = self._words("load", rest, 2)
        self.session.load(name, folder)
        return f"loaded {name}; /use {name}, or /compare {self.session.active[0]} {name}"

    def system(self, rest: str) -> str:
        if rest:
            self.session.system = None if rest == "-" else rest
        return f"system prompt: {self.session.system}" if self.session.system else "no system prompt"

    def set(self, rest: str) -> str:
        if rest:
            name, value = self._words("set", rest.replace("=", " ", 1), 2)
            self.session.settings = self.session.settings.changed(name, value)
        settings = vars(self.session.settings)
        return "  ".join(f"{name.replace('_', '-')} {value}" for name, value in settings.items())

    def undo(self, rest: str) -> str:
        return f"forgotten: {self.session.undo()}"

    def reset(self, rest: str) -> str:
        self.session.reset()
        return "the conversation is empty"

    def save(self, rest: str) -> str:
        if not rest:
            raise UserError("/save needs a file.", next="/save talk.jsonl")
        return f"written: {self.session.save(rest)}"

    def help(self, rest: str) -> str:
        uses = {f"/{name} {usage}".rstrip(): text for name, (usage, text, _) in self.known.items()}
        width = max(map(len, uses))
        return "\n".join(f"{use:<{width}}  {text}" for use, text in uses.items())

    def quit(self, rest: str) -> str:
        raise Quit

    def _words(self, name: str, rest: str, count: int) -> list[str]:
        """So many words; the last is what is left, blanks included."""
        words = rest.split(maxsplit=count - 1)
        if len(words) != count or (count == 1 and len(rest.split()) > 1):
            raise UserError(f"/{name} takes {self.known[name][0]}.", found=rest or "nothing")
        return words

    def _other(self) -> str:
        return next((name for name in self.session.folders if name != BASE), "NAME")
