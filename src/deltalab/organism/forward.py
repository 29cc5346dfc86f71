"""The same Llama forward pass as transformers', written out with fewer and larger operations.

It computes on the model's own parameters (`tests/organism` holds it to transformers' output) and takes about two
thirds of the time on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def hidden_states(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """ids [b, s] → the last hidden state [b, s, d], causal; padding must be on the right."""
    config, body = model.config, model.model
    b, s = ids.shape
    heads, width, eps = config.num_attention_heads, config.hidden_size, config.rms_norm_eps
    size = width // heads
    angles = torch.outer(torch.arange(s).float(), 10000.0 ** (-torch.arange(0, size, 2) / size))
    cos, sin = angles.cos(), angles.sin()
    x = F.embedding(ids, body.embed_tokens.weight)
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        h = F.rms_norm(x, (width,), layer.input_layernorm.weight, eps)
        joined = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
        q, k, v = F.linear(h, joined).view(b, s, 3, heads, size).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotated(q, cos, sin), _rotated(k, cos, sin), v, is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).reshape(b, s, width), attention.o_proj.weight)
        h = F.rms_norm(x, (width,), layer.post_attention_layernorm.weight, eps)
        x = x + F.linear(
            F.silu(F.linear(h, mlp.gate_proj.weight)) * F.linear(h, mlp.up_proj.weight), mlp.down_proj.weight
        )
    return F.rms_norm(x, (width,), body.norm.weight, eps)
