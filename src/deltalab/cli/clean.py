"""`deltalab clean [FOLDER…]`: what stopped runs left, and what finished ones need no more."""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from deltalab.core.errors import UserError
from deltalab.core.files import alive, read_json, remove
from deltalab.core.spec import digest

LEFT = (re.compile(r"\.deltalab-(\d+)-.+"), re.compile(r"\..+\.(\d+)-\d+\.tmp"))
"""Scratch folders and half-written files; both carry the number of their process."""


class Left(NamedTuple):
    """Something to remove, and why."""

    path: Path
    why: str


def command(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="where to look, with all that is below; here if not given")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would be removed, and leave it")] = False,
) -> None:
    """Remove scratch folders and half-written files of processes that are gone, scores that no stage of a study needs
    any more, and checkpoints of finished runs. Results, adapters and records stay; what is in use is left alone.
    """
    roots = folders or [Path(".")]
    for root in roots:
        if not root.is_dir():
            raise UserError(f"'{root}' is no folder.", next="name the folders of runs")
    found = [left for root in roots for left in leftovers(root)]
    found += [left for left in _dead(Path(tempfile.gettempdir())) if left not in found]
    freed = 0
    for left in found:
        size = _size(left.path)
        freed += size
        print(f"{size / 2**20:10.1f} MiB  {left.path}  ({left.why})")
        if not dry_run:
            remove(left.path)
    print(f"{len(found)} found, {freed} bytes ({freed / 2**20:.1f} MiB) {'would be ' if dry_run else ''}freed")


def leftovers(root: Path) -> Iterator[Left]:
    """What may be removed in and below a folder. A folder that a process holds is skipped with all that is in it."""
    for place, names, files in os.walk(root):
        here = Path(place)
        if ".lock" in files and _held(here / ".lock"):
            names.clear()
            continue
        yield from _dead(here)
        if "study.json" in files:
            yield from _scores(here)
        if "checkpoints" in names and _finished(here):
            yield Left(here / "checkpoints", "checkpoints of a finished run")
            names.remove("checkpoints")
        names[:] = sorted(name for name in names if not name.startswith("."))


def _dead(folder: Path) -> list[Left]:
    """Temporaries in a folder whose process is gone."""
    found = []
    for path in sorted(folder.iterdir()):
        for match in (pattern.fullmatch(path.name) for pattern in LEFT):
            if match is not None and not _alive(match[1]):
                found.append(Left(path, f"left by process {match[1]}"))
    return found


def _scores(study: Path) -> Iterator[Left]:
    """The scores of a study whose stages that read them are done: those of all, or those that its groups are made of."""
    spec = read_json(study / "study.json", "study")["spec"]
    score = spec.get("score") or {}
    done = [name for name in ("report", "groups") if (study / name / "result.json").is_file()]
    if score.get("keep") or not done:
        return
    inside = [study / "scores"]
    if score.get("scratch"):
        inside.append(Path(score["scratch"]).expanduser() / f"deltalab-{digest(str(study.resolve()))}")
    for folder in inside:
        for name in ("scores.json", "scores.partial.json"):
            for manifest in sorted(folder.glob(f"*/{name}")):
                yield Left(manifest.parent, "scores that no stage needs any more")


def _finished(run: Path) -> bool:
    """Whether a training is done: it has its record, or is the run of a study's stage that has its result."""
    return (run / "record.json").is_file() or (run.name == "run" and (run.parent / "result.json").is_file())


def _held(lock: Path) -> bool:
    handle = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False


def _alive(number: str) -> bool:
    try:
        return alive(int(number))
    except OverflowError:  # no process has such a number
        return False


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum(file.stat().st_size for file in files)
