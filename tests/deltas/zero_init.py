"""LLaMA-Adapter's attention as its paper has it, written out head by head, for the attentions of several architectures.

What is written out shares nothing with deltalab: each layer's projections, norms and positions are read by hand, every softmax is
written out, and the sum of both goes through the output projection. `by_the_paper` puts it in a plain model.
"""

import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import deltalab as dl
from deltalab.deltas.adapt import attached
from tests.deltas.perturb import perturbed
from tests.families import DECODER, MLP, SIZE, model_of
from tests.helpers import tiny_gpt2, tiny_llama, tokens


class Heads(NamedTuple):
    """q (batch, heads, seq, d), k and v (batch, kv heads, seq, d), and the factor of the scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    c: float


Read = Callable[[nn.Module, Tensor, Any], Heads]
"""(attention, hidden states, (cos, sin) or None for no position) -> its heads."""


class Architecture(NamedTuple):
    """A tiny model of the kind; how its heads are read; its output projection; where its attentions are."""

    make: Callable[[], nn.Module]
    read: Read
    out: str = "o_proj"
    attention: str = "self_attn"
    width: int = 32


def split(x: Tensor, d: int) -> Tensor:
    """(batch, seq, heads · d) -> (batch, heads, seq, d)."""
    return x.unflatten(-1, (-1, d)).transpose(1, 2)


def half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def turned(x: Tensor, positions: Any, turn: Callable[[Tensor], Tensor] = half) -> Tensor:
    """x with the rotary positions on its first dimensions."""
    if positions is None:
        return x
    cos, sin = (t[:, None] for t in positions)
    n = cos.shape[-1]
    return torch.cat([x[..., :n] * cos + turn(x[..., :n]) * sin, x[..., n:]], -1)


def plain(m: nn.Module, x: Tensor, positions: Any) -> Heads:
    d = m.head_dim
    q, k = (turned(split(p(x), d), positions) for p in (m.q_proj, m.k_proj))
    return Heads(q, k, split(m.v_proj(x), d), 1 / math.sqrt(d))


def norm_of_heads(m: nn.Module, x: Tensor, positions: Any) -> Heads:
    """Qwen3's and Gemma3's: a norm of each head's query and key."""
    d = m.head_dim
    q, k = m.q_norm(split(m.q_proj(x), d)), m.k_norm(split(m.k_proj(x), d))
    c = getattr(m.config, "query_pre_attn_scalar", d) ** -0.5
    return Heads(turned(q, positions), turned(k, positions), split(m.v_proj(x), d), c)


def norm_of_all(m: nn.Module, x: Tensor, positions: Any) -> Heads:
    """OLMo2's: a norm of all heads' queries together."""
    d = m.head_dim
    q, k = split(m.q_norm(m.q_proj(x)), d), split(m.k_norm(m.k_proj(x)), d)
    return Heads(turned(q, positions), turned(k, positions), split(m.v_proj(x), d), 1 / math.sqrt(d))


def cohere(m: nn.Module, x: Tensor, positions: Any) -> Heads:
    """A norm with a weight for each head; pairs of neighbours rotate, in fp32 there whatever the model is in."""
    d = m.head_dim
    q, k = (n(p(x).unflatten(-1, (-1, d))).transpose(1, 2) for n, p in ((m.q_norm, m.q_proj), (m.k_norm, m.k_proj)))
    q, k = (turned(t.float(), positions, pairs).to(x.dtype) for t in (q, k))
    return Heads(q, k, split(m.v_proj(x), d), 1 / math.sqrt(d))


def phi3(m: nn.Module, x: Tensor, positions: Any) -> Heads:
    d, n, kv = m.head_dim, m.config.num_attention_heads, m.config.num_key_value_heads
    q, k, v = m.qkv_proj(x).split([n * d, kv * d, kv * d], -1)
    return Heads(turned(split(q, d), positions), turned(split(k, d), positions), split(v, d), 1 / math.sqrt(d))


def gpt_neox(m: nn.Module, x: Tensor, positions: Any) -> Heads:
    """One head's query, key and value after the other's."""
    d = m.head_size
    qkv = m.query_key_value(x).unflatten(-1, (-1, 3, d))
    q, k, v = (qkv[..., i, :].transpose(1, 2) for i in range(3))
    return Heads(turned(q, positions), turned(k, positions), v, 1 / math.sqrt(d))


def gpt2(m: nn.Module, x: Tensor, positions: Any) -> Heads:
    d = m.head_dim
    q, k, v = (x @ m.c_attn.weight + m.c_attn.bias).chunk(3, -1)
    return Heads(split(q, d), split(k, d), split(v, d), 1 / math.sqrt(d))


def opt(m: nn.Module, x: Tensor, positions: Any) -> Heads:
    d = m.head_dim
    return Heads(*(split(p(x), d) for p in (m.q_proj, m.k_proj, m.v_proj)), 1 / math.sqrt(d))


NARROW = {**DECODER, "intermediate_size": MLP}
LONG = {**NARROW, "head_dim": 12}
"""Heads that are not hidden size over heads wide: 4 · 12 of 32."""

ARCHITECTURES = {
    "llama": Architecture(lambda: tiny_llama(mlp=MLP), plain),
    "llama-head_dim": Architecture(lambda: causal("Llama", **LONG), plain),
    "llama-bias": Architecture(lambda: stirred(tiny_llama(mlp=MLP, bias=True)), plain),
    "mistral": Architecture(lambda: causal("Mistral", **NARROW, sliding_window=5), plain),
    "qwen2": Architecture(lambda: causal("Qwen2", **NARROW), plain),
    "qwen3": Architecture(lambda: causal("Qwen3", **LONG), norm_of_heads),
    "gemma3": Architecture(
        lambda: causal("Gemma3", "Gemma3TextConfig", **LONG, query_pre_attn_scalar=20, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
        norm_of_heads,
    ),
    "phi": Architecture(lambda: causal("Phi", **NARROW), plain, "dense"),
    "phi3": Architecture(lambda: causal("Phi3", **NARROW), phi3),
    "gpt_neox": Architecture(lambda: model_of("gpt_neox"), gpt_neox, "dense", "attention"),
    "gpt2": Architecture(lambda: stirred(tiny_gpt2()), gpt2, "c_proj", "attn"),
    "olmo2": Architecture(lambda: causal("Olmo2", **NARROW), norm_of_all),
    "cohere": Architecture(lambda: causal("Cohere", **NARROW, use_qk_norm=True), cohere),
    "opt": Architecture(
        lambda: causal("OPT", **SIZE, ffn_dim=MLP, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.1, dropout=0.0, pad_token_id=0, eos_token_id=3),
        opt, "out_proj",
    ),
}  # fmt: skip


def causal(name: str, config: str = "", **options: Any) -> nn.Module:
    """A random model in eval mode."""
    torch.manual_seed(0)
    made = getattr(transformers, config or f"{name}Config")(**options)
    return stirred(getattr(transformers, f"{name}ForCausalLM")(made).eval())


def stirred(model: nn.Module) -> nn.Module:
    """Norms and biases away from where they start, at one and at zero, where their part would not be seen."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1 or (parameter.ndim == 2 and parameter.shape[1] < 32):
            nn.init.normal_(parameter, mean=0.5, std=0.1, generator=generator)
    return model


def softmax(scores: Tensor) -> Tensor:
    weights = (scores - scores.max(-1, keepdim=True).values).exp()
    return weights / weights.sum(-1, keepdim=True)


def by_the_paper(
    model: nn.Module, about: Architecture, prompts: list[Tensor], gates: list[Tensor], shown: Tensor | None = None
) -> nn.Module:
    """The model with every attention written out. prompts (length, hidden), gates (heads) as they multiply, one a layer.

    shown: (batch, seq), False where a token is padding.
    """
    layers = [m for name, m in model.named_modules() if name.endswith("." + about.attention)]
    for layer, prompt, gate in zip(layers, prompts, gates, strict=True):

        def forward(
            self: nn.Module, hidden_states: Tensor, position_embeddings: Any = None, prompt: Tensor = prompt, gate: Tensor = gate, **_: Any
        ) -> tuple[Tensor, None]:  # fmt: skip
            q, k, v, c = about.read(self, hidden_states, position_embeddings)
            _, own_k, own_v, _ = about.read(self, prompt[None], None)
            i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
            allowed = j <= i
            if getattr(self, "sliding_window", None) or (
                about.read is plain and getattr(self.config, "sliding_window", None)
            ):
                allowed = allowed & (i - j < self.config.sliding_window)
            rows = []
            for b in range(q.shape[0]):
                sees = allowed if shown is None else (allowed & shown[b]) | (i == j)
                heads = []
                for h in range(q.shape[1]):
                    of = h * k.shape[1] // q.shape[1]  # the key-value head of this query head
                    tokens = softmax((c * q[b, h] @ k[b, of].T).masked_fill(~sees, -math.inf)) @ v[b, of]
                    heads.append(tokens + gate[h] * softmax(c * q[b, h] @ own_k[0, of].T) @ own_v[0, of])
                rows.append(torch.cat(heads, -1))
            return getattr(self, about.out)(torch.stack(rows)), None

        layer.forward = types.MethodType(forward, layer)
    return model


def logits(model: nn.Module, ids: Tensor | None = None, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(length=9) if ids is None else ids, **more).logits


def moved(model: nn.Module, size: float = 0.5, **fields: Any) -> nn.Module:
    """The model with prompts and gates that do something."""
    return perturbed(dl.adapt(model, dl.ZeroInitPrefix(**{"length": 3, **fields})), size)


def adapted(name: str, **fields: Any) -> nn.Module:
    """The same of an architecture in fp64."""
    return moved(ARCHITECTURES[name].make().double(), **fields)


def parts(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Prompts and gates, as they are, layer by layer."""
    deltas = attached(model).values()
    return [delta.P for delta in deltas], [delta.g for delta in deltas]


def written_out(
    name: str,
    model: nn.Module,
    prompts: list[Tensor],
    gates: list[Tensor],
    kind: str = "tanh",
    shown: Tensor | None = None,
) -> nn.Module:
    """`by_the_paper` of an architecture, the gates as they are kept, one a head or a layer."""
    heads = model.config.num_attention_heads
    opened = [(torch.tanh(g) if kind == "tanh" else g).expand(heads) for g in gates]
    return by_the_paper(model, ARCHITECTURES[name], prompts, opened, shown)
