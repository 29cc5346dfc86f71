"""What a run leaves: rows as JSON with the machine, a line of history each, and what got worse since."""

import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import LEAST, ROOT, Row
from deltalab.core.files import read_json, write_json, write_text
from deltalab.core.records import git_revision

HISTORY = ROOT / "benchmarks" / "history.jsonl"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")
EARLIER = 5
"""A ratio is compared with the median of so many runs before it on the same machine."""
NOISE = 0.005
"""Less than this part of a ratio is never a change."""


def machine() -> dict[str, Any]:
    """What the figures belong to: processor, threads, versions, revision of the source."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    return {
        "processor": processor(),
        "cores": len(_cores()),
        "threads": torch.get_num_threads(),
        "memory": f"{_memory() / 2**30:.0f} GiB",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "revision": git_revision(),
    }


def processor() -> str:
    """The model's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cores() -> Sequence[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def write(folder: Path, name: str, about: str, command: str, rows: Iterable[Row], quick: bool) -> Path:
    """The rows of one benchmark and number of threads as `FOLDER/NAME-THREADSt.json`, whole or not at all."""
    here = machine()
    file = folder / f"{name}-{here['threads']}t.json"
    found = {
        "benchmark": name, "about": about, "command": command, "date": now(), "quick": quick, "machine": here,
        "rows": [asdict(row) | {"reached": row.reached, "same": row.same} for row in rows],
    }  # fmt: skip
    write_json(file, found)
    return file


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def lines_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of history of one result: who measured what when, and the ratio with its quartiles."""
    here = found["machine"]
    return [
        {
            "date": found["date"], "revision": here["revision"], "machine": f"{here['processor']}, {here['device']}, {here['cores']} cores",
            "threads": here["threads"], "benchmark": found["benchmark"], "what": row["what"], "setting": row["setting"],
            "of": row["of"], "better": "more" if row["direction"] == LEAST else "less", **row["ratio"],
        }
        for row in found["rows"]
    ]  # fmt: skip


def history(file: Path = HISTORY) -> list[dict[str, Any]]:
    """All lines, oldest first; a line that was cut off is left out."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def remember(found: dict[str, Any], file: Path = HISTORY) -> list[str]:
    """Adds a result to the history. Returns what got worse."""
    before, new = history(file), lines_of(found)
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [*before, *new]))
    return worse(before, new)


def worse(before: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each new ratio that is worse than those before by more than its own spread.

    The spread is from quartile to quartile, of the new ratio or of those before, whichever is wider.
    """
    said = []
    for line in new:
        earlier = [old for old in before if _key(old) == _key(line)][-EARLIER:]
        if not earlier:
            continue
        usual = statistics.median(old["median"] for old in earlier)
        spread = max(line["high"] - line["low"], statistics.median(old["high"] - old["low"] for old in earlier), NOISE * usual)  # fmt: skip
        lost = usual - line["median"] if line["better"] == "more" else line["median"] - usual
        if lost > spread:
            said.append(
                f"{line['benchmark']}: {line['what']}, {line['setting']}, {line['threads']} thread(s): {line['of']} "
                f"{line['median']:.3g}, was {usual:.3g} (spread {spread:.2g}, last {earlier[-1]['revision']})"
            )
    return said


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[key] for key in ("machine", "threads", "benchmark", "what", "setting", "of"))


def latest(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What got worse in the newest line of each row."""
    newest = {_key(line): i for i, line in enumerate(lines)}
    return [text for i in sorted(newest.values()) for text in worse(lines[:i], [lines[i]])]


def read(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, by benchmark and threads."""
    found = [read_json(file, "result") for file in sorted(folder.glob("*.json"))]
    return sorted((f for f in found if "benchmark" in f), key=lambda f: (f["benchmark"], f["machine"]["threads"]))
