"""Curves of a run: rows by step, in memory and as `curves/<name>.jsonl`, cut back to the checkpoint on resume."""

import json
import math
import os
from pathlib import Path
from typing import Any

from deltalab.core.files import disk_faults, remove, write_text


class Curves:
    """Rows `{"step": …, …}` by name. Without a folder they live in memory only."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else folder / "curves"
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def add(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        """Append a row, and return it as it was written. A number that is not finite becomes null, which JSON has."""
        row = _finite(row)
        self.rows.setdefault(name, []).append(row)
        if self.folder is not None:
            with disk_faults(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as handle:
                    handle.write(json.dumps(row) + "\n")
        return row

    def restart(self, step: int) -> None:
        """Keep the rows up to and with `step`, in files and memory; −1 keeps none."""
        self.rows = {}
        for path in sorted(self.folder.glob("*.jsonl")) if self.folder is not None else []:
            rows = [row for row in _read(path) if row["step"] <= step]
            if rows:
                self.rows[path.stem] = rows
                write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
            else:
                remove(path)

    def sync(self) -> None:
        """Push the files to the disk, so that a checkpoint never knows more steps than they do."""
        for path in self.folder.glob("*.jsonl") if self.folder is not None else []:
            with disk_faults(path), open(path, "rb") as handle:
                os.fsync(handle.fileno())


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file; what a killed process left half-written at its end is not one."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _finite(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
