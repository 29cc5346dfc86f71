"""Stages side by side: each lane (one tuning and what follows from it) in a process of its own.

A worker rebuilds the study from its folder and does the lanes that it is told, one after the other; what it hands back
lies on disk, as after any stage. The parent speaks to a worker over its standard input, and a worker whose parent is
gone ends at once: that is how a killed study leaves nobody writing into its folder.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltalab.core.errors import UserError
from deltalab.core.files import read_json
from deltalab.core.spec import build
from deltalab.studies import STUDIES, module_of
from deltalab.studies.stages import Context, Stage, done_or_do

# ---- the parent ---------------------------------------------------------------------------------------------------


@dataclass
class Workers:
    """A crew of processes on one study folder. kind: the study, a key of `STUDIES`. jobs: how many work side by side."""

    kind: str
    folder: Path
    jobs: int
    threads: int
    say: Callable[[str], None] = print
    _workers: list[subprocess.Popen[str]] = field(default_factory=list)
    _lanes: dict[int, str] = field(default_factory=dict)
    _stopping: bool = False

    def run(self, lanes: Mapping[str, Sequence[str]]) -> None:
        """Do the lanes, name → its stages that are not done; returns when all are.

        Raises: UserError of the first lane that ended in one, the others having been stopped where they go on later;
        KeyboardInterrupt on Ctrl-C, which every worker gets once, so that each keeps a checkpoint.
        """
        todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        for lane in lanes:
            todo.put(lane)
        faults: list[BaseException] = []
        threads = [
            threading.Thread(target=self._serve, args=(todo, faults), daemon=True)
            for _ in range(min(self.jobs, len(lanes)))
        ]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(0.1)
        except KeyboardInterrupt:
            print(
                "\nstopping: each tuning ends its step and keeps a checkpoint; Ctrl-C again stops at once",
                file=sys.stderr,
            )
            self._stop()
            for thread in threads:
                thread.join()
            raise
        finally:
            for worker in self._workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()
        if faults:
            raise faults[0]

    def _serve(self, todo: "queue.SimpleQueue[str]", faults: list[BaseException]) -> None:
        """One worker's life: lanes from the queue until it is empty, or something went wrong anywhere."""
        try:
            worker = self._start()
            threading.Thread(target=self._relay, args=(worker,), daemon=True).start()
            while not self._stopping:
                try:
                    lane = todo.get_nowait()
                except queue.Empty:
                    break
                self._one(worker, lane)
            worker.stdin.close()  # type: ignore[union-attr]
            worker.wait()
        except BaseException as error:
            if not self._stopping:
                faults.append(error)
                self._stop()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "deltalab.studies.lanes", self.kind, str(self.folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self._workers.append(worker)
        return worker

    def _one(self, worker: "subprocess.Popen[str]", lane: str) -> None:
        """Hand one lane to a worker, and pass on what it says until it is done."""
        assert worker.stdin
        assert worker.stdout
        self._lanes[worker.pid] = lane
        worker.stdin.write(json.dumps(lane) + "\n")
        worker.stdin.flush()
        for line in worker.stdout:
            said = json.loads(line)
            if "say" in said:
                self.say(said["say"])
            elif "fault" in said:
                raise UserError(**said["fault"])
            else:
                return
        worker.wait()
        raise RuntimeError(
            f"the process that worked on '{lane}' ended with code {worker.returncode}; its last words stand above"
        )

    def _relay(self, worker: "subprocess.Popen[str]") -> None:
        """A worker's standard error: progress, or a traceback. Nothing once it was told to stop."""
        assert worker.stderr
        for line in worker.stderr:
            if not self._stopping:
                print(f"{self._lanes.get(worker.pid, '')}: {line}", end="", file=sys.stderr, flush=True)

    def _stop(self) -> None:
        self._stopping = True
        for worker in self._workers:
            if worker.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.send_signal(signal.SIGINT)


# ---- the worker ---------------------------------------------------------------------------------------------------


def work(kind: str, folder: Path) -> None:
    """Do the lanes that come in on standard input, one JSON string a line, until it closes."""
    orders: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    module = module_of(kind)
    spec = build(module.SPEC, read_json(folder / "study.json", "study")["spec"])
    stages: list[Stage] = module.stages(spec)
    ctx = Context(folder, say=lambda line: _tell({"say": line}))
    while (lane := orders.get()) is not None:
        try:
            done_or_do(ctx, stages, lane)
        except UserError as error:
            _tell(
                {
                    "fault": {
                        "asked": error.asked,
                        "found": error.found,
                        "nearest": list(error.nearest),
                        "next": error.next,
                    }
                }
            )
            return
        _tell({"done": lane})


def _listen(orders: "queue.SimpleQueue[str | None]") -> None:
    """Standard input into a queue. Its end is the parent's: nothing more may be written from then on."""
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)


def _tell(message: Mapping[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    if sys.argv[1] not in STUDIES:
        sys.exit(f"no study is called {sys.argv[1]}")
    try:
        work(sys.argv[1], Path(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
