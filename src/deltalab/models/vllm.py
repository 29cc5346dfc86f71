"""An adapter as vLLM serves it: plain pairs A, B of one rank on linears, with one scale.

vLLM multiplies every pair by the one scale α / r of the config and reserves room for one of a few ranks. So each delta
goes out by its factors, ΔW = s · B A, as the pair A, s B, with rows and columns of zeros up to the next rank that there
is room for, and α = r. Whatever has such a form is taken, by whatever method it was trained.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.base import Delta, Factors, WeightDelta
from deltalab.deltas.lowrank import LowRankSpec
from deltalab.deltas.peft_config import method_of, peft_where
from deltalab.deltas.peft_own import PREFIX, task_of
from deltalab.deltas.select import model_name
from deltalab.deltas.sites import place
from deltalab.deltas.weights import adaptation, attached

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that `vllm serve --max-lora-rank` takes."""
A_KEY, B_KEY = "lora_A.weight", "lora_B.weight"


@torch.no_grad()
def as_vllm(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of the active adapter, in peft's form, by vLLM's rules. dtype: of the tensors.

    Raises: UserError, by name, for what vLLM has no form of.
    """
    _require_deltas_alone(model)
    deltas = attached(model)
    pairs = {path: pair_of(model, path, delta) for path, delta in deltas.items()}
    rank = rank_for({path: len(A) for path, (A, _) in pairs.items()})
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        for key, value in zip((A_KEY, B_KEY), padded(*pair, rank), strict=True):
            value = value.to("cpu", dtype).contiguous()
            if not bool(value.isfinite().all()):
                raise UserError(
                    f"the adapter on '{path}' holds values that are not finite in {str(dtype).removeprefix('torch.')}.",
                    next="--dtype float32" if dtype is torch.float16 else "train it again with a smaller learning rate",
                )
            tensors[f"{PREFIX}{path}.{key}"] = value
    return _config(model, list(pairs), rank), tensors


def pair_of(model: nn.Module, path: str, delta: Delta) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """A and s B of one delta. Raises: UserError with the reason why it has none that vLLM takes."""
    name, held = type(delta).__name__.removesuffix("Delta"), place(model, path)
    if not isinstance(delta, WeightDelta):
        raise UserError(
            f"{name} on '{path}' depends on the input: it is no change of the weight, and vLLM has no form of it.",
            next="serve it with deltalab generate or deltalab chat",
        )
    if held.kind != "linear":
        raise _refused(f"vLLM takes pairs on linears, and '{path}' is {_A.get(held.kind, held.kind)}.")
    if held.module is getattr(model, "get_output_embeddings", lambda: None)():
        raise _refused(f"vLLM takes no pair on the output layer, '{path}'.")
    if delta.keep is not None:
        raise _refused(f"entries of '{path}' are held in place, so its change has no low rank.")
    factors: Factors | None = delta.factors()
    bias = getattr(held.module, "bias", None)
    if factors is None or (bias is not None and delta.adapted_bias(bias) is not bias):
        raise _refused(f"{name} on '{path}' is not a pair A, B alone, and vLLM loads nothing else.")
    A, B, s = factors
    return A.detach(), s * B.detach()


def rank_for(ranks: Mapping[str, int]) -> int:
    """The smallest rank of vLLM's that holds all of these. Raises: UserError if the largest does not."""
    path = max(ranks, key=lambda path: ranks[path])
    if ranks[path] > RANKS[-1]:
        raise _refused(f"the change of '{path}' has rank {ranks[path]}; vLLM takes at most {RANKS[-1]}.")
    return next(rank for rank in RANKS if rank >= ranks[path])


def padded(
    A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], rank: int
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """The same product from a pair of a larger rank: zeros behind."""
    return nn.functional.pad(A, (0, 0, 0, rank - len(A))), nn.functional.pad(B, (0, rank - B.shape[1]))


_A = {"embedding": "an embedding", "experts": "a stack of experts", "attention": "an attention", "mlp": "an MLP"}


def _require_deltas_alone(model: nn.Module) -> None:
    """Raises: UserError if the adapter is more than its deltas, or belongs to another base than the one that is served."""
    state = adaptation(model)
    if not attached(model):
        what = f"trains {next(iter(state.start))} alone" if state.start else "has no adapter"
        raise UserError(
            f"{model_name(model)} {what}, so there is no pair A, B to export.",
            next="deltalab export … --for merged" if state.start else "deltalab.load_adapter(model, folder) first",
        )
    if state.start:
        raise _refused(
            f"the adapter trains the model's own '{next(iter(state.start))}' too, and vLLM loads pairs A, B alone.",
            f"{len(state.start)} such parameters",
        )
    if state.prepared:
        raise _refused(
            f"the adapter belongs to a base of its own: its start took a part of '{next(iter(state.prepared))}' "
            "before the rest was quantised, and vLLM would put it on the whole weight."
        )


def _config(model: nn.Module, paths: list[str], rank: int) -> dict[str, Any]:
    """peft's words for pairs of one rank on these linears: leaf names where they mean no other linear."""
    config: dict[str, Any] = {
        "peft_type": LowRankSpec.peft_type, "task_type": task_of(model), "inference_mode": True,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "bias": "none",
        "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None,
    }  # fmt: skip
    transposed = any(isinstance(place(model, path).module, Conv1D) for path in paths)
    where = peft_where(model, paths, method_of(config), config)
    return config | (where or {"target_modules": paths, "fan_in_fan_out": transposed})


def _refused(asked: str, found: str = "") -> UserError:
    return UserError(asked, found=found, next="deltalab export … --for merged, which vLLM serves as a model of its own")
