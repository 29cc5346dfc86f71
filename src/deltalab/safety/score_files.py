"""Scores as files: one matrix a file, a manifest beside them, read back one at a time."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import read_json, remove, write_json, write_with
from deltalab.core.shapes import Float

MANIFEST = "scores.json"


class Scores(Mapping[str, Tensor]):
    """Module path → score, (out, in), in memory or read from disk one matrix at a time.

    manifest: what was scored on what: score, positions, samples, skipped, tokens, dtype, digests of model, data and
    template, shapes.
    """

    def __init__(
        self, manifest: dict[str, Any], tensors: dict[str, Tensor] | None = None, folder: Path | None = None
    ) -> None:
        self.manifest, self.folder, self._tensors = manifest, folder, tensors

    def __getitem__(self, path: str) -> Float[Tensor, "out in"]:
        if path not in self.manifest["shapes"]:
            raise UserError(f"'{path}' has no score.", nearest=nearest(path, self.names()))
        if self._tensors is not None:
            return self._tensors[path]
        assert self.folder is not None
        file = _file(self.folder, path)
        try:
            with safe_open(file, "pt") as handle:
                score = handle.get_tensor("score")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"score file '{file}' is missing or damaged.", found=str(error), next="compute the scores again"
            ) from None
        if list(score.shape) != self.manifest["shapes"][path]:
            raise UserError(
                f"score file '{file}' has shape {tuple(score.shape)}.",
                found=f"the manifest says {self.manifest['shapes'][path]}",
            )
        return score

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest["shapes"])

    def __len__(self) -> int:
        return len(self.manifest["shapes"])

    def __str__(self) -> str:
        m = self.manifest
        lines = [
            f"{m['score']} of {len(self)} matrices over {m['samples']} samples ({m['positions']} positions, {m['tokens']} tokens)"
        ]
        for path in self:
            score = self[path].double()
            lines.append(f"  {path}  mean {score.mean():.3g}  median {score.median():.3g}  largest {score.max():.3g}")
        return "\n".join(lines)

    def names(self) -> list[str]:
        """The paths of the scored modules, in model order."""
        return list(self)

    def save(self, folder: str | Path) -> "Scores":
        """Write one file a matrix, the manifest last; returns the scores as read from there."""
        folder = Path(folder)
        for path in self:
            write_score(folder, path, self[path])
        write_json(folder / MANIFEST, self.manifest)
        return Scores(self.manifest, folder=folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Scores":
        """Scores saved in `folder`; matrices are read when asked for.

        Raises: UserError if the manifest or a matrix is missing.
        """
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST, "score manifest")
        missing = [path for path in manifest["shapes"] if not _file(folder, path).is_file()]
        if missing:
            raise UserError(f"scores in '{folder}' are incomplete.", found=f"no file for {len(missing)}, the first is {missing[0]}",
                            next="compute the scores again")  # fmt: skip
        return cls(manifest, folder=folder)

    def discard(self) -> None:
        """Remove the files, where there are any; the folder too if nothing else is in it."""
        if self.folder is None:
            return
        for path in self:
            remove(_file(self.folder, path))
        remove(self.folder / MANIFEST)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def write_score(folder: Path, path: str, score: Float[Tensor, "out in"]) -> None:
    """Write one matrix's score, whole or not at all."""
    data = save({"score": score.detach().cpu().contiguous()})
    write_with(_file(folder, path), lambda handle: handle.write(data))


def _file(folder: Path, path: str) -> Path:
    return folder / f"{path}.safetensors"
