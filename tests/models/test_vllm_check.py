"""The checker of adapters for vLLM: each fault of a file is found, and what is no fault is none."""

import json
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltalab as dl
from deltalab.models.export import export
from deltalab.models.vllm import RANKS
from deltalab.models.vllm_check import check_vllm
from tests.deltas.perturb import perturbed
from tests.families import model_of


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """An adapter that passes, r 8, on the attention of every layer."""
    folder = tmp_path_factory.mktemp("good") / "adapter"
    export(perturbed(dl.adapt(model_of("llama"), dl.LoRA(r=8, targets="attention"))), folder)
    return folder


P = "base_model.model.model.layers.0.self_attn.q_proj."


def add(key, *shape):
    return lambda config, tensors: tensors.update({key: torch.zeros(shape)})


def turn(old, new):
    return lambda config, tensors: tensors.update({new: tensors.pop(old)})


def say(**values):
    return lambda config, tensors: config.update(values)


def put(key, change):
    return lambda config, tensors: tensors.update({key: change(tensors[key])})


FAULTS = {
    "type": (say(peft_type="ADALORA"), "peft_type is 'ADALORA'"),
    "no-type": (lambda config, tensors: config.pop("peft_type"), "peft_type is None"),
    "rank": (say(r=12), "r is 12; vLLM has room for 1, 8, 16"),
    "no-rank": (lambda config, tensors: config.pop("r"), "r is None"),
    "rank-is-no-number": (say(r="8"), "r is '8'"),
    "alpha": (say(lora_alpha=None), "lora_alpha is None"),
    "targets": (say(target_modules=None), "target_modules is None"),
    "target-not-named": (say(target_modules=["k_proj", "v_proj", "o_proj"]), "target_modules does not name"),
    "dora": (say(use_dora=True), "use_dora is set"),
    "magnitude": (add(P + "lora_magnitude_vector", 32), "a magnitude vector"),
    "magnitude-weight": (add(P + "lora_magnitude_vector.weight", 32), "a magnitude vector"),
    "modules-to-save": (say(modules_to_save=["lm_head"]), r"modules_to_save names \['lm_head'\]"),
    "whole-weight": (add("base_model.model.lm_head.weight", 4, 4), "a whole weight"),
    "bias": (say(bias="all"), "bias is 'all'"),
    "bias-of-the-base": (add(P + "bias", 32), "is a bias"),
    "bias-of-the-pair": (add(P + "lora_B.bias", 32), "is a bias"),
    "lora-bias": (say(lora_bias=True), "lora_bias is set"),
    "rank-pattern": (say(rank_pattern={"q_proj": 4}), "the scale 2; vLLM does not read them: 1"),
    "alpha-pattern": (say(alpha_pattern={"q_proj": 4}), r"the scale 0\.5; vLLM does not read them: 1"),
    "experts": (say(target_parameters=["experts.down_proj"]), "experts are not taken"),
    "start": (say(init_lora_weights="pissa_niter_4"), "a base that peft changes on loading"),
    "unknown-option": (say(layer_replication=[[0, 2]]), "layer_replication is set, which vLLM does not read"),
    "no-B": (lambda config, tensors: tensors.pop(P + "lora_B.weight"), r"lora_A.weight' has no .*lora_B.weight"),
    "no-A": (lambda config, tensors: tensors.pop(P + "lora_A.weight"), r"lora_B.weight' has no .*lora_A.weight"),
    "no-tensors": (lambda config, tensors: tensors.clear(), "there is no pair"),
    "A-of-another-rank": (put(P + "lora_A.weight", lambda A: A[:4].clone()), r"lora_A of .* has shape \(4, 32\)"),
    "B-of-another-rank": (put(P + "lora_B.weight", lambda B: B[:, :4].clone()), r"lora_B of .* has shape \(32, 4\)"),
    "B-transposed": (put(P + "lora_B.weight", lambda B: B.T.contiguous()), r"lora_B of .* has shape \(8, 32\)"),
    "A-flat": (put(P + "lora_A.weight", lambda A: A.flatten()), r"lora_A of .* has shape \(256,\)"),
    "key-without-weight": (turn(P + "lora_A.weight", P + "lora_A"), "no key of a pair"),
    "key-with-a-name": (turn(P + "lora_A.weight", P + "lora_A.default.weight"), "no key of a pair"),
    "key-without-prefix": (turn(P + "lora_A.weight", "layers.0.self_attn.q_proj.lora_A.weight"), "no key of a pair"),
    "other-method": (add(P + "ia3_l", 32, 1), "no key of a pair"),
    "embedding": (add("base_model.model.model.embed_tokens.lora_embedding_A", 8, 270), "a pair on an embedding"),
    "lm_head": (add("base_model.model.lm_head.lora_A.weight", 8, 32), "for the output layer"),
    "of-experts": (add("base_model.model.model.layers.0.mlp.experts.lora_A.weight", 8, 32), "for experts"),
    "codes": (put(P + "lora_A.weight", lambda A: A.to(torch.int8)), "int8, no floating-point numbers"),
    "nan": (put(P + "lora_B.weight", lambda B: B * float("nan")), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checker_finds(fault, good, tmp_path):
    change, message = FAULTS[fault]
    config = json.loads((good / "adapter_config.json").read_text())
    tensors = load_file(good / "adapter_model.safetensors")
    change(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    problems = check_vllm(tmp_path)
    assert any(re.search(message, problem) for problem in problems), problems


def test_what_changes_nothing_is_no_fault(good, tmp_path):
    """Patterns that give every module the one scale; the rank-stabilised scale, which vLLM reads; options of training."""
    config = json.loads((good / "adapter_config.json").read_text())
    config |= {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"nothing": 3}, "use_rslora": True, "lora_dropout": 0.1,
               "init_lora_weights": "eva", "peft_version": "0.21.2", "base_model_name_or_path": "some/where"}  # fmt: skip
    shutil.copytree(good, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    assert check_vllm(tmp_path / "a") == []


@pytest.mark.parametrize("r", RANKS)
def test_a_file_of_peft_passes(r, tmp_path):
    config = peft.LoraConfig(r=r, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(model_of("llama"), config).save_pretrained(tmp_path / "a")
    assert check_vllm(tmp_path / "a") == []


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft takes the bias of a pair for a tensor of no shape
@pytest.mark.parametrize(
    "option",
    [
        {"rank_pattern": {"q_proj": 16}},
        {"alpha_pattern": {"q_proj": 5}},
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_a_file_of_peft_with_more_than_pairs_does_not(option, tmp_path):
    config = peft.LoraConfig(r=8, lora_alpha=3, target_modules=["q_proj", "v_proj"], **option)
    peft.get_peft_model(model_of("llama-bias"), config).save_pretrained(tmp_path)
    assert check_vllm(tmp_path)


def test_files_that_are_missing_pickled_or_damaged(good, tmp_path):
    with pytest.raises(dl.UserError, match="does not exist"):
        check_vllm(tmp_path / "nothing")
    assert len(check_vllm(tmp_path)) == 2
    shutil.copy(good / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    (problem,) = check_vllm(tmp_path)
    assert "adapter_model.bin is pickled" in problem
    (tmp_path / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes()[:100])
    assert "damaged" in check_vllm(tmp_path)[0]
    (tmp_path / "adapter_config.json").write_text('{"r": 8')
    assert "adapter_config.json is damaged" in check_vllm(tmp_path)[0]
    (tmp_path / "adapter_config.json").write_text("[]")
    assert "no mapping" in check_vllm(tmp_path)[0]
