"""What a user sees while a run trains: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Any

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Loss, tokens a second and time left. Writes to stderr, so that stdout holds results only."""

    def __init__(self, steps: int, start: int, shown: bool) -> None:
        self.steps, self.first, self.shown = steps, start, shown
        self.began = self.said = time.monotonic()
        self.tokens = 0
        self.bar: Any = None
        self.task: Any = None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                           TimeRemainingColumn(compact=True), console=Console(stderr=True))  # fmt: skip
            self.task = self.bar.add_task("", total=steps, completed=start, note="")
            self.bar.start()

    def step(self, step: int, loss: float, tokens: int) -> None:
        """After `step` of the run's steps: its loss and its tokens."""
        self.tokens += tokens
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=f"loss {loss:.3f} · {self.rate():,.0f} tokens/s")
        elif self.shown and (
            time.monotonic() - self.said > SECONDS_BETWEEN_LINES or step in (self.first + 1, self.steps)
        ):
            self.said = time.monotonic()
            elapsed = self.said - self.began
            left = elapsed / max(step - self.first, 1) * (self.steps - step)
            rate = f" · {self.rate():,.0f} tokens/s · {_clock(left)} left" if step > self.first + 1 else ""
            self.say(f"step {step}/{self.steps} · loss {loss:.3f}{rate}")

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is not None:
            self.bar.console.print(line, highlight=False)
        elif self.shown:
            print(line, file=sys.stderr, flush=True)

    def rate(self) -> float:
        """Tokens a second since the start of this process's part of the run."""
        return self.tokens / max(time.monotonic() - self.began, 1e-9)

    def close(self) -> None:
        """Take the bar down."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def say(line: str, shown: bool = True) -> None:
    """A line before or after the training itself; the first process speaks for all."""
    if shown:
        print(line, file=sys.stderr, flush=True)
