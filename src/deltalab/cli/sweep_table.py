"""How far a sweep is: as text, a line a trial, and live, a line a group."""

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from deltalab.lab.spec import Trial
    from deltalab.lab.trials import State, Sweep

SECONDS = 2.0
"""Between two looks at the folder."""


def table(sweep: "Sweep") -> str:
    """Each trial with its state; of those that run, the step; of failed ones, why."""
    from deltalab.core.files import read_json
    from deltalab.lab.spec import short
    from deltalab.lab.trials import failure, step_of

    states, lines = sweep.states(), []
    for trial in sweep.all:
        state = states[trial.id]
        note = ""
        if state in ("running", "begun"):
            note = f"step {step_of(sweep, trial)}"
        elif state == "pruned":
            told = read_json(sweep.place(trial) / "pruned.json", "note")
            note = f"step {told['step']}, held-out loss {short(told['held_out'][-1])}"
        elif state == "failed":
            note = failure(sweep, trial)["error"].splitlines()[0]
        lines.append(f"  {state:<9} {trial.id}  {trial.label}" + (f"  ({note})" if note else ""))
    if sweep.spec.search is not None:
        from deltalab.lab.search import studies

        lines = [*(study.line() for study in studies(sweep)), *lines]
    return "\n".join([f"{sweep.folder}: {_counts(sweep, states)}", *lines])


def _counts(sweep: "Sweep", states: "dict[str, State]") -> str:
    counts = Counter(states.values())
    return ", ".join([f"{len(sweep.all)} trials", *(f"{n} {state}" for state, n in counts.items())])


@contextlib.contextmanager
def watched(sweep: "Sweep", at_once: int) -> "Iterator[Callable[[str], None]]":
    """On a terminal a table that follows the sweep, elsewhere nothing; gives what prints a line beside it."""
    if not sys.stdout.isatty():
        yield print
        return
    import threading

    from rich.console import Console
    from rich.live import Live

    console, look = Console(), _Look(sweep, at_once)
    with Live(look.table(), console=console, auto_refresh=False, transient=True) as live:
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(SECONDS):
                live.update(look.table(), refresh=True)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield lambda line: console.print(line, markup=False, highlight=False)
        finally:
            ended.set()
            thread.join()


class _Look:
    """What is known of a sweep, read again as trials end."""

    def __init__(self, sweep: "Sweep", at_once: int) -> None:
        self.sweep, self.at_once = sweep, at_once
        self.rows: dict[str, dict[str, Any]] = {}

    def table(self) -> "Table":
        """A line a group: how many trials have ended, the steps of those that run, and the mean of the first score so far."""
        from rich.table import Table

        from deltalab.lab.trials import ENDED, find, step_of

        if self.sweep.spec.search is not None:  # whose trials become known as it goes
            self.sweep = find(self.sweep.folder)
        states = self.sweep.states()
        groups: dict[str, list[Trial]] = {}
        for trial in self.sweep.all:
            groups.setdefault(f"{'tuning: ' if trial.tuned else ''}{trial.group}", []).append(trial)
            if states[trial.id] == "finished" and trial.id not in self.rows:
                self.rows[trial.id] = self._row(trial)
        measure = next((key for row in self.rows.values() for key in row if key.startswith("score.")), "held_out")
        shown = Table("group", "done", "running", measure, title=f"{_counts(self.sweep, states)}{self._left(states)}")
        for name, trials in groups.items():
            done = sum(states[t.id] in ENDED for t in trials)
            steps = ", ".join(f"step {step_of(self.sweep, t)}" for t in trials if states[t.id] == "running")
            found = [self.rows[t.id][measure] for t in trials if self.rows.get(t.id, {}).get(measure) is not None]
            shown.add_row(name, f"{done}/{len(trials)}", steps, f"{sum(found) / len(found):.4g}" if found else "")
        return shown

    def _row(self, trial: "Trial") -> dict[str, Any]:
        from deltalab.lab.table import row

        return row(self.sweep, trial)

    def _left(self, states: "dict[str, State]") -> str:
        """The time left by the mean of the trials that have ended; nothing before one has."""
        from deltalab.lab.trials import ENDED

        seconds = [row["seconds"] for row in self.rows.values()]
        open_ = sum(state not in ENDED for state in states.values())
        if not seconds or not open_:
            return ""
        minutes = sum(seconds) / len(seconds) * math.ceil(open_ / self.at_once) / 60
        return f"; about {minutes:.0f} min left" if minutes >= 1 else "; less than a minute left"
