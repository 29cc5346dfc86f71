"""Small models, tokenizers and data for the tests; nothing here needs a network."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" if (ROOT.parent / "shared" / "data").is_dir() else None
"""Data sets and models beside the project, or None."""

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_llama(
    *, hidden: int = 32, layers: int = 2, heads: int = 4, kv_heads: int = 2, mlp: int = 48, vocab: int = 270,
    tied: bool = False, bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, context: int = 128,
) -> transformers.LlamaForCausalLM:  # fmt: skip
    """A random Llama in eval mode, the same for the same seed."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=mlp, vocab_size=vocab, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias,
        max_position_embeddings=context, initializer_range=0.1, pad_token_id=0, eos_token_id=3, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).to(dtype).eval()


def tiny_gpt2(*, hidden: int = 32, layers: int = 2, vocab: int = 270, seed: int = 0) -> transformers.GPT2LMHeadModel:
    """A random GPT-2 (Conv1D linears) in eval mode."""
    config = transformers.GPT2Config(
        n_embd=hidden,
        n_layer=layers,
        n_head=4,
        vocab_size=vocab,
        n_positions=128,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(config).eval()


def byte_tokenizer(template: str | None = TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    """One token a byte, ids below 270, with the organism's special tokens and a chat template."""
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=template
    )


def model_folder(model: transformers.PreTrainedModel, folder: Path, **options: Any) -> Path:
    """The folder with the model and a byte tokenizer in it."""
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tokens(batch: int = 2, length: int = 12, vocab: int = 270, seed: int = 0) -> torch.Tensor:
    """Random token ids, (batch, length)."""
    return torch.randint(5, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def error_by_norm(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖ over the whole tensor, in fp64."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def assert_close_by_norm(got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    """Relative error by norm at most `bound`, shapes equal."""
    assert got.shape == want.shape, (got.shape, want.shape)
    error = error_by_norm(got, want)
    assert error <= bound, f"relative error {error:.3g} > {bound:.3g}"


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "1m") -> Iterator[Path]:
    """A file system of `size` mounted at `folder`; the test is skipped where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system needs root to be mounted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
