"""Models, batches and comparisons that the tests of attention share."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.families import DECODER, MLP
from tests.helpers import error_by_norm, tiny_gpt2, tiny_llama, tokens

LENGTHS = [5, 17, 1, 9]


def mistral(window: int | None = 4, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.MistralConfig(**DECODER, intermediate_size=MLP, sliding_window=window)
    return transformers.MistralForCausalLM(config).to(dtype)


def qwen3(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.Qwen3Config(**DECODER, intermediate_size=MLP, head_dim=8)
    return transformers.Qwen3ForCausalLM(config).to(dtype)


def gpt2(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model.to(dtype)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama, "mistral": mistral, "qwen3": qwen3, "gpt2": gpt2,
}  # fmt: skip


def packed(seed: int = 0) -> dict[str, Any]:
    """Samples of LENGTHS tokens in one row, as a packed batch is handed to a model."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return {
        "input_ids": tokens(1, sum(LENGTHS), seed=seed),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS),
        "use_cache": False,
    }  # fmt: skip


def padded() -> dict[str, Any]:
    """Two rows, the second one padded on the right."""
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def with_gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Logits and every parameter's gradient."""
    model.zero_grad()
    logits = model(**batch).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if "attention_mask" in batch and batch["attention_mask"].ndim == 2:
        weights *= batch["attention_mask"][..., None]
    (logits * weights.to(logits.dtype)).sum().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], bound: float = 0.0) -> None:
    assert got.keys() == want.keys()
    for name, t in got.items():
        assert torch.equal(t, want[name]) if not bound else error_by_norm(t, want[name]) <= bound, name
