"""What a score was computed on and how, as JSON: the identity that a folder is checked against."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from deltalab.core.errors import UserError
from deltalab.core.spec import digest
from deltalab.deltas.weights import attached, is_adapted
from deltalab.models.load import model_digest
from deltalab.safety.calibration import Calibration
from deltalab.safety.magnitudes import Magnitudes, tensor_digest

MODES = ("resident", "streamed")
REBUILT = ("wanda", "magnitude")
"""Scores that need the model's weights to be read."""

IDENTITY = (
    "score", "positions", "samples", "model", "adapted", "base", "data", "template", "seed", "dtype", "batch", "halves", "shapes",
)  # fmt: skip
"""Keys of the manifest that have to agree before a folder is gone on with. The mode may differ: the numbers do not."""

COMPARABLE = ("score", "positions", "model", "adapted", "base", "template", "dtype", "shapes")
"""Keys that have to agree before two scores are compared or subtracted: all but the data."""


def describe(
    score: str, reduction: str, model: nn.Module, weights: Magnitudes, data: Calibration | None = None, *,
    template: str | None = None, batch: int | None = None, halves: bool = False, mode: str | None = None, seed: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of a score.

    score, reduction (in words), positions, samples, tokens (counted), skipped (samples without a counted position),
    halves (samples and tokens of each, or null), dtype of the score, seed (of random scores), template, data, model,
    adapted (what was put on the model, or null), base, weights (path → digest, where scores are rebuilt from them):
    digests of twelve hex digits; batch, mode, shapes (path → [out, in]).
    Raises: UserError for an unknown mode, or halves of a single sample.
    """
    if mode is not None and mode not in MODES:
        raise UserError(f"'{mode}' is no mode.", nearest=MODES)
    if halves and data is not None and len(data.samples) < 2:
        raise UserError("one sample has no halves.", next="give more samples, or leave halves out")
    counts: Mapping[str, int] = data.counts() if data is not None else {"samples": 0, "tokens": 0}
    return {
        "score": score, "reduction": reduction, "positions": data.positions if data is not None else None, **counts,
        "skipped": data.total - counts["samples"] if data is not None else 0,
        "halves": [data.counts(half) for half in (0, 1)] if halves and data is not None else None,
        "dtype": str(weights.dtype).removeprefix("torch."), "seed": seed, "template": digest(template) if template is not None else None,
        "data": data.digest if data is not None else None, "model": model_digest(model), "adapted": adapted_digest(model),
        "base": weights.base_digest(), "weights": weights.digests() if score in REBUILT else None, "batch": batch, "mode": mode,
        "shapes": weights.shapes,
    }  # fmt: skip


def require_same(
    there: Mapping[str, Any], here: Mapping[str, Any], keys: Sequence[str], asked: str, *, next: str = "score both on the same"
) -> None:  # fmt: skip
    """Raises: UserError saying `asked`, and for each of these keys in which two manifests differ what is there and here."""
    different = [key for key in keys if there.get(key) != here.get(key)]
    if different:
        raise UserError(
            asked, found="; ".join(_difference(key, there.get(key), here.get(key)) for key in different), next=next
        )


def title(manifest: Mapping[str, Any]) -> str:
    """What was scored, in one line."""
    m = manifest
    what = f"{m['score']} of {len(m['shapes'])} matrices"
    if m["score"] == "random":
        return f"{what}, seed {m['seed']}"
    what += "" if m["base"] is None else ", difference from a base model"
    return (
        what
        if m["data"] is None
        else f"{what} over {m['samples']} samples ({m['positions']} positions, {m['tokens']} tokens)"
    )


def adapted_digest(model: nn.Module) -> str | None:
    """Twelve hex digits of an adapted model's every tensor and of which deltas are on; None for a plain model.

    `model_digest` is of the base weights alone, and scores are of what the model computes.
    """
    if not is_adapted(model):
        return None
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor_digest(tensor)}\n".encode())
    for path, delta in attached(model).items():
        found.update(f"{path} {delta.enabled}\n".encode())
    return found.hexdigest()[:12]


def _difference(key: str, there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):  # of matrices: name the first, not all
        paths = [path for path in {**there, **here} if there.get(path) != here.get(path)]
        return f"{key} of {len(paths)} matrices, the first is {paths[0]}: {there.get(paths[0])} there, {here.get(paths[0])} here"
    return f"{key}: {there!r} there, {here!r} here"
