"""`deltalab chat MODEL`: an interactive terminal to talk to a model and its adapters."""

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import threading

    from rich.console import Console

    from deltalab.models.chat import Answer, Session


def command(
    model: Annotated[str, typer.Argument(help="a folder, a hub name, organism")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="name=folder; may be given again; the first one is talked to")
    ] = None,
    system: Annotated[str | None, typer.Option(help="a system prompt")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens of a reply at most")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="sample from the tokens that make up this probability")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the samples")] = 0,
    quantize: Annotated[str | None, typer.Option(help="nf4, int8 or int4-group")] = None,
    group_size: Annotated[int | None, typer.Option(help="of --quantize, where not the default")] = None,
    dtype: Annotated[str, typer.Option(help="of the model: float32, bfloat16, float16, auto")] = "auto",
) -> None:
    """Talk to a model: switch between its adapters by name, compare them side by side. /help inside lists all."""
    from rich.console import Console

    from deltalab.models.chat import Session, Settings
    from deltalab.models.device import nearby
    from deltalab.models.generate import require_settings
    from deltalab.models.heads import require_writer
    from deltalab.models.load import load
    from deltalab.models.named import named

    require_settings(max_new_tokens, 1, temperature, top_p)
    folders = named(adapter or [])
    loaded, tokenizer = load(model, dtype=dtype, device_map=nearby(), quantize=quantize, group_size=group_size)
    require_writer(loaded)
    settings = Settings(max_new_tokens, temperature, top_p, seed)
    session = Session(loaded, tokenizer, folders, settings=settings, system=system)
    Terminal(session, Console(highlight=False)).run(f"{model}: {', '.join(session.folders)}. /help lists the commands.")


class Terminal:
    """Lines in, replies out, until /quit or the end of the input. Without a terminal on both sides, a transcript."""

    def __init__(self, session: "Session", console: "Console") -> None:
        from deltalab.cli.chat_commands import Commands

        self.session, self.console, self.commands = session, console, Commands(session)

    def run(self, greeting: str) -> None:
        """No mistake ends it, and Ctrl-C stops a reply only."""
        from deltalab.cli.chat_commands import Quit

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then has a history and line editing
        if sys.stdin.isatty():
            self.show(greeting, "dim")
        while True:
            try:
                line = self.read()
                if line is None:
                    break
                self.do(line)
            except Quit:
                break
            except KeyboardInterrupt:
                self.show("\n/quit or Ctrl-D ends." if sys.stdin.isatty() else "\nstopped.", "dim")

    def read(self) -> str | None:
        """The next line, one that ends with a backslash joined to the one after it; None at the end of the input."""
        prompt = f"{' | '.join(self.session.active)}> "
        parts: list[str] = []
        while True:
            try:
                line = input(prompt)
            except EOFError:
                if sys.stdin.isatty() or not parts:
                    print()
                    return None
                line = ""
            if not sys.stdin.isatty():
                print(line)  # what a terminal would show, for whoever reads the transcript
            more = line.endswith("\\")
            parts.append(line[:-1] if more else line)
            if not more:
                return "\n".join(parts).strip()
            prompt = "... "

    def do(self, line: str) -> None:
        """A command or a question; what goes wrong is told."""
        from deltalab.cli.chat_commands import Quit
        from deltalab.core.errors import UserError

        try:
            if line.startswith("/") and not line.startswith("//"):
                self.show(self.commands.run(line))
            elif line:
                self.talk(line.removeprefix("/"))
        except Quit:
            raise
        except UserError as error:
            self.show(f"error: {error}", "red")
        except Exception as error:  # the conversation is worth more than the end of it
            self.show(f"error: {type(error).__name__}: {error}", "red")

    def talk(self, question: str) -> None:
        """Ask, and show the replies while they come."""
        from deltalab.cli.columns import is_wide
        from deltalab.train.interrupts import interrupts

        with interrupts(say="") as stop:
            if len(self.session.active) > 1 and is_wide(self.console, len(self.session.active)):
                answer = self._columns(question, stop)
            else:
                answer = self._stream(question, stop)
        if answer.stopped:
            kept = len(self.session.active) == 1
            self.show("stopped" if kept else "stopped; the question is forgotten", "dim")
            return
        for name in answer.long:
            limit = self.session.settings.max_new_tokens
            self.show(
                f"{name} was cut at {limit} tokens or the end of the context; /set max-new-tokens, or /reset", "dim"
            )

    def _stream(self, question: str, stop: "threading.Event") -> "Answer":
        """One reply after the other, token by token, each of several under its name."""
        from deltalab.cli.columns import fit
        from deltalab.models.chat import Stop

        file, told = self.console.file, ""

        def on_text(name: str, piece: str) -> None:
            nonlocal told
            if len(self.session.active) > 1 and name != told:
                file.write("\n" * bool(told) + f"[{name}]\n")
            told = name
            file.write(fit(piece, self.console))
            file.flush()
            if stop.is_set():
                raise Stop

        try:
            return self.session.ask(question, on_text)
        finally:
            if told:
                file.write("\n")

    def _columns(self, question: str, stop: "threading.Event") -> "Answer":
        """The replies beside each other, growing."""
        from rich.live import Live

        from deltalab.cli.columns import in_columns
        from deltalab.models.chat import Stop

        texts = dict.fromkeys(self.session.active, "")
        with Live(in_columns(texts), console=self.console, refresh_per_second=8) as live:

            def on_text(name: str, piece: str) -> None:
                texts[name] += piece
                live.update(in_columns(texts))
                if stop.is_set():
                    raise Stop

            return self.session.ask(question, on_text)

    def show(self, text: str, style: str = "") -> None:
        """A line of the program's own."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)
