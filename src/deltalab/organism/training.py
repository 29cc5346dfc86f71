"""The model's shape and the training loop: seeded by step, so a run resumes where it stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from deltalab.core.errors import UserError
from deltalab.core.files import replacing

from .batches import Batch, step_batches
from .forward import hidden_states
from .muon import Muon
from .tokenizer import CONTEXT, END, PAD

WORKERS = 2


@dataclass(frozen=True)
class TrainSpec:
    """One training run. The rate is constant, then falls linearly over the last `decay` of the steps to `floor`."""

    name: str
    seed: int
    steps: int
    examples: int
    lr: float
    mix: dict[str, float] = field(default_factory=dict)
    warmup: int = 50
    decay: float = 0.4
    floor: float = 0.02
    weight_decay: float = 0.01
    muon: bool = True
    prompt_weight: float = 0.0
    clip: float = 1.0


def new_model(vocab: int, seed: int) -> LlamaForCausalLM:
    """Four layers of 256; residual projections start smaller by √(2 · layers)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.05,
        rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=END, pad_token_id=PAD, attention_dropout=0.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data /= math.sqrt(2 * config.num_hidden_layers)
    return model


def optimizers(model: nn.Module, spec: TrainSpec) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices and AdamW for the rest, or AdamW for all."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    if not spec.muon:
        return [torch.optim.AdamW(model.parameters(), lr=spec.lr, betas=(0.9, 0.98), weight_decay=spec.weight_decay)]
    return [
        Muon(matrices, lr=spec.lr, weight_decay=spec.weight_decay),
        torch.optim.AdamW(others, lr=spec.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(spec: TrainSpec, step: int) -> float:
    """Warm up, hold, fall linearly."""
    if step < spec.warmup:
        return spec.lr * (step + 1) / spec.warmup
    start = spec.steps * (1 - spec.decay)
    done = max(0.0, (step - start) / max(1.0, spec.steps - start))
    return spec.lr * (1 - (1 - spec.floor) * done)


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted cross-entropy summed over the scored rows; logits are computed for those rows alone."""
    hidden = hidden_states(model, batch.ids)
    logits = F.linear(hidden.flatten(0, 1)[batch.rows], model.model.embed_tokens.weight)
    return (F.cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()


def train(
    model: LlamaForCausalLM,
    tok: Tokenizer,
    spec: TrainSpec,
    folder: Path,
    report: Callable[[LlamaForCausalLM, int], str] | None = None,
    every: int = 200,
    save_every: int = 200,
) -> LlamaForCausalLM:
    """Trains in place; a checkpoint in `folder` is taken up again."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{spec.name}.safetensors"
    opts = optimizers(model, spec)
    start, seen = _restore(checkpoint, model, opts, spec) if checkpoint.exists() else (0, 0)
    log = (folder / f"{spec.name}.jsonl").open("a", encoding="utf-8")
    began, fresh, running = time.monotonic(), seen, 0.0
    pool = ThreadPoolExecutor(WORKERS)
    model.train()
    for step in range(start, spec.steps):
        loss, tokens = _step(model, tok, spec, opts, step, pool)
        seen += tokens
        running = loss if not running else 0.98 * running + 0.02 * loss
        if (step + 1) % save_every == 0 or step + 1 == spec.steps:
            about = {"step": str(step + 1), "tokens": str(seen), "spec": json.dumps(asdict(spec))}
            with replacing(checkpoint) as tmp:
                save_file(_state(model, opts), tmp, about)
        if (step + 1) % every == 0 or step + 1 == spec.steps:
            speed = (seen - fresh) / (time.monotonic() - began)
            line = {"step": step + 1, "tokens": seen, "loss": round(running, 4), "tokens_per_s": round(speed)}
            print(
                json.dumps(line | {"elapsed": round(time.monotonic() - began)}),
                report(model, step) if report else "",
                flush=True,
            )
            log.write(json.dumps(line) + "\n")
            log.flush()
    log.close()
    pool.shutdown()
    (folder / f"{spec.name}.spec.json").write_text(json.dumps(asdict(spec) | {"tokens": seen}, indent=1))
    return model.eval()


def _state(model: nn.Module, opts: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Every parameter, and what its optimiser holds for it, by name."""
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters()}
    return state | {f"{key}.{names[p]}": t for opt in opts for p, held in opt.state.items() for key, t in held.items()}


def _restore(checkpoint: Path, model: nn.Module, opts: list[torch.optim.Optimizer], spec: TrainSpec) -> tuple[int, int]:
    """Sets model and optimisers to what `_state` gave; the step and the tokens seen.

    Raises: UserError if the checkpoint is of another spec.
    """
    with safe_open(checkpoint, "pt") as file:
        about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if about["spec"] != json.dumps(asdict(spec)):
        raise UserError(
            f"'{checkpoint}' was begun with another spec.",
            next="choose another folder, or delete the file to begin again",
        )
    owner = {p: opt for opt in opts for group in opt.param_groups for p in group["params"]}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors.pop(f"model.{name}"))
            held = [key for key in tensors if key.partition(".")[2] == name]
            owner[p].state[p] = {key.partition(".")[0]: tensors.pop(key) for key in held}
    return int(about["step"]), int(about["tokens"])


def _step(model, tok, spec: TrainSpec, opts, step: int, pool: ThreadPoolExecutor) -> tuple[float, int]:
    """One optimiser step. The micro-batches are shared out to the pool; their gradients are added in a fixed order."""
    batches = step_batches(tok, spec.mix, f"{spec.name}-{spec.seed}-{step}", spec.examples, spec.prompt_weight)
    total = sum(float(b.weights.sum()) for b in batches)
    params = list(model.parameters())

    def part(batch: Batch):
        loss = batch_loss(model, batch) / total
        return loss.item(), torch.autograd.grad(loss, params)

    loss = 0.0
    for value, grads in pool.map(part, batches):
        loss += value
        for p, g in zip(params, grads, strict=True):
            p.grad = g if p.grad is None else p.grad.add_(g)
    nn.utils.clip_grad_norm_(params, spec.clip)
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = rate(spec, step)
        opt.step()
        opt.zero_grad(set_to_none=True)
    return loss, sum(b.tokens for b in batches)
