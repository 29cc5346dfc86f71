"""Writes a trained model where `organism_path` finds it: bf16 weights, tokenizer, template, spec."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from .tokenizer import save as save_tokenizer

MAX_BYTES = 8_000_000


def rounded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy with the values that bf16 holds, in fp32."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for p in found.parameters():
            p.copy_(p.to(torch.bfloat16))
    return found.eval()


def install(model: LlamaForCausalLM, tok: Tokenizer, folder: Path, spec: Path | None = None) -> Path:
    """The folder that `from_pretrained` loads. The file is bf16; the config asks for fp32, in which a CPU computes."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tok, folder)
    if spec is not None and spec.exists():
        shutil.copyfile(spec, folder / "train_spec.json")
    size = (folder / "model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{folder}/model.safetensors has {size:,} bytes, more than {MAX_BYTES:,}")
    return folder
