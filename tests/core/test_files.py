"""Files that are whole or absent, whatever happens while they are written."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from deltalab.core import files
from deltalab.core.errors import UserError
from tests.helpers import small_disk


def listing(folder: Path) -> list[str]:
    """Everything below a folder, hidden names included."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    with small_disk(tmp_path / "disk") as folder:
        yield folder


class Stop(BaseException):
    """Something no code expects."""


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, fault: type[BaseException], before: str | None) -> None:
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(fault), files.replacing(path) as tmp:
        tmp.write_text("half")
        raise fault
    assert listing(tmp_path) == ([] if before is None else ["a.txt"])
    assert before is None or path.read_text() == before


@pytest.mark.parametrize("fault", [None, ValueError])
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_folder_is_replaced_as_a_whole(
    tmp_path: Path, fault: type[BaseException] | None, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *a, **k: None)
    path = tmp_path / "out"
    for content in ("one", "two"):
        with files.replacing(path) as tmp:
            (tmp / "below").mkdir(parents=True)
            (tmp / "below" / content).write_text(content)
    if fault:
        with pytest.raises(fault), files.replacing(path) as tmp:
            tmp.mkdir()
            raise fault
    assert listing(tmp_path) == ["out", "out/below", "out/below/two"]


def test_a_folder_whose_second_rename_fails_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *a, **k: None)
    path, rename = tmp_path / "out", Path.rename
    path.mkdir()
    (path / "old").write_text("old")

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp") and target == path and (self / "new").exists():
            raise OSError(errno.EIO, "cannot")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="cannot"), files.replacing(path) as tmp:
        tmp.mkdir()
        (tmp / "new").write_text("new")
    assert listing(tmp_path) == ["out", "out/old"]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    path = tmp_path / "a[1].json"
    code = "import sys, time; from deltalab.core.files import replacing\nwith replacing(sys.argv[1]) as t: t.write_text('half'); print('in', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    child.stdout.readline()
    files.write_json(path, 1)  # while the other lives, its file stays
    assert len(listing(tmp_path)) == 2
    child.send_signal(signal.SIGKILL)
    child.wait()
    files.write_json(path, 2)
    assert listing(tmp_path) == [path.name]
    assert files.read_json(path) == 2


def test_threads_that_write_one_file_leave_one_of_their_values(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    threads = [threading.Thread(target=files.write_json, args=(path, [i] * 1000)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(files.read_json(path))) == 1
    assert listing(tmp_path) == ["a.json"]


def test_json_takes_arrays_and_refuses_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "below" / "a.json"
    files.write_json(path, {"a": np.arange(3), "b": torch.ones(2), "c": Path("x"), "d": np.float32(0.5), "e": "Δ"})
    assert files.read_json(path) == {"a": [0, 1, 2], "b": [1.0, 1.0], "c": "x", "d": 0.5, "e": "Δ"}
    before = path.read_bytes()
    for bad in (float("nan"), float("inf"), object(), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            files.write_json(path, {"a": bad})
    assert path.read_bytes() == before
    assert listing(path.parent) == ["a.json"]


@pytest.mark.parametrize("cut", [0, 1, 20, -2])
def test_a_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"some": ["thing", "that", "is", "long"]})[:cut])
    with pytest.raises(UserError, match="score file .*a.json' is damaged"):
        files.read_json(path, "score file")


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"record '.*x' does not exist"):
        files.read_json(tmp_path / "x", "record")
    with pytest.raises(UserError, match=r"cannot be read.*\n.*directory"):
        files.read_json(tmp_path)
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="damaged"):
        files.read_json(tmp_path / "b")


def test_a_full_disk_is_said_and_leaves_nothing(disk: Path) -> None:
    files.write_text(disk / "small", "fits")
    with pytest.raises(
        UserError, match=r"cannot write .*: the disk is full\.\n  found: 1\.0 MiB free there without it"
    ):
        files.write_text(disk / "big", "x" * 2**21)
    with pytest.raises(UserError, match="the disk is full"), files.replacing(disk / "out") as tmp:
        tmp.mkdir()
        safetensors.torch.save_file({"w": torch.zeros(2**19)}, tmp / "a.safetensors")
    assert listing(disk) == ["small"]


def test_a_full_disk_still_lets_a_folder_be_owned(disk: Path) -> None:
    handle = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(handle, b"x" * 4096)
    os.close(handle)
    assert files.free_bytes(disk) == 0
    with files.owned(disk):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_faults_of_the_system_become_the_users(tmp_path: Path, code: int) -> None:
    with pytest.raises(UserError, match="cannot write"), files.disk_faults(tmp_path):
        raise OSError(code, "why")
    with pytest.raises(OSError, match="why"), files.disk_faults(tmp_path):
        raise OSError(errno.EIO, "why")


def test_a_path_through_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    for call in (
        lambda: files.write_text(tmp_path / "f" / "x", ""),
        lambda: files.owned(tmp_path / "f" / "x").__enter__(),
    ):
        with pytest.raises(UserError, match="a file, not a folder"):
            call()
    with pytest.raises(UserError, match="is a file, a folder is needed"), files.owned(tmp_path / "f"):
        pass


def test_a_folder_has_one_owner_across_processes(tmp_path: Path) -> None:
    code = "import sys, time; from deltalab.core.files import owned\nwith owned(sys.argv[1]): print('in', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    child.stdout.readline()
    try:
        with (
            pytest.raises(UserError, match=rf"in use\.\n  found: held by process {child.pid}\n  next: wait"),
            files.owned(tmp_path / "out"),
        ):
            pass
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with files.owned(tmp_path / "out") as folder:  # a crash releases it
        assert (folder / ".lock").read_text() == f"process {os.getpid()}"


def test_a_file_system_without_locks_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with files.owned(tmp_path / "out") as folder:
        assert folder.is_dir()


def test_processes_that_may_not_be_signalled_count_as_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: int) -> None:
        raise PermissionError

    assert files.alive(os.getpid())
    monkeypatch.setattr(files.os, "kill", forbidden)
    assert files.alive(os.getpid())


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path, stop, seen = tmp_path / "a.json", threading.Event(), set()
    files.write_json(path, [0] * 20000)

    def read() -> None:
        while not stop.is_set():
            values = files.read_json(path)
            seen.add((len(values), len(set(values))))

    reader = threading.Thread(target=read)
    reader.start()
    until = time.monotonic() + 0.5
    for i in range(1, 1000):
        files.write_json(path, [i] * 20000)
        if time.monotonic() > until:
            break
    stop.set()
    reader.join()
    assert seen == {(20000, 1)}


def test_digests_are_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert re.fullmatch("[0-9a-f]{12}", files.file_digest(tmp_path / "a"))
    assert files.file_digest(tmp_path / "a") == "ba7816bf8f01"  # SHA-256's own test vector
