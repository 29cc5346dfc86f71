"""Checkpoints: tensors in safetensors, the rest in JSON, each folder whole or absent.

`checkpoints/step-000100/` holds `trained.safetensors` (what trains), `optimizer.safetensors` (its moments),
`rng.safetensors` (every generator) and `state.json` with the step, the digests of the three files and the identity of
the run: its spec, data and model. `checkpoints/best/` has `trained.safetensors` only.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from deltalab.core.errors import UserError
from deltalab.core.files import disk_faults, file_digest, read_json, remove, replacing, write_json

FORMAT = 1
TENSORS = ("trained", "optimizer", "rng")
FREE = ("output", "track", "run.resume", "run.keep", "run.checkpoint_every", "run.checkpointing", "run.offload")
"""Parts of a spec that may change between start and resume, with all below them: they do not change the result."""


@dataclass(frozen=True)
class Checkpoint:
    """A run at the end of `step`: tensors by file, and the plain rest."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in `folder`, at most `keep` of them beside the best."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder / "checkpoints", keep

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write the checkpoint whole, then remove the oldest beyond the limit."""
        place = self.folder / f"step-{checkpoint.step:06d}"
        with disk_faults(place), replacing(place) as tmp:
            tmp.mkdir()
            files = {}
            for name in TENSORS:
                save_tensors(tmp / f"{name}.safetensors", checkpoint.tensors[name])
                files[name] = file_digest(tmp / f"{name}.safetensors")
            write_json(
                tmp / "state.json", {"format": FORMAT, "step": checkpoint.step, "files": files, **checkpoint.state}
            )
        for old in self._steps()[: -self.keep]:
            remove(old)
        return place

    def save_best(self, trained: dict[str, Tensor], step: int) -> None:
        """Write the best weights so far."""
        with disk_faults(self.folder), replacing(self.folder / "best") as tmp:
            tmp.mkdir()
            save_tensors(tmp / "trained.safetensors", trained)
            write_json(tmp / "state.json", {"step": step})

    def best(self) -> dict[str, Tensor] | None:
        """The best weights, if any were written."""
        path = self.folder / "best" / "trained.safetensors"
        return load_tensors(path) if path.is_file() else None

    def last(self) -> Checkpoint | None:
        """The newest whole checkpoint. A damaged one is passed over for the one before it."""
        for place in reversed(self._steps()):
            try:
                state = read_json(place / "state.json", "checkpoint")
                if any(file_digest(place / f"{name}.safetensors") != state["files"][name] for name in TENSORS):
                    continue
                tensors = {name: load_tensors(place / f"{name}.safetensors") for name in TENSORS}
                return Checkpoint(state["step"], tensors, state)
            except (UserError, OSError, KeyError, TypeError):
                continue
        return None

    def clear(self, *, best: bool = True) -> None:
        """Remove all checkpoints, the best one only if asked."""
        for place in self._steps():
            remove(place)
        if best:
            remove(self.folder / "best")
        if self.folder.is_dir() and not any(p for p in self.folder.iterdir() if not p.name.startswith(".")):
            remove(self.folder)

    def _steps(self) -> list[Path]:
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(p for p in found if re.fullmatch(r"step-\d+", p.name))


def require_same_run(here: dict[str, Any], there: dict[str, Any], folder: Path) -> None:
    """Refuse to resume a checkpoint of another run, naming what differs.

    here, there: identities, `{"spec": {...}, "data": digest, …}`. Raises: UserError.
    """
    differences = [f"{key}: {was!r} there, {now!r} here" for key, was, now in changes(there["spec"], here["spec"])]
    differences += [f"the {key}" for key in here if key != "spec" and here[key] != there.get(key)]
    if differences:
        raise UserError(f"the checkpoint in '{folder}' is of another run, so it cannot be resumed.", found="changed: " + "; ".join(differences),
                        next="undo the change, choose another output folder, or start over with run.resume=false")  # fmt: skip


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs between two plain specs, as (key, old, new), but for keys that do not change the result."""
    a, b = flat(old), flat(new)
    return [
        (key, a.get(key), b.get(key))
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not any(key == free or key.startswith(f"{free}.") for free in FREE)
    ]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A plain spec as keys of overrides, `adapt.0.r`, and what stands there."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}".lstrip(".")).items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{prefix}.{i}").items()}
    return {prefix: value}


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file; a full disk is an OSError as everywhere else."""
    safetensors.torch.save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises: UserError if it is missing or damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{path}' cannot be read.", found=str(error), next="restore it, or run again") from None
