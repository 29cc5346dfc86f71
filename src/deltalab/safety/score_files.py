"""Scores: a mapping from module path to one number an entry, in memory or as files, one a matrix.

What is kept is the least that the scores can be rebuilt from, one matrix at a time:

| score     | kept for a matrix                              | score                          |
|-----------|------------------------------------------------|--------------------------------|
| snip      | its mean over samples, (out, in)               | as it is                       |
| wanda     | sums of squares of its inputs, (in,), in fp64  | magnitude · root of the sums   |
| magnitude | nothing                                        | magnitude                      |
| random    | nothing                                        | from the seed                  |

magnitude: |W| or |W − W_base|, of the model at hand, whose weights must be those that were scored. With halves (even and
odd samples) the two halves alone are kept: the whole is their weighted mean, or the root of both sums together.

A folder has one file a matrix and the manifest; `scores.partial.json` in its place means that matrices are missing, and
the same call goes on with these.
"""

import contextlib
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import free_bytes, read_json, remove, write_json, write_with
from deltalab.core.shapes import Float
from deltalab.core.spec import digest
from deltalab.deltas.base import weight_of
from deltalab.models.load import model_digest
from deltalab.safety.magnitudes import Base, Magnitudes, tensor_digest
from deltalab.safety.manifest import IDENTITY, REBUILT, require_same, title

MANIFEST, PARTIAL = "scores.json", "scores.partial.json"
HALVES = ("even", "odd")
Parts = dict[str, Tensor]
"""What is kept for one matrix: `score` or `squares`, or with halves `even` and `odd`."""


class Scores(Mapping[str, Tensor]):
    """Module path → score, (out, in); read, or rebuilt, when asked for.

    manifest: what was scored on what, see docs/safety.md. parts: path → what is kept, in memory (a bare tensor is a
    score). folder: or where it lies. magnitudes: where the score is rebuilt from weights. half: 0 or 1, one half alone.
    """

    def __init__(
        self, manifest: dict[str, Any], parts: Mapping[str, Parts | Tensor] | None = None, folder: Path | None = None,
        magnitudes: Magnitudes | None = None, half: int | None = None,
    ) -> None:  # fmt: skip
        self.manifest, self.folder, self.magnitudes, self._half = manifest, folder, magnitudes, half
        self._memory = None if parts is None else {path: {"score": part} if isinstance(part, Tensor) else part for path, part in parts.items()}  # fmt: skip
        self._whole: Scores | None = None  # what a half came from: temporary files live as long as it does

    def __getitem__(self, path: str) -> Float[Tensor, "out in"]:
        if path not in self.manifest["shapes"]:
            raise UserError(f"'{path}' has no score.", nearest=nearest(path, self.names()))
        match self.manifest["score"]:
            case "wanda":
                magnitude = self._magnitude(path)
                return magnitude * self._squares(path).sqrt().to(magnitude.dtype)
            case "magnitude":
                return self._magnitude(path)
            case "random":
                return random_ranks(self.manifest["seed"], path, self.manifest["shapes"][path])
            case _:
                return self._mean(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest["shapes"])

    def __len__(self) -> int:
        return len(self.manifest["shapes"])

    def __str__(self) -> str:
        lines = [title(self.manifest)]
        for path in self:
            score = self[path].double()
            lines.append(f"  {path}  mean {score.mean():.3g}  median {score.median():.3g}  largest {score.max():.3g}")
        return "\n".join(lines)

    def names(self) -> list[str]:
        """The paths of the scored modules, in model order."""
        return list(self)

    @property
    def halves(self) -> tuple["Scores", ...]:
        """The scores of the even and of the odd samples, counted over the samples that have a counted position.

        Empty if they were computed without halves, or depend on no samples.
        """
        counts = self.manifest.get("halves")
        if not counts:
            return ()
        made = []
        for half, name in enumerate(HALVES):
            manifest = {**self.manifest, **counts[half], "halves": None, "half": name}
            made.append(Scores(manifest, self._memory, self.folder, self.magnitudes, half))
            made[-1]._whole = self
        return tuple(made)

    def save(self, folder: str | Path) -> "Scores":
        """Write what is kept, one file a matrix, the manifest last; returns the scores as read from there.

        Raises: UserError for one half alone.
        """
        if self._half is not None:
            raise UserError("a half is saved with its whole.", next="save the scores that it came from")
        folder = Path(folder)
        for path in self:
            if _is_kept(self.manifest):
                write_parts(folder, path, self._parts(path))
        write_json(folder / MANIFEST, self.manifest)
        return Scores(self.manifest, folder=folder, magnitudes=self.magnitudes)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module | None = None, base: Base | None = None) -> "Scores":
        """Scores saved in `folder`; matrices are read when asked for.

        model, base: what was scored, needed by scores that are rebuilt from its weights (wanda, magnitude).
        Raises: UserError if the manifest or a matrix is missing, or the model or base is not the one that was scored.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).exists() and (folder / PARTIAL).exists():
            raise UserError(f"scores in '{folder}' are incomplete.", found="the computation was stopped", next="give the same command again: it goes on")  # fmt: skip
        manifest = read_json(folder / MANIFEST, "score manifest")
        missing = _missing(folder, manifest)
        if missing:
            raise UserError(f"scores in '{folder}' are incomplete.", found=f"no file for {len(missing)}, the first is {missing[0]}",
                            next="compute the scores again: what is there is kept")  # fmt: skip
        if manifest["score"] not in REBUILT:
            return cls(manifest, folder=folder)
        if model is None:
            raise UserError(f"scores by {manifest['score']} are rebuilt from the model's weights.", found=f"no model was given with '{folder}'",
                            next="Scores.load(folder, model)")  # fmt: skip
        if manifest["base"] is not None and base is None:
            raise UserError(f"scores in '{folder}' are of the difference from a base model.", next="Scores.load(folder, model, base)")  # fmt: skip
        modules = {path: module for path, module in model.named_modules() if path in manifest["shapes"]}
        magnitudes = Magnitudes(model, modules, base)
        here = {"model": model_digest(model), "base": magnitudes.base_digest(), "shapes": magnitudes.shapes}
        require_same(
            manifest, here, ("model", "base", "shapes"), f"the scores in '{folder}' were made of something else."
        )
        return cls(manifest, folder=folder, magnitudes=magnitudes)

    def discard(self) -> None:
        """Remove the files, where there are any; the folder too if nothing else is in it."""
        if self.folder is None:
            return
        for path in self:
            remove(_file(self.folder, path))
        for name in (MANIFEST, PARTIAL):
            remove(self.folder / name)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    # ---- how a matrix is rebuilt -----------------------------------------------------------------------------------

    def _mean(self, path: str) -> Tensor:
        """The mean over samples: kept as it is, or that of the halves' means, each weighted with its samples."""
        parts = self._parts(path)
        if "score" in parts:
            return parts["score"]
        if self._half is not None:
            return parts[HALVES[self._half]]
        even, odd = (count["samples"] for count in self.manifest["halves"])
        return (even * parts["even"] + odd * parts["odd"]) / (even + odd)

    def _squares(self, path: str) -> Tensor:
        """The sums of squares of the inputs, (in,), as a row beside the magnitudes."""
        parts = self._parts(path)
        chosen = list(parts.values()) if self._half is None else [parts[HALVES[self._half]]]
        total = torch.stack(chosen).sum(0)
        assert self.magnitudes is not None
        return total.to(weight_of(self.magnitudes.modules[path]).device)[None, :]

    def _magnitude(self, path: str) -> Tensor:
        assert self.magnitudes is not None
        here = tensor_digest(weight_of(self.magnitudes.modules[path]))
        if here != self.manifest["weights"][path]:
            raise UserError(f"the weights of '{path}' have changed since they were scored.", found=f"{self.manifest['weights'][path]} then, {here} now",
                            next="rebuild the scores before the model is changed, or load it again")  # fmt: skip
        return self.magnitudes[path]

    def _parts(self, path: str) -> Parts:
        if self._memory is not None:
            return self._memory[path]
        assert self.folder is not None
        file = _file(self.folder, path)
        try:
            parts = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"score file '{file}' is missing or damaged.", found=str(error), next="remove it and compute the scores again: the others are kept") from None  # fmt: skip
        shape = self.manifest["shapes"][path]
        expected = shape[1:] if self.manifest["score"] == "wanda" else shape
        for part in parts.values():
            if list(part.shape) != expected:
                raise UserError(f"score file '{file}' has shape {tuple(part.shape)}.", found=f"the manifest says {expected}")  # fmt: skip
        return parts


class Results:
    """Where finished matrices go while scores are computed: memory, or a folder that a later call goes on with.

    missing: the paths that are still to be computed.
    Raises: UserError if the folder holds scores of something else, other files, or has too little space.
    """

    def __init__(self, manifest: dict[str, Any], folder: str | Path | None, nbytes: int = 0) -> None:
        self.manifest = json.loads(json.dumps(manifest))  # as a later call will read it
        self.folder = None if folder is None else Path(folder)
        self.memory: dict[str, Parts] = {}
        self.missing = list(self.manifest["shapes"])
        if self.folder is not None:
            self._go_on(self.folder)
            needed = nbytes * len(self.missing) // max(len(self.manifest["shapes"]), 1)
            if needed > free_bytes(self.folder):
                raise UserError(f"'{self.folder}' has too little space for the scores.", found=f"{free_bytes(self.folder) / 2**20:.1f} MiB free, {needed / 2**20:.1f} MiB needed",
                                next="free some space or choose another folder (score.scratch)")  # fmt: skip

    def _go_on(self, folder: Path) -> None:
        there = sorted(p.name for p in folder.glob("*.safetensors"))
        begun = next((folder / name for name in (MANIFEST, PARTIAL) if (folder / name).exists()), None)
        if begun is not None and (there or begun.name == MANIFEST):  # a beginning without a result binds nobody
            require_same(read_json(begun, "score manifest"), self.manifest, IDENTITY, f"'{folder}' holds scores of something else.",
                         next="choose another folder, or delete this one")  # fmt: skip
            self.missing = _missing(folder, self.manifest)
        elif there:
            raise UserError(f"'{folder}' holds files and no score manifest.", found=", ".join(there[:3]), next="choose another folder, or empty this one")  # fmt: skip

    def begin(self) -> None:
        """Say on disk what is being computed here."""
        if self.folder is not None and not (self.folder / MANIFEST).exists():
            write_json(self.folder / PARTIAL, self.manifest)

    def add(self, path: str, parts: Parts) -> None:
        """Keep what was computed of one matrix."""
        if self.folder is None:
            self.memory[path] = parts
        else:
            write_parts(self.folder, path, parts)

    def finish(self, magnitudes: Magnitudes | None = None, temporary: bool = False) -> Scores:
        """The scores. temporary: remove the folder with them."""
        if self.folder is None:
            return Scores(self.manifest, self.memory, magnitudes=magnitudes)
        write_json(self.folder / MANIFEST, self.manifest)
        remove(self.folder / PARTIAL)
        scores = Scores(self.manifest, folder=self.folder, magnitudes=magnitudes)
        if temporary:
            weakref.finalize(scores, remove, self.folder)
        return scores


def random_ranks(seed: int, path: str, shape: Sequence[int]) -> Float[Tensor, "out in"]:
    """A seeded permutation of the entries of one matrix, as ranks in (0, 1], fp64: no two are equal.

    Ranks are a share of the matrix, so that a group over all matrices draws from each alike.
    """
    generator = torch.Generator().manual_seed(int(digest([seed, path]), 16))
    count = shape[0] * shape[1]
    return ((torch.randperm(count, generator=generator) + 1).double() / count).view(shape[0], shape[1])


def write_parts(folder: Path, path: str, parts: Parts) -> None:
    """Write what is kept of one matrix, whole or not at all."""
    data = save({name: part.detach().cpu().contiguous() for name, part in parts.items()})
    write_with(_file(folder, path), lambda handle: handle.write(data))


def _is_kept(manifest: Mapping[str, Any]) -> bool:
    return manifest["score"] not in ("magnitude", "random")


def _missing(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    return [path for path in manifest["shapes"] if not _file(folder, path).is_file()] if _is_kept(manifest) else []


def _file(folder: Path, path: str) -> Path:
    return folder / f"{path}.safetensors"
