"""Parameter masks: which of the model's own parameters train.

    y = W x + c,   W or c or both as trained      (biases alone: Ben Zaken et al. 2021, arXiv:2106.10199)

Whole parameters, by name. Single entries of a matrix: see `deltalab.deltas.freeze`.
"""

from typing import Any, Literal

from torch import nn

from deltalab.core.errors import UserError, nearest
from deltalab.deltas.select import decoder_blocks, leaf, model_name, pattern_matches
from deltalab.deltas.sites import base_parameters, is_quantised, linears
from deltalab.deltas.spec import ParameterSpec

WHAT = ("full", "bitfit", "norms", "last-n")


class Train(ParameterSpec):
    """Train some of the model's own parameters: `Train("norms")`.

    what: `full` for all; `bitfit` for all biases (Ben Zaken et al. 2021, arXiv:2106.10199); `norms` for the
    normalisation layers; `last-2` for the last two decoder blocks; or names and patterns of parameters or modules,
    as `select` takes them.
    """

    method: Literal["train"] = "train"
    what: str | list[str] = "full"

    def __init__(self, what: Any = "full", **values: Any) -> None:
        super().__init__(what=what, **values)  # type: ignore[call-arg]

    # as of `Spec`, for the same reason
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def parameters(self, model: nn.Module) -> list[str]:
        names = base_parameters(model)
        patterns = self.what if isinstance(self.what, list) else [self.what]
        if not patterns:
            raise UserError("Train names no parameters.", nearest=WHAT)
        for pattern in patterns:
            _refuse_codes(model, pattern)
        chosen = {names[name] for pattern in patterns for name in _named(model, pattern, list(names))}
        return [name for name in dict.fromkeys(names.values()) if name in chosen]


def _refuse_codes(model: nn.Module, pattern: str) -> None:
    """Raises: UserError where `full` or `last-n` would leave out the weights that are quantised, most of the model."""
    if pattern != "full" and not pattern.startswith("last-"):
        return
    codes = [path for path, linear in linears(model).items() if is_quantised(linear)]
    if codes:
        raise UserError(
            f"Train('{pattern}') cannot train '{codes[0]}', which is quantised: codes do not train.",
            found=f"{len(codes)} such linears in {model_name(model)}",
            next="load it without quantising, put a delta on it, or name what may train: Train('norms')",
        )


def _above(name: str) -> list[str]:
    """A parameter's name and the paths of the modules that it lies in."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _named(model: nn.Module, pattern: str, names: list[str]) -> list[str]:
    """The parameters that one entry of `Train.what` names. Raises: UserError if it names none."""
    if pattern == "full":
        return names
    if pattern == "bitfit":
        found = [name for name in names if leaf(name) == "bias"]
        if not found:
            raise UserError(
                f"{model_name(model)} has no biases, so 'bitfit' trains nothing.", nearest=["norms", "last-n", "full"]
            )
        return found
    if pattern == "norms":
        norms = [name for name, m in model.named_modules() if "norm" in type(m).__name__.lower()]
        found = [name for name in names if name.rpartition(".")[0] in norms]
        if not found:
            raise UserError(
                f"{model_name(model)} has no normalisation layers with parameters.", nearest=["last-n", "full"]
            )
        return found
    if pattern.startswith("last-") and pattern[5:] not in names:
        path, blocks = decoder_blocks(model)
        if not pattern[5:].isdigit() or not 1 <= int(pattern[5:]) <= len(blocks):
            raise UserError(
                f"'{pattern}' names no blocks of {model_name(model)}.",
                found=f"{len(blocks)} blocks",
                nearest=["last-1", f"last-{len(blocks)}"],
            )
        last = tuple(f"{path}.{i}." for i in range(len(blocks) - int(pattern[5:]), len(blocks)))
        return [name for name in names if name.startswith(last)]
    found = [name for name in names if any(pattern_matches(pattern, part) for part in _above(name))]
    if not found:
        parts = {leaf(part) for name in names for part in _above(name)}
        raise UserError(f"'{pattern}' matches no parameter of {model_name(model)}.", nearest=nearest(pattern, [*WHAT, *sorted(parts)]),
                        next="names as in model.named_parameters(), patterns, or: " + ", ".join(WHAT))  # fmt: skip
    return found
