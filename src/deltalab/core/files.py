"""Files that are whole or absent: written beside their place, then renamed; folders that one process owns."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from deltalab.core.errors import UserError

_FORBIDDEN = (errno.EACCES, errno.EROFS, errno.EPERM)
_counter = itertools.count()


@contextlib.contextmanager
def disk_faults(path: str | Path) -> Iterator[None]:
    """Turns a full disk or a forbidden folder into a `UserError` that names the path and the space left.

    Libraries wrap the system's error in their own kinds (safetensors' is no OSError), so their text is read as well.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or "StorageFull" in str(error):
            why = "the disk is full"
        elif code in _FORBIDDEN:
            why = f"writing is not allowed ({os.strerror(code)})"
        elif code == errno.ENOTDIR or isinstance(error, FileExistsError):
            why = "a part of the path is a file, not a folder"
        else:
            raise
        raise UserError(f"cannot write '{path}': {why}.", found=f"{free_bytes(path) / 2**20:.1f} MiB free there without it",
                        next="free some space or choose another folder; nothing half-written was left") from error  # fmt: skip


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or a folder; on success it becomes `path`.

    On any failure, Ctrl-C included, it is removed and what stood at `path` stays. What a killed process left beside
    `path` is removed first.
    """
    path = Path(path)
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        tmp = path.with_name(f".{path.name}.{os.getpid()}-{next(_counter)}.tmp")
        try:
            yield tmp
            _sync(tmp)
            if path.is_dir() and tmp.is_dir():
                _exchange(tmp, path)  # a folder cannot be renamed over a full one; the old one is now `tmp`
            else:
                tmp.replace(path)
        finally:
            remove(tmp)


def write_with(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically through `write(handle)`."""
    with replacing(path) as tmp, open(tmp, "wb") as handle:
        write(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_with(path, lambda handle: handle.write(text.encode()))


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Write a JSON file atomically. NaN and infinities are refused: they are no JSON."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False, default=_plain) + "\n")


def read_json(path: str | Path, what: str = "file") -> Any:
    """Read a JSON file.

    Raises: UserError, naming `what`, if it is missing, unreadable or cut off.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} '{path}' does not exist.") from None
    except ValueError as error:
        raise UserError(f"{what} '{path}' is damaged.", found=str(error), next="restore it, or run again") from None
    except OSError as error:
        raise UserError(f"{what} '{path}' cannot be read.", found=str(error.strerror)) from None


def remove(path: str | Path) -> None:
    """Remove a file or a folder tree, if it is there."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def free_bytes(path: str | Path) -> int:
    """Free space where `path` is or will be."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def file_digest(path: str | Path) -> str:
    """Twelve hex digits of the SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:12]


class InUse(UserError):
    """A folder that another process holds."""


@contextlib.contextmanager
def owned(folder: str | Path, verb: str = "run") -> Iterator[Path]:
    """Makes `folder` and holds it for this process: a second one gets `InUse`. A crash releases it."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output '{folder}' is a file, a folder is needed.", next="choose another output folder")
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"output folder '{folder}' is in use.", found=f"held by {os.read(lock, 100).decode() or 'another process'}",
                            next=f"wait for it, or {verb} with another output folder") from None  # fmt: skip
        except OSError:
            pass  # a file system without locks, as some network ones are: two runs are then the user's to keep apart
        with contextlib.suppress(OSError):  # the holder's name is a courtesy; a full disk is told of by what matters
            os.ftruncate(lock, 0)
            os.write(lock, f"process {os.getpid()}".encode())
        yield folder
    finally:
        os.close(lock)


def _sweep(path: Path) -> None:
    """Remove the temporary files beside `path` whose process is gone."""
    for left in path.parent.glob(f".{_escaped(path.name)}.*.tmp"):
        pid = left.name.removesuffix(".tmp").rpartition(".")[2].partition("-")[0]
        if pid.isdigit() and not alive(int(pid)):
            remove(left)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def alive(pid: int) -> bool:
    """Whether there is a process of this number, another user's included."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders, in one step where the system can (Linux): no moment without a folder at `old`."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None, use_errno=True)
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if libc.renameat2(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0:
            return
    aside = old.with_name(f".{old.name}.{os.getpid()}-{next(_counter)}.tmp")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


def _sync(path: Path) -> None:
    """Push a file, or each file of a folder, to disk before it is renamed into place."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def _plain(value: Any) -> Any:
    """JSON for paths, numpy and torch values."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON")
