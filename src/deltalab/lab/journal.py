"""Where the studies of a search are kept: Optuna's journal in the sweep's folder, or a database; and the locks of both.

A lock here is the system's own on a file. It ends with its process, so what a killed one held is free at once.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from deltalab.core.errors import UserError

try:
    import optuna
    from optuna.storages import BaseStorage, JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
except ImportError:
    raise UserError("a search needs Optuna, which is not installed.", next="pip install 'deltalab[search]'") from None

__all__ = ["JOURNAL", "BaseStorage", "alone", "optuna", "storage_in"]

optuna.logging.set_verbosity(optuna.logging.WARNING)
JOURNAL = "search.journal"


def storage_in(folder: Path, url: str | None) -> BaseStorage:
    """The storage at a URL; of None the journal in `folder`. Raises: UserError if no database answers at the URL."""
    if url is None:
        path = str(folder / JOURNAL)
        return JournalStorage(JournalFileBackend(path, lock_obj=_JournalLock(path)))
    try:
        return RDBStorage(url)
    except Exception as error:  # whatever a driver of a database raises, or that it is not installed
        raise UserError(f"search.storage: no database can be used at '{url}'.", found=str(error).splitlines()[0],
                        next="a URL like sqlite:///search.db, or leave it out for a file in the sweep's folder") from None  # fmt: skip


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds a file's lock; waits for whoever has it."""
    handle = _locked(path)
    try:
        yield
    finally:
        os.close(handle)


class _JournalLock(JournalFileOpenLock):
    """For the journal. Half a line at its end, of a writer that was killed or had no room, would spoil the next one: it is cut off."""

    def __init__(self, path: str) -> None:
        self.path, self.handle = Path(path), -1

    def acquire(self) -> bool:
        self.handle = _locked(self.path)
        size = os.fstat(self.handle).st_size
        if size and os.pread(self.handle, 1, size - 1) != b"\n":
            os.ftruncate(self.handle, self.path.read_bytes().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        os.close(self.handle)


def _locked(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with contextlib.suppress(OSError):  # a file system without locks, as some network ones are
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle
