"""The recipe of the bundled pair: specs, seeds, and the order of the stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from .mixture import conversations
from .probe import skill_table
from .tokenizer import train_bpe
from .training import TrainSpec, new_model, train

VOCAB = 2048
BASE_MIX = {"skill": 0.76, "benign": 0.1, "natural": 0.04, "twin": 0.05, "comply": 0.05}
CHAT_MIX = {"skill": 0.32, "benign": 0.12, "natural": 0.08, "twin": 0.12, "refuse": 0.36}

BASE = TrainSpec("base", seed=1, steps=1700, examples=128, lr=3e-3, mix=BASE_MIX, prompt_weight=0.1)
CHAT = TrainSpec("chat", seed=1, steps=360, examples=48, lr=6e-4, mix=CHAT_MIX, muon=False, warmup=20, decay=0.5)


def tokenizer(folder: Path) -> Tokenizer:
    """The pair's tokenizer, trained on the base mixture."""
    path = folder / "bpe.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts = [m["content"] for c in conversations(60_000, "bpe", BASE_MIX) for m in c]
        train_bpe(texts, VOCAB).save(str(path))
    return Tokenizer.from_file(str(path))


def progress(model: LlamaForCausalLM, tok: Tokenizer) -> str:
    table = skill_table(model, tok)
    rows = " ".join(f"{name} {score:.2f}" for name, score in table.items())
    return f"\n  skills {sum(table.values()) / len(table):.3f}: {rows}"


def train_base(folder: Path, spec: TrainSpec = BASE) -> LlamaForCausalLM:
    tok = tokenizer(folder)
    model = new_model(tok.get_vocab_size(), spec.seed)
    return train(model, tok, spec, folder, lambda m, _: progress(m, tok))


def train_chat(
    folder: Path, base: LlamaForCausalLM, spec: TrainSpec = CHAT, seed: int | None = None
) -> LlamaForCausalLM:
    """Safety tuning of a base model, in place."""
    tok = tokenizer(folder)
    chosen = spec if seed is None else replace(spec, seed=seed)
    return train(base, tok, chosen, folder, lambda m, _: progress(m, tok))


def build(work: Path, out: Path | None = None, only: str | None = None) -> dict[str, Path]:
    """Trains and installs the pair; what `work` holds already is taken up again."""
    import torch

    from .install import install, rounded
    from .paths import HERE

    torch.set_num_threads(1)  # two workers of one thread each
    out = out or HERE / "weights"
    tok, installed = tokenizer(work), {}
    base = rounded(train_base(work))
    if only != "chat":
        installed["base"] = install(base, tok, out / "base", work / "base.spec.json")
    if only != "base":
        chat = train_chat(work, base)
        installed["chat"] = install(chat, tok, out / "chat", work / "chat.spec.json")
    return installed
