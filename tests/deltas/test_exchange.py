"""LoRA exchanged with Hugging Face peft, both ways, over a table of models, specs and peft's configs for the same."""

import peft
import pytest

import deltalab as dl
from tests.deltas.exchange import (
    Case,
    check_that_a_config_of_peft_is_taken_for_a_spec,
    check_that_peft_loads_what_we_save,
    check_that_we_load_what_peft_saves,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**options):
    return lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})


def ours(**options):
    return dl.LoRA(**{"r": 4, "alpha": 8, **options})


EXPERTS = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}

CASES = {
    "plain": Case("llama", ours(), lora()),
    "bf16": Case("llama-bf16", ours(), lora()),
    "rslora": Case("llama", ours(rank_stabilised=True), lora(use_rslora=True)),
    "dropout": Case("llama", ours(dropout=0.2), lora(lora_dropout=0.2)),
    "layers": Case("llama", ours(layers=[1]), lora(layers_to_transform=[1], layers_pattern="layers")),
    "one path": Case(
        "llama", ours(targets=["model.layers.0.mlp.up_proj"]), lora(target_modules=["model.layers.0.mlp.up_proj"])
    ),
    "exclude": Case(
        "llama",
        ours(targets=["re:.*layers.1.*(q|v)_proj", "k_proj"]),
        lora(target_modules=["q_proj", "v_proj", "k_proj"], exclude_modules=r".*layers\.0.*(q|v)_proj"),
    ),
    "patterns": Case(
        "llama",
        ours(rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3}),
        lora(rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3}),
    ),
    "output": Case("llama", ours(targets=["lm_head", "q_proj"]), lora(target_modules=["lm_head", "q_proj"])),
    "embedding": Case(
        "llama", ours(targets=["embed_tokens", "q_proj"]), lora(target_modules=["embed_tokens", "q_proj"])
    ),
    "embedding alone": Case("llama", ours(targets=["embed_tokens"]), lora(target_modules=["model.embed_tokens"])),
    "Conv1D": Case("gpt2", ours(targets="all-linear"), lora(target_modules="all-linear", fan_in_fan_out=True)),
    "fused": Case("gpt_neox", ours(targets=["query_key_value"]), lora(target_modules=["query_key_value"])),
    "T5": Case("t5", ours(targets="q,v"), lora(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")),
    "T5 block": Case(
        "t5", ours(targets=["q", "wi"], layers=[1]), lora(target_modules=["q", "wi"], layers_to_transform=[1])
    ),
    "BERT": Case("bert", ours(targets="all-linear"), lora(target_modules=r".*encoder.*(query|key|value|dense)")),
    "classifier with its head": Case(
        "bert-classifier",
        [ours(targets=["query", "value"]), dl.Train(["classifier"])],
        lora(target_modules=["query", "value"], task_type="SEQ_CLS"),
    ),
    "classifier, head frozen": Case("bert-classifier", ours(targets=["query"]), lora(target_modules=["query"])),
    "bias": Case("llama-bias", ours(bias="lora_only"), lora(bias="lora_only")),
    "all biases": Case("gpt2", ours(targets=["c_attn"], bias="all"), lora(target_modules=["c_attn"], bias="all")),
    "all biases and a head": Case(
        "bert-classifier",
        [ours(targets=["query"], bias="all"), dl.Train(["classifier"])],
        lora(target_modules=["query"], bias="all", task_type="SEQ_CLS"),
    ),
    "output saved": Case("llama", [ours(), dl.Train(["lm_head"])], lora(modules_to_save=["lm_head"])),
    "embeddings saved": Case(
        "llama", [ours(), dl.Train(["embed_tokens", "lm_head"])], lora(modules_to_save=["embed_tokens", "lm_head"])
    ),
    "norms saved": Case(
        "llama",
        [ours(), dl.Train("norms")],
        lora(modules_to_save=["input_layernorm", "post_attention_layernorm", "model.norm"]),
    ),
    "a part of a block saved": Case(
        "llama", [ours(), dl.Train(["layers.1.mlp"])], lora(modules_to_save=["layers.1.mlp"])
    ),
    "tied": Case(
        "llama-bias",
        [ours(), dl.Train(["lm_head"])],
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "new tokens": Case(
        "llama",
        [ours(), dl.Train(["embed_tokens", "lm_head"])],
        lora(modules_to_save=["embed_tokens", "lm_head"]),
        lambda model: model.resize_token_embeddings(280, mean_resizing=False),
    ),
    "mixtral": Case("mixtral", ours(targets=["gate_up_proj", "down_proj"]), lora(**EXPERTS)),
    "mixtral with attention": Case(
        "mixtral",
        ours(targets=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}),
        lora(
            target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], rank_pattern={r".*\.down_proj": 2}
        ),
    ),
    "qwen3_moe": Case("qwen3_moe", ours(targets=["experts.*"], rank_stabilised=True), lora(**EXPERTS, use_rslora=True)),
    "gpt_oss": Case("gpt_oss", ours(targets=["gate_up_proj", "down_proj"]), lora(**EXPERTS)),
}
case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@case
def test_peft_loads_what_we_save(case, tmp_path):
    check_that_peft_loads_what_we_save(case, tmp_path)


@case
def test_we_load_what_peft_saves(case, tmp_path):
    check_that_we_load_what_peft_saves(case, tmp_path)


@case
def test_a_config_of_peft_is_taken_for_a_spec(case):
    check_that_a_config_of_peft_is_taken_for_a_spec(case)
