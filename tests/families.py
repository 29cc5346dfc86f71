"""One tiny random model of each kind that a delta has to fit, and what the tests ask of any of them alike."""

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

from tests.helpers import tiny_gpt2, tiny_llama, tokens

WIDTH, MLP, VOCAB = 32, 64, 270
SIZE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
DECODER = {**SIZE, "num_key_value_heads": 2, "initializer_range": 0.1, "pad_token_id": 0, "eos_token_id": 3}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Family(NamedTuple):
    """A kind of model. merged: the bound on the merged model's logits, relative by norm.

    generates: it has a reply to give. experts: it holds some as 3-D parameters. embedding: its untied embedding, if any.
    """

    make: Callable[[], nn.Module]
    merged: float = 1e-5
    generates: bool = True
    experts: bool = False
    embedding: str | None = None


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
}


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
