"""A sweep on this machine: as many worker processes as there is room for, each with its own threads.

A worker takes trials by the locks of their folders (`trials.py`). One that dies is replaced, and what it was at goes on from its
checkpoint; a trial that takes its worker with it three times is recorded as failed. Workers end with this process.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deltalab.core.errors import UserError
from deltalab.lab.trials import Sweep, fail, find, share, work

DEATHS = 3
"""Workers that a trial may take with it."""


@dataclass
class Crew:
    """The workers of a sweep, `jobs` of them. shard: as `share` takes it, for the workers."""

    sweep: Sweep
    shard: str | None
    jobs: int
    threads: int
    say: Callable[[str], None] = print
    _said: "queue.SimpleQueue[tuple[subprocess.Popen[str], str | None]]" = field(default_factory=queue.SimpleQueue)
    _at: dict[int, str] = field(default_factory=dict)
    _workers: list["subprocess.Popen[str]"] = field(default_factory=list)

    def run(self) -> None:
        """Until every trial is finished or failed, or held by somebody else.

        Raises: KeyboardInterrupt on Ctrl-C, which every worker gets once, so that each keeps a checkpoint.
        """
        deaths: Counter[str] = Counter()
        try:
            for _ in range(self.jobs):
                self._start()
            while self._workers:
                worker, line = self._said.get()
                if line is not None:
                    self._hear(worker, json.loads(line))
                    continue
                self._workers.remove(worker)
                code, trial = worker.wait(), self._at.pop(worker.pid, "")
                if code:
                    deaths[trial] += 1
                    self._lost(trial, code, deaths[trial])
                    self._start()
        except KeyboardInterrupt:
            print(
                "\nstopping: each trial ends its step and keeps a checkpoint; Ctrl-C again stops at once",
                file=sys.stderr,
            )
            self._stop(signal.SIGINT)
            for worker in self._workers:
                worker.wait()
            raise
        finally:
            self._stop(signal.SIGKILL)

    def _start(self) -> None:
        command = [sys.executable, "-m", "deltalab.lab.local", str(self.sweep.folder), self.shard or "1/1"]
        threads = str(self.threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                                  start_new_session=True)  # fmt: skip
        self._workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()

    def _listen(self, worker: "subprocess.Popen[str]") -> None:
        """A worker's lines into the queue, then None."""
        assert worker.stdout is not None
        for line in worker.stdout:
            self._said.put((worker, line))
        self._said.put((worker, None))

    def _hear(self, worker: "subprocess.Popen[str]", said: dict[str, Any]) -> None:
        if "fault" in said:
            raise UserError(**said["fault"])
        if "begin" in said:
            self._at[worker.pid] = said["begin"]
        else:
            self.say(said["say"])

    def _lost(self, id: str, code: int, times: int) -> None:
        """A worker died at a trial, or before it took one."""
        trial = next((trial for trial in find(self.sweep.folder).all if trial.id == id), None)
        how = f"signal {-code}" if code < 0 else f"code {code}"
        if trial is None:
            if times >= DEATHS:
                raise RuntimeError(f"workers end with {how} before they take a trial; their last words stand above")
        elif times >= DEATHS:
            fail(
                self.sweep,
                trial,
                f"the process that ran it ended with {how}, {times} times; memory may be too small for it",
            )
            self.say(f"failed: {trial.label}: its process ended with {how}, {times} times")
        else:
            self.say(f"a worker ended with {how}; goes on from its checkpoint: {trial.label}")

    def _stop(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.send_signal(number)


def worker(folder: str, shard: str) -> None:
    """Work on a sweep until nothing is free; ends at once when the parent's end of standard input closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout = sys.stderr  # the parent reads what `_tell` says, and nothing that a library prints
    sweep = find(folder)
    if sweep.spec.search is not None:
        from deltalab.lab import search

        search.work(sweep, lambda line: _tell(say=line), lambda trial: _tell(begin=trial.id))
        return
    work(sweep, share(sweep, shard), lambda line: _tell(say=line), lambda trial: _tell(begin=trial.id))


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def _tell(**message: Any) -> None:
    print(json.dumps(message), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    try:
        worker(*sys.argv[1:3])
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        _tell(fault={"asked": error.asked, "found": error.found, "nearest": error.nearest, "next": error.next})
        sys.exit(2)
