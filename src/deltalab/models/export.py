"""What others serve: the adapter as vLLM or peft loads it, or the merged model as a folder of transformers.

A folder is written whole or not at all; an adapter for vLLM gets its name only after `check_vllm` found no fault in it.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import read_json, replacing
from deltalab.deltas.merge import dequantised, merged
from deltalab.deltas.own_format import OWN_TYPE
from deltalab.deltas.peft_format import CONFIG, WEIGHTS, save_adapter
from deltalab.deltas.schedule import require_ready
from deltalab.deltas.weights import is_adapted
from deltalab.models.load import BUNDLED, DTYPES
from deltalab.models.vllm import as_vllm
from deltalab.models.vllm_check import check_vllm

FORMS = ("vllm", "peft", "merged", "gguf")


@dataclass(frozen=True)
class Exported:
    """What was written. size: bytes. then: the commands that go on from there."""

    folder: Path
    to: str
    about: str
    size: int
    then: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.about}, {self.size / 2**20:,.1f} MiB", f"  written  {self.folder}"]
        return "\n".join([*lines, *(f"  next     {command}" for command in self.then)])


def export(
    model: nn.Module, folder: str | Path, to: str = "vllm", *, dtype: torch.dtype | None = None,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
) -> Exported:  # fmt: skip
    """Write the active adapter of `model`, or what it merges to, for another program.

    to: `vllm`, pairs A, B of one rank and one scale; `peft`, the adapter's own file where peft has words for it;
    `merged`, a model that transformers and vLLM load; `gguf`, the same, with the way to llama.cpp's format.
    folder: new or empty. dtype: of vLLM's tensors, float32 if not given, or of the merged model, its own if not given.
    tokenizer: written beside a merged model.
    Raises: UserError if there is no adapter, it is of a method whose schedule did not run, it has no such form, or the
    folder holds something.
    """
    folder = Path(folder)
    require_form(to)
    require_empty(folder)
    if not is_adapted(model):
        raise UserError("the model has no adapter to export.", next="deltalab.load_adapter(model, folder) first")
    require_ready(model)
    with replacing(folder) as tmp:
        if to == "vllm":
            about = _write_vllm(model, tmp, dtype or torch.float32)
        elif to == "peft":
            about = _write_peft(model, tmp)
        else:
            about = _write_merged(model, tmp, dtype, tokenizer)
        size = sum(file.stat().st_size for file in tmp.rglob("*") if file.is_file())
    return Exported(folder, to, about, size, _then(model, folder, to))


def dtype_of(name: str) -> torch.dtype:
    """Raises: UserError for a name of no dtype that is written."""
    if name not in DTYPES:
        raise UserError(f"'{name}' is no dtype to write in.", nearest=nearest(name, DTYPES) or [*DTYPES])
    return DTYPES[name]


def require_form(to: str) -> None:
    """Raises: UserError for a form that there is none of."""
    if to not in FORMS:
        raise UserError(f"there is no export for '{to}'.", nearest=nearest(to, FORMS) or FORMS)


def require_empty(folder: Path) -> None:
    """Raises: UserError if something is at `folder` already."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file; an export is a folder.", next="choose another folder")
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if there:
        raise UserError(
            f"folder '{folder}' is not empty.",
            found=", ".join(there[:8]),
            next="choose a new folder, or empty this one",
        )


def _write_vllm(model: nn.Module, folder: Path, dtype: torch.dtype) -> str:
    config, tensors = as_vllm(model, dtype)
    _write_adapter(folder, config, tensors)
    faults = check_vllm(folder)
    if faults:
        raise UserError(
            f"vLLM would not take this adapter: {faults[0]}.",
            found=f"{len(faults)} faults" if len(faults) > 1 else "",
            next="deltalab export … --for merged, which vLLM serves as a model of its own",
        )
    return f"adapter for vLLM: {len(tensors) // 2} linears of rank {config['r']}, scales folded in"


def _write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    save_file(dict(tensors), folder / WEIGHTS, {"format": "pt"})


def _write_peft(model: nn.Module, folder: Path) -> str:
    save_adapter(model, folder)
    config = read_json(folder / CONFIG, "adapter config")
    if config["peft_type"] == OWN_TYPE:
        raise UserError(
            "peft has no words for this adapter.",
            found="frozen entries, own parameters that are no whole modules, several kinds of delta, or a method of deltalab's own",
            next="deltalab export … --for vllm, which peft loads too, or --for merged",
        )
    return f"adapter for peft: {config['peft_type']}"


def _write_merged(
    model: nn.Module, folder: Path, dtype: torch.dtype | None, tokenizer: transformers.PreTrainedTokenizerBase | None
) -> str:
    plain: Any = dequantised(merged(model))  # all of it: others' loaders do not read every kind of codes
    plain = plain if dtype is None else plain.to(dtype)
    folder.mkdir()
    plain.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return f"merged model: {type(plain).__name__}, {str(plain.dtype).removeprefix('torch.')}"


def _then(model: nn.Module, folder: Path, to: str) -> tuple[str, ...]:
    """The commands that load what was written."""
    here = shlex.quote(str(folder))
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    base = "BASE" if not name or name.split(":")[0] == BUNDLED else shlex.quote(name)
    if to == "vllm":
        rank = read_json(folder / CONFIG, "adapter config")["r"]
        module = shlex.quote(f"{folder.resolve().name}={folder}")
        return (f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {module}",)
    if to == "peft":
        return (f"peft.PeftModel.from_pretrained(model, {str(folder)!r})",)
    if to == "merged":
        return (f"deltalab chat {here}", f"vllm serve {here}")
    out = shlex.quote(f"{folder}.gguf")
    return (
        f"python convert_hf_to_gguf.py {here} --outfile {out}      (llama.cpp's; it says which architectures it takes)",
        f"llama-quantize {out} {shlex.quote(f'{folder}-Q4_K_M.gguf')} Q4_K_M",
    )
