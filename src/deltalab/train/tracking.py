"""What a run tells experiment trackers while it trains, through Accelerate's classes, from the first process.

    track: [tensorboard, {to: wandb, project: ranks, offline: true}]

`curves/*.jsonl` stay the truth: a tracker gets their rows under the names of `train/names.py`, all of one step at once, and a run that
goes on gives each tracker the steps that it has not got, read back from the curves. A tracker that fails is dropped with a word and
training goes on; it leaves no trace in the generators.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from deltalab.core.errors import UserError
from deltalab.core.files import read_json, write_json
from deltalab.train import names, rng
from deltalab.train.curves import Curves
from deltalab.train.devices import processes
from deltalab.train.progress import say
from deltalab.train.spec import LoopSpec
from deltalab.train.trackers import TOOLS, Kept, Tool

KEPT = "trackers.json"


class Trackers:
    """The trackers of one run; none in a process that is not the first. `begin` starts them."""

    def __init__(self, spec: LoopSpec | None = None, folder: Path | None = None) -> None:
        self.folder = folder
        self.config = names.config(spec.plain()) if spec else {}
        self.tools: list[Tool] = [TOOLS[one.to](one, folder) for one in spec.track] if spec else []
        self.on: list[tuple[Tool, GeneralTracker, int]] = []
        """Those that are started, each with the last step that it has."""
        self.kept: dict[str, Kept] = {}
        self.step, self.values = 0, dict[str, float]()

    def check(self) -> None:
        """Raises: UserError if one cannot be started."""
        for tool in self.tools:
            tool.check()

    def begin(self, curves: Curves, shown: bool = True) -> None:
        """Start them, or go on where a stopped run's are, if the curves go on too; then tell what they have not got.

        Raises: UserError if one does not start.
        """
        path = self.folder / KEPT if self.folder else None
        if curves.rows and path is not None and path.is_file():
            self.kept = read_json(path, "trackers")
        self.kept = {tool.name: self.kept[tool.name] for tool in self.tools if tool.name in self.kept}
        step = max((rows[-1]["step"] for rows in curves.rows.values()), default=0)
        for tool in self.tools if processes().is_main_process else ():
            mine = self.kept.get(tool.name)
            try:
                with _apart():
                    tracker = tool.start(mine, 0 if mine is None else step)
                    has = -1 if mine is None else tool.has(tracker, step)
                    if has < 0:
                        tracker.store_init_configuration(self.config)
                    self.kept[tool.name] = tool.keep(tracker)
                    hint = tool.hint(tracker)
            except Exception as error:
                raise UserError(f"{tool.name} does not start.", found=_first_line(error), next="mend that, or leave it out of track") from error  # fmt: skip
            self.on.append((tool, tracker, has))
            say(f"  tracked: {tool.name} ({hint})", shown)
        self._keep()
        rows = [(row["step"], name, row) for name, found in curves.rows.items() for row in found] if self.on else []
        for _, name, row in sorted(rows, key=lambda row: row[0]):
            self.note(name, row)

    def note(self, curve: str, row: dict[str, Any]) -> None:
        """A row of a curve."""
        if self.on:
            self.add(names.of_row(curve, row), row["step"])

    def add(self, values: dict[str, float], step: int) -> None:
        """Numbers by name at a step, which is this one or a later one."""
        if step != self.step:
            self.tell()
            self.step = step
        self.values |= values

    def tell(self) -> None:
        """What has come together at a step, to those that have not got it."""
        values, self.values = self.values, {}
        for entry in list(self.on) if values else ():
            tool, tracker, has = entry
            if self.step > has:
                try:
                    with _apart():
                        tracker.log(values, step=self.step)
                except Exception as error:
                    self._leave_out(tool, error)

    def close(self, failed: bool) -> None:
        """Tell the rest, and end them."""
        self.tell()
        for tool, tracker, _ in list(self.on):
            try:
                with _apart():
                    tool.end(tracker, failed)
            except Exception as error:
                self._leave_out(tool, error)
        self.on.clear()

    def _leave_out(self, tool: Tool, error: Exception) -> None:
        """Say so, once; a run that goes on later begins a new one there, with all steps."""
        self.on = [entry for entry in self.on if entry[0] is not tool]
        self.kept.pop(tool.name, None)
        self._keep()
        say(f"{tool.name} is left out from here: {_first_line(error)}. Training goes on; the curves have everything.")

    def _keep(self) -> None:
        if self.folder is not None and self.tools and processes().is_main_process:
            write_json(self.folder / KEPT, self.kept)


@contextlib.contextmanager
def opened(spec: LoopSpec, folder: Path | None) -> Iterator[Trackers]:
    """The trackers of a run, closed in the end, however it ends."""
    trackers, failed = Trackers(spec, folder), True
    try:
        yield trackers
        failed = False
    finally:
        trackers.close(failed)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """What a tracker prints is not shown, since stdout holds results only; what it draws leaves no trace."""
    with rng.kept(), contextlib.redirect_stdout(io.StringIO()):
        yield


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
