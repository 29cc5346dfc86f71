"""Files that are whole or absent: written beside their place, then renamed; folders that one process owns."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from deltalab.core.errors import UserError


@contextlib.contextmanager
def disk_faults(path: str | Path) -> Iterator[None]:
    """Turns a full disk or a forbidden folder into a `UserError` that names the path and the space left."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full and error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        why = "the disk is full" if full else f"writing is not allowed ({error.strerror})"
        raise UserError(f"cannot write '{path}': {why}.", found=f"{free_bytes(path) / 2**20:.1f} MiB free there",
                        next="free some space or choose another folder; nothing half-written was left") from error  # fmt: skip


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it becomes `path`, on any failure it is removed."""
    path = Path(path)
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield tmp
            _sync(tmp)
            if path.is_dir() and tmp.is_dir():  # a folder cannot be renamed over a full one
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                path.rename(old)
                tmp.rename(path)
                shutil.rmtree(old)
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

    Raises: UserError, naming `what`, if it is missing or cut off.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{what} '{path}' does not exist.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{what} '{path}' is damaged.", found=str(error), next="restore it, or run again") from None


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
    import hashlib

    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:12]


@contextlib.contextmanager
def owned(folder: str | Path, verb: str = "run") -> Iterator[Path]:
    """Makes `folder` and holds it for this process: a second one gets a `UserError`. A crash releases it."""
    folder = Path(folder)
    with disk_faults(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"output '{folder}' is a file, a folder is needed.", next="choose another output folder")
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a+")  # noqa: SIM115 - held until the end
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            raise UserError(f"output folder '{folder}' is in use.", found=f"held by {handle.read().strip() or 'another process'}",
                            next=f"wait for it, or {verb} with another output folder") from None  # fmt: skip
        handle.truncate(0)
        handle.write(f"process {os.getpid()}")
        handle.flush()
        yield folder
    finally:
        handle.close()


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
