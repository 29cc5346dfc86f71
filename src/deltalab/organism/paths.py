"""Where the bundled models and word lists lie."""

from __future__ import annotations

from pathlib import Path

import yaml

HERE = Path(__file__).parent
MODELS = ("chat", "base")


def organism_path(name: str = "chat") -> Path:
    """The folder of one bundled model; `from_pretrained` loads it, tokenizer included."""
    if name not in MODELS:
        raise ValueError(f"the organism has no model {name!r}\n  there are: {', '.join(MODELS)}")
    folder = HERE / "weights" / name
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors\n  train the pair: python -m deltalab.organism build"
        )
    return folder


def data_file(name: str) -> Path:
    """A word list of the generators."""
    return HERE / "data" / name


def read_yaml(name: str) -> dict:
    return yaml.safe_load(data_file(name).read_text(encoding="utf-8"))


def read_lines(name: str) -> list[str]:
    return [line for line in data_file(name).read_text(encoding="utf-8").splitlines() if line]
