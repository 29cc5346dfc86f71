"""One tiny random model of each kind that a delta has to fit, and what the tests ask of any of them alike."""

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

from deltalab.deltas.quantise import quantise
from deltalab.deltas.select import block_linears
from deltalab.quant import foreign
from deltalab.quant.linear import quantiser
from tests.helpers import tiny_gpt2, tiny_llama, tokens

WIDTH, MLP, VOCAB = 32, 64, 270
SIZE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
DECODER = {**SIZE, "num_key_value_heads": 2, "initializer_range": 0.1, "pad_token_id": 0, "eos_token_id": 3}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Family(NamedTuple):
    """A kind of model. merged: the bound on the merged model's logits, relative by norm. double: the same in fp64.

    generates: it has a reply to give. experts: it holds some as 3-D parameters. embedding: its untied embedding, if any.
    codes: its blocks' linears keep codes in place of a weight.
    """

    make: Callable[[], nn.Module]
    merged: float = 1e-5
    generates: bool = True
    experts: bool = False
    embedding: str | None = None
    codes: bool = False
    double: float = 1e-10


def mixtral(*, experts: int = 4, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A mixture of experts in a few 3-D parameters, (experts, out, in)."""
    config = transformers.MixtralConfig(
        **DECODER, intermediate_size=MLP, num_local_experts=experts, num_experts_per_tok=2, sliding_window=None
    )
    return transformers.MixtralForCausalLM(config).to(dtype)


def qwen3_moe() -> nn.Module:
    """The same with a norm on queries and keys, and one block without experts."""
    config = transformers.Qwen3MoeConfig(
        **DECODER, intermediate_size=MLP, moe_intermediate_size=WIDTH, head_dim=8, num_experts=4,
        num_experts_per_tok=2, mlp_only_layers=[0],
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    """Experts as (experts, in, out), with biases."""
    config = transformers.GptOssConfig(
        **DECODER, intermediate_size=WIDTH, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.GptOssForCausalLM(config)


def bert() -> nn.Module:
    """An encoder with a masked language model's head, its output layer tied."""
    config = transformers.BertConfig(**SIZE, **NO_DROPOUT, intermediate_size=MLP, initializer_range=0.1)
    return transformers.BertForMaskedLM(config)


def bert_classifier() -> nn.Module:
    """An encoder with a pooler and a classification head."""
    config = transformers.BertConfig(
        **SIZE, **NO_DROPOUT, intermediate_size=MLP, initializer_range=0.1, num_labels=3, problem_type="single_label_classification"
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def t5(*, tied: bool = True, layers: int = 2, decoder_layers: int | None = None) -> nn.Module:
    """An encoder–decoder: two stacks, whose embeddings share one weight."""
    config = transformers.T5Config(
        d_model=WIDTH, d_kv=8, d_ff=MLP, num_layers=layers, num_decoder_layers=decoder_layers, num_heads=4,
        vocab_size=VOCAB, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def phi3() -> nn.Module:
    """Query, key and value in one linear, gate and up in another."""
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**DECODER, intermediate_size=MLP))


def gpt_neox() -> nn.Module:
    """Query, key and value in one linear, interleaved by head, with biases."""
    config = transformers.GPTNeoXConfig(
        **SIZE, intermediate_size=MLP, initializer_range=0.1, pad_token_id=0, eos_token_id=3, bos_token_id=None
    )
    return transformers.GPTNeoXForCausalLM(config)


def quantised(model: nn.Module, name: str) -> nn.Module:
    """The linears of the blocks as codes. Groups and blocks are smaller than usual, as the matrices are."""
    return quantise(model, quantiser(name))


def bitsandbytes4(model: nn.Module) -> nn.Module:
    """A model as transformers leaves it that loads one in 4 bits: the blocks' linears are bitsandbytes' own.

    They keep their codes as they are: on a CPU with bf16 instructions their forward would lay them out anew, and round.
    It computes in fp32, whatever the model is cast to, and is wrong by a fifth for matrices below 2048 entries.
    """
    import bitsandbytes as bnb

    for path, linear in block_linears(model, "4 bits").items():
        made = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=linear.weight.dtype,
            quant_type="nf4", compress_statistics=True,
        )  # fmt: skip
        made.load_state_dict(linear.state_dict())
        model.set_submodule(path, made.to("cpu").requires_grad_(False))
    foreign.hold(model)
    return model


FAMILIES = {
    "llama": Family(lambda: tiny_llama(mlp=MLP), embedding="model.embed_tokens"),
    "llama-bf16": Family(
        lambda: tiny_llama(mlp=MLP, dtype=torch.bfloat16), merged=3e-2, embedding="model.embed_tokens"
    ),
    "llama-bias": Family(lambda: tiny_llama(mlp=MLP, bias=True, tied=True)),
    "gpt2": Family(tiny_gpt2),
    "mixtral": Family(mixtral, experts=True, embedding="model.embed_tokens"),
    # both experts take every token: a rounded router would else choose others now and then
    "mixtral-bf16": Family(
        lambda: mixtral(experts=2, dtype=torch.bfloat16), merged=3e-2, experts=True, embedding="model.embed_tokens"
    ),
    "qwen3_moe": Family(qwen3_moe, experts=True, embedding="model.embed_tokens"),
    "gpt_oss": Family(gpt_oss, experts=True, embedding="model.embed_tokens"),
    "bert": Family(bert, generates=False),
    "bert-classifier": Family(bert_classifier, generates=False, embedding="bert.embeddings.word_embeddings"),
    "t5": Family(t5),
    "phi3": Family(phi3, embedding="model.embed_tokens"),
    "gpt_neox": Family(gpt_neox, embedding="gpt_neox.embed_in"),
    "llama-nf4": Family(
        lambda: quantised(tiny_llama(mlp=MLP, bias=True), "nf4"), embedding="model.embed_tokens", codes=True
    ),
    "llama-int8": Family(lambda: quantised(tiny_llama(mlp=MLP), "int8"), embedding="model.embed_tokens", codes=True),
    "gpt2-int4": Family(lambda: quantised(tiny_gpt2(), "int4-group"), codes=True),
    "llama-bnb4": Family(
        lambda: bitsandbytes4(tiny_llama(hidden=64, mlp=128)), embedding="model.embed_tokens", codes=True, double=1e-5
    ),
}

REFUSED: dict[str, dict[str, str]] = {
    "ZeroInitPrefix": dict.fromkeys(("bert", "bert-classifier"), "attention is no module of its own")
    | {"t5": "can attend to other states"},
    "QALoRA": dict.fromkeys(("llama-nf4", "llama-bnb4"), "group"),
}
"""Method -> the families that it does not go on, and what it says of each, a regular expression."""


@functools.cache
def _made(family: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family].make().eval()
        for name, parameter in model.named_parameters():  # they start at zero, where a delta on them would not be seen
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        return model


def model_of(family: str) -> nn.Module:
    """A model of the family in eval mode, bitwise the same each time."""
    return copy.deepcopy(_made(family))


def inputs(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of the model's forward, labels among them."""
    ids = tokens(seed=seed)
    if isinstance(model, transformers.BertForSequenceClassification):
        return {"input_ids": ids, "labels": ids[:, 0] % model.config.num_labels}
    return {"input_ids": ids, "labels": ids}


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    return model(**inputs(model, seed)).loss


def logits(model: nn.Module, seed: int = 0) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model, seed)).logits
