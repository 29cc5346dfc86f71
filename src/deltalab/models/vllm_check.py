"""Whether vLLM's loader takes an adapter folder and computes what peft computes with it, found out from the files alone.

What is relied on: vLLM reads `adapter_config.json` and `adapter_model.safetensors`, takes the tensors by their keys, and
multiplies every pair by one scale, lora_alpha / r, or lora_alpha / √r with `use_rslora`, which it does read. It does not
read `rank_pattern`, `alpha_pattern` and options of a start, and says nothing: those are faults here where they matter.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from deltalab.core.errors import UserError
from deltalab.deltas.lowrank import LowRankSpec, by_pattern
from deltalab.deltas.peft_config import ABOUT, WHERE
from deltalab.deltas.peft_format import CONFIG, WEIGHTS
from deltalab.deltas.peft_own import PREFIX
from deltalab.deltas.select import leaf
from deltalab.models.vllm import RANKS

PAIR = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.lora_(?P<which>[AB])\.weight")
KNOWN = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_dora",
         "ensure_weight_tying"}  # fmt: skip
"""Keys that are looked at here, or change nothing of a trained pair."""
MOVES_THE_BASE = ("pissa", "olora", "corda")
"""Starts of peft that take a part out of the base weights: the saved pair is for what is left of them."""
OTHERS = {
    r"lora_magnitude_vector(\.weight)?$": "a magnitude vector (DoRA); vLLM loads pairs A, B alone",
    r"\.bias$": "a bias; vLLM loads pairs A, B alone",
    r"lora_embedding_[AB]$": "a pair on an embedding; vLLM takes pairs on linears",
    r"^(?!.*lora_).*\.weight$": "a whole weight (modules_to_save); vLLM loads pairs A, B alone",
}
"""What a key that is no pair's may be, the first that matches."""
OUTER = {"lm_head": "the output layer", "embed_tokens": "the embeddings"}


def check_vllm(folder: str | Path) -> list[str]:
    """What keeps vLLM from loading the adapter in `folder`, or makes it compute something else; empty: nothing.

    Raises: UserError if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"adapter folder '{folder}' does not exist.", next="give a folder that deltalab export wrote")
    problems: list[str] = []
    config = _config(folder, problems)
    tensors = _tensors(folder, problems)
    if config is not None:
        problems += _of_config(config)
    if tensors is not None:
        problems += _of_keys(tensors)
        problems += _of_values(tensors)
    if config is not None and tensors is not None:
        problems += _of_ranks(config, _pairs(tensors))
    return problems


def _config(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"there is no {CONFIG}")
    except ValueError as error:
        problems.append(f"{CONFIG} is damaged: {error}")
    else:
        if isinstance(config, dict):
            return config
        problems.append(f"{CONFIG} is no mapping")
    return None


def _tensors(folder: Path, problems: list[str]) -> dict[str, Tensor] | None:
    if not (folder / WEIGHTS).is_file():
        pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()]
        problems.append(
            f"there is no {WEIGHTS}" + (f"; {pickled[0]} is pickled: save it as safetensors" if pickled else "")
        )
        return None
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except safetensors.SafetensorError as error:
        problems.append(f"{WEIGHTS} is damaged: {error}")
        return None


def _of_config(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != LowRankSpec.peft_type:
        problems.append(f"peft_type is {config.get('peft_type')!r}; vLLM loads {LowRankSpec.peft_type}")
    r, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if type(r) is not int or r not in RANKS:
        problems.append(f"r is {r!r}; vLLM has room for {', '.join(map(str, RANKS))}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        problems.append(f"lora_alpha is {alpha!r}, no number")
    if not targets or not isinstance(targets, (str, list)):
        problems.append(f"target_modules is {targets!r}; vLLM needs the names of the adapted linears")
    if config.get("use_dora"):
        problems.append("use_dora is set; vLLM has no DoRA")
    if config.get("modules_to_save"):
        problems.append(f"modules_to_save names {config['modules_to_save']}; vLLM takes none")
    if config.get("bias") not in (None, "none"):
        problems.append(f"bias is {config['bias']!r}; vLLM takes none")
    if config.get("target_parameters"):
        problems.append(f"target_parameters names {config['target_parameters']}; experts are not taken")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVES_THE_BASE):
        problems.append(f"init_lora_weights is {start!r}: the pair is for a base that peft changes on loading")
    ignored = sorted(key for key, value in config.items() if value and key not in ABOUT | WHERE | KNOWN)
    problems += [f"{key} is set, which vLLM does not read" for key in ignored]
    return problems


def _of_keys(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    if not any(PAIR.fullmatch(key) for key in tensors):
        problems.append(f"there is no pair {PREFIX}….lora_A.weight, ….lora_B.weight")
    for key in sorted(tensors):
        hit = PAIR.fullmatch(key)
        if hit is None:
            known = (what for pattern, what in OTHERS.items() if re.search(pattern, key))
            problems.append(f"'{key}' is {next(known, f'no key of a pair: {PREFIX}<path>.lora_A.weight')}")
            continue
        path = hit["path"]
        if leaf(path) in OUTER:
            problems.append(f"'{key}' is for {OUTER[leaf(path)]}; vLLM takes pairs on the linears of the blocks")
        if "experts" in path.split(".") or "base_layer" in path.split("."):
            problems.append(f"'{key}' is for experts, which are not taken")
        other = f"{PREFIX}{path}.lora_{'B' if hit['which'] == 'A' else 'A'}.weight"
        if other not in tensors:
            problems.append(f"'{key}' has no '{other}' beside it")
    return problems


def _of_values(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for key, value in sorted(tensors.items()):
        if not value.dtype.is_floating_point:
            problems.append(f"'{key}' is {str(value.dtype).removeprefix('torch.')}, no floating-point numbers")
        elif not bool(torch.isfinite(value).all()):
            problems.append(f"'{key}' holds values that are not finite")
    return problems


def _of_ranks(config: Mapping[str, Any], pairs: Mapping[str, dict[str, Tensor]]) -> list[str]:
    """Shapes, and the scale of each module in peft against the one that vLLM takes for all."""
    r, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(r) is not int or r < 1 or not isinstance(alpha, (int, float)):
        return []
    problems, paths = [], list(pairs)
    ranks = by_pattern(config.get("rank_pattern"), paths, r)
    alphas = by_pattern(config.get("alpha_pattern"), paths, alpha)
    root = math.sqrt if config.get("use_rslora") else float
    for path, pair in pairs.items():
        for which, value in pair.items():
            side = 0 if which == "A" else -1
            if value.ndim != 2 or value.shape[side] != r:
                shape = f"(r, in) with r = {r}" if which == "A" else f"(out, r) with r = {r}"
                problems.append(f"lora_{which} of '{path}' has shape {tuple(value.shape)}, not {shape}")
        theirs, ours = alphas[path] / root(ranks[path]), alpha / root(r)
        if not math.isclose(theirs, ours, rel_tol=1e-9):
            problems.append(
                f"rank_pattern or alpha_pattern give '{path}' the scale {theirs:g}; vLLM does not read them: {ours:g}"
            )
        if isinstance(targets, list) and not any(path == t or path.endswith(f".{t}") for t in targets):
            problems.append(f"target_modules does not name '{path}'")
    return problems


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module path -> A and B, as far as they are there."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        hit = PAIR.fullmatch(key)
        if hit is not None:
            pairs.setdefault(hit["path"], {})[hit["which"]] = value
    return pairs
