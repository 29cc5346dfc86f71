"""What the tests of bad input share: a small model on disk, a spec, and the command line in and out of process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from deltalab.cli import main
from tests.helpers import byte_tokenizer, tiny_llama


@dataclass
class Said:
    """How a command ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    def fails_with(self, *parts: str, code: int = 2) -> None:
        """It ended in a message of ours that has these parts, and in no traceback."""
        assert self.code == code, f"exit {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err, self.err
        for part in parts:
            assert part in self.err, f"{part!r} is not in:\n{self.err}"


def deltalab(*args: str | Path) -> Said:
    """`deltalab ARGS` in this process."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            return Said(int(end.code or 0), out.getvalue(), err.getvalue())


def interrupted(
    args: list[str | Path], when: Callable[[], bool], stop: int = signal.SIGINT, limit: float = 120
) -> Said:
    """`deltalab ARGS` in a process of its own, stopped by a signal once `when()` holds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deltalab", *map(str, args)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    until = time.monotonic() + limit
    while not when() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert child.poll() is None, f"it ended before it could be stopped:\n{child.communicate()}"
    child.send_signal(stop)
    out, err = child.communicate(timeout=limit)
    return Said(child.returncode, out, err)


def save_model(folder: Path, **shape: Any) -> Path:
    """A random Llama with a byte tokenizer, as a folder."""
    tiny_llama(**shape).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def rows(n: int = 24) -> list[dict[str, str]]:
    """Instruction data."""
    return [{"instruction": f"say {i}", "output": f"{i} it is"} for i in range(n)]


def write_data(path: Path, data: object) -> Path:
    """A JSON file, or JSONL by its suffix."""
    path.write_text("\n".join(map(json.dumps, data)) if path.suffix == ".jsonl" else json.dumps(data))  # type: ignore[call-overload]
    return path


def write_spec(path: Path, values: dict[str, Any]) -> Path:
    """A YAML file."""
    path.write_text(yaml.safe_dump(values))
    return path


def left_behind(folder: Path) -> list[str]:
    """Temporary files below a folder."""
    return sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.suffix in (".tmp", ".old") or p.name.endswith(".part") or p.name.startswith(".deltalab-")
    )
