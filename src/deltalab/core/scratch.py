"""Folders for large temporaries: below a folder of choice (shared memory, say), named after their process.

What a killed process left is removed when the next one makes its own there.
"""

import os
import tempfile
from pathlib import Path

from deltalab.core.files import alive, disk_faults, remove

PREFIX = ".deltalab-"


def make_scratch(root: str | Path | None = None) -> Path:
    """A new folder below `root` (default: the system's for temporaries), after `sweep_scratch` there."""
    root = Path(root or tempfile.gettempdir())
    with disk_faults(root):
        root.mkdir(parents=True, exist_ok=True)
        sweep_scratch(root)
        return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=root))


def sweep_scratch(root: str | Path) -> list[Path]:
    """Remove the scratch folders below `root` whose process is gone; returns them."""
    stale = [folder for folder in sorted(Path(root).glob(f"{PREFIX}*-*")) if not _in_use(folder)]
    for folder in stale:
        remove(folder)
    return stale


def _in_use(folder: Path) -> bool:
    pid = folder.name.removeprefix(PREFIX).partition("-")[0]
    try:
        return pid.isdigit() and alive(int(pid))
    except OverflowError:  # no process has such a number
        return False
