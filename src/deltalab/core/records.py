"""Records: what a run did, immutable, enough to report on it, judge it again, or run it again.

A record is a folder with `record.json` (spec and its digest, versions, git revision, seed, device, data digests,
measures, times) and, beside it, what is too long for it: curves, generations, adapters.
"""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from deltalab.core.errors import UserError
from deltalab.core.files import read_json, write_json
from deltalab.core.spec import Spec

FORMAT = 1
PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "tokenizers", "numpy", "scipy", "lm-eval")


def environment() -> dict[str, Any]:
    """Versions, machine and source revision: what a reader needs to judge whether two runs are comparable."""
    versions = {"python": platform.python_version()}
    for name in ("deltalab", *PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "git": git_revision(), "machine": {"system": platform.system(), "arch": platform.machine(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}}  # fmt: skip


def git_revision(file: str | Path = __file__) -> str | None:
    """The revision of the source tree that tracks `file`, `+` appended if the tree has changes.

    None outside a repository, and for a package installed into an environment that happens to lie in one.
    """
    file = Path(file)

    def git(*args: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(file.parent), *args], capture_output=True, text=True, timeout=5, check=True
        )
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_record(folder: str | Path, kind: str, spec: Spec, body: dict[str, Any]) -> Path:
    """Write `record.json` into `folder`, atomically; a record of the same spec is replaced.

    kind: what made it, `train` or `drift`. body: measures, data digests, times; JSON types only.
    Raises: UserError if a record of another spec is there already.
    """
    path = Path(folder) / "record.json"
    if path.exists() and read_record(path)["digest"] != spec.digest():
        raise UserError(f"'{folder}' already holds the record of another spec.", next="choose another output folder")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(path, {"format": FORMAT, "kind": kind, "written": now, "digest": spec.digest(), "spec": spec.plain(),
                      **environment(), **body})  # fmt: skip
    return path


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read the record in `folder` (or the `record.json` itself).

    Raises: UserError if there is none, it is damaged, or a newer format.
    """
    path = Path(folder)
    path = path if path.suffix == ".json" else path / "record.json"
    if not path.is_file():
        below = sorted(str(p.parent) for p in Path(folder).glob("*/record.json")) if Path(folder).is_dir() else []
        raise UserError(f"no record in '{folder}'.", found=f"records in: {', '.join(below)}" if below else "no record.json there",
                        nearest=below[:3], next="a finished `deltalab study` or `deltalab train` leaves one")  # fmt: skip
    record = read_json(path, "record")
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise UserError(
            f"'{path}' is no record of deltalab.", next="a finished `deltalab study` or `deltalab train` leaves one"
        )
    if record["format"] > FORMAT:
        raise UserError(f"record '{path}' has format {record['format']}.", found=f"this version reads up to {FORMAT}",
                        next="update deltalab")  # fmt: skip
    return dict(record)
