"""What is exported computes what the adapted model does: through peft, through our loader, and by vLLM's arithmetic."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.base import Base, Delta
from deltalab.models.export import export
from deltalab.models.vllm import rank_for
from deltalab.models.vllm_check import check_vllm
from tests.conformance.kit import driven
from tests.deltas.perturb import perturbed
from tests.families import logits, model_of
from tests.helpers import assert_close_by_norm, byte_tokenizer, error_by_norm

TAKEN = {
    "plain": ("llama", dl.LoRA(r=3, alpha=5, targets="all-linear")),
    "rank-stabilised": ("llama", dl.LoRA(r=4, rank_stabilised=True, targets="attention")),
    "patterns": ("llama", dl.LoRA(r=2, targets="attention", rank_pattern={"k_proj": 9}, alpha_pattern={"v_proj": 3.0})),
    "some-layers": ("llama", dl.LoRA(r=8, targets="q,v", layers=[1])),
    "one-module": ("llama", dl.LoRA(r=8, targets=["layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"])),
    "pissa": ("llama", dl.LoRA(r=5, init="pissa", targets="attention")),
    "olora": ("llama", dl.LoRA(r=4, init="olora", rank_stabilised=True)),
    "adalora": ("llama", dl.AdaLoRA(init_r=9, target_r=3, targets="all-linear")),
    "vera": ("llama", dl.VeRA(r=12, targets="all-linear")),
    "two-kinds": ("llama", [dl.LoRA(r=2, targets="attention"), dl.VeRA(r=10, targets="mlp")]),
    "bias-of-the-base": ("llama-bias", dl.LoRA(r=8, targets="all-linear")),
    "conv1d": ("gpt2", dl.LoRA(r=2, targets="all-linear")),
    "fused": ("phi3", dl.LoRA(r=2, targets="all-linear")),
    "interleaved": ("gpt_neox", dl.LoRA(r=2, targets="all-linear")),
    "bf16": ("llama-bf16", dl.LoRA(r=2, targets="attention")),
    "attention-of-a-mixture": ("mixtral", dl.LoRA(r=2, targets="attention")),
}


class Shift(Delta):
    """A delta that depends on the input: it has no weight."""

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.zeros(1))

    def init(self, generator):
        pass

    def forward(self, x, base: Base):
        return base(x) + self.by


def moved(case):
    family, spec = TAKEN[case]
    model = perturbed(dl.adapt(model_of(family), spec), 0.3)
    return driven(model, dl.AdaLoRA) if isinstance(spec, dl.AdaLoRA) else model


def by_the_rules(model, folder):
    """vLLM's arithmetic, from the files alone: every pair times the one scale of the config."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, B in tensors.items():
        if key.endswith(".lora_B.weight"):
            A = tensors[key.replace("lora_B", "lora_A")]
            linear = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_B.weight"))
            change = scale * B.double() @ A.double()
            W = linear.weight.data
            linear.weight.data = (W.double() + (change.T if isinstance(linear, Conv1D) else change)).to(W.dtype)
    return model


@pytest.mark.parametrize("case", TAKEN)
def test_the_exported_adapter_computes_the_same(case, tmp_path):
    model, family = moved(case), TAKEN[case][0]
    done = export(model, tmp_path / "out")
    want, base = logits(model), logits(model_of(family))
    bound = 0.1 if family == "llama-bf16" else 1e-5  # each way rounds elsewhere; the changes themselves are fp32
    assert error_by_norm(want, base) > 3 * bound
    assert check_vllm(done.folder) == []
    again = dl.load_adapter(model_of(family), done.folder)
    for path in attached(model):
        assert_close_by_norm(dl.delta_weight(again, path), dl.delta_weight(model, path), 1e-6)
    assert_close_by_norm(logits(again), want, bound)
    assert_close_by_norm(logits(by_the_rules(model_of(family), done.folder)), want, bound)
    assert_close_by_norm(logits(peft.PeftModel.from_pretrained(model_of(family), done.folder).eval()), want, bound)


def test_the_config_and_the_tensors(tmp_path):
    model = moved("patterns")
    done = export(model, tmp_path / "out", dtype=torch.bfloat16)
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["bias"]) == (16, 16, False, "none")
    assert (config["rank_pattern"], config["alpha_pattern"], config["modules_to_save"]) == ({}, {}, None)
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    tensors = load_file(done.folder / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    A, B = (tensors[f"base_model.model.model.layers.0.self_attn.k_proj.lora_{which}.weight"] for which in "AB")
    assert (A.shape, B.shape) == ((16, 32), (16, 16))
    assert int(A[9:].count_nonzero()) == int(B[:, 9:].count_nonzero()) == 0
    assert "--max-lora-rank 16 " in str(done)
    assert f"--lora-modules out={done.folder}" in str(done)


def test_the_rank_is_the_next_that_there_is_room_for():
    assert [rank_for({"a": 1, "b": r}) for r in (1, 2, 8, 9, 129, 257, 321, 512)] == [1, 8, 8, 16, 256, 320, 512, 512]
    with pytest.raises(dl.UserError, match="'b' has rank 513"):
        rank_for({"a": 1, "b": 513})


def test_a_quantised_base(tmp_path):
    """QA-LoRA's change is a pair; what it merges to is a plain model."""
    folder = tmp_path / "base"
    model_of("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)

    def base():
        return dl.load(folder, quantize="int4-group")[0]

    model = perturbed(dl.adapt(base(), dl.QALoRA(r=3, targets="attention")), 0.3)
    export(model, tmp_path / "out")
    assert_close_by_norm(logits(dl.load_adapter(base(), tmp_path / "out")), logits(model), 1e-5)
    export(model, tmp_path / "merged", "merged", tokenizer=byte_tokenizer())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close_by_norm(logits(plain), logits(model), 1e-5)


def test_an_nf4_base_and_linears_without_a_delta(tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model, _ = dl.load(tmp_path / "base", quantize="nf4")
    perturbed(dl.adapt(model, dl.LoRA(r=3, targets="q,v")), 0.3)
    export(model, tmp_path / "out")
    again, _ = dl.load(tmp_path / "base", quantize="nf4")
    assert_close_by_norm(logits(dl.load_adapter(again, tmp_path / "out")), logits(model), 1e-5)
    export(model, tmp_path / "merged", "merged", tokenizer=byte_tokenizer())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    assert_close_by_norm(logits(plain), logits(model), 1e-5)


@pytest.mark.parametrize(
    ("family", "spec", "reason"),
    [
        ("llama", dl.DoRA(r=2), "DoRA on 'model.layers.0.self_attn.q_proj' is not a pair"),
        ("llama", dl.IA3(), "IA3 on 'model.layers.0.self_attn.k_proj' is not a pair"),
        ("llama", [dl.LoRA(r=2), dl.Train("norms")], "trains the model's own 'model.layers.0.input_layernorm.weight'"),
        ("llama-bias", dl.LoRA(r=2, bias="lora_only"), "trains the model's own 'model.layers.0.self_attn.q_proj.bias'"),
        ("llama", dl.Train("norms"), "trains model.layers.0.input_layernorm.weight alone"),
        ("llama", dl.LoRA(r=2, targets=["lm_head"]), "no pair on the output layer, 'lm_head'"),
        ("llama", dl.LoRA(r=2, targets=["embed_tokens"]), "'model.embed_tokens' is an embedding"),
        ("mixtral", dl.LoRA(r=2, targets="mlp"), "experts.gate_up_proj' is a stack of experts"),
        ("llama", dl.LoRA(r=600), "has rank 600; vLLM takes at most 512"),
    ],
    ids=["dora", "ia3", "norms", "bias", "own-alone", "lm_head", "embedding", "experts", "rank"],
)  # fmt: skip
def test_what_vllm_has_no_form_of_is_refused_by_name(family, spec, reason, tmp_path):
    model = perturbed(dl.adapt(model_of(family), spec))
    with pytest.raises(dl.UserError, match=reason) as caught:
        export(model, tmp_path / "out")
    assert "--for merged" in caught.value.next
    assert list(tmp_path.iterdir()) == []
    export(model, tmp_path / "merged", "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close_by_norm(logits(merged), logits(model), 1e-5)


def test_frozen_entries_and_deltas_without_a_weight_are_refused(tmp_path):
    model = perturbed(dl.adapt(model_of("llama"), dl.LoRA(r=2)))
    path = "model.layers.0.self_attn.q_proj"
    linear = model.get_submodule(path)
    linear.delta.keep = torch.rand(linear.weight.shape) < 0.5
    with pytest.raises(dl.UserError, match=f"entries of '{path}' are held in place"):
        export(model, tmp_path / "out")
    linear._modules["delta"] = Shift()
    with pytest.raises(dl.UserError, match=f"Shift on '{path}' depends on the input") as caught:
        export(model, tmp_path / "out")
    assert "deltalab generate" in caught.value.next
    with pytest.raises(dl.UserError, match="depends on the input"):
        export(model, tmp_path / "out", "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "spec", [dl.Bottleneck(), dl.ZeroInitPrefix(), dl.LoRAExperts()], ids=lambda s: type(s).__name__
)
def test_methods_that_depend_on_the_input_go_nowhere(spec, tmp_path):
    model = perturbed(dl.adapt(model_of("llama"), spec))
    for to in ("vllm", "merged", "gguf"):
        with pytest.raises(dl.UserError, match="depends on the input") as caught:
            export(model, tmp_path / "out", to)
        assert "--for merged" not in caught.value.next
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_a_start_took_a_part_of_is_refused(tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model, _ = dl.load(tmp_path / "base", quantize="int8", adapt=dl.LoRA(r=2, init="pissa", targets="attention"))
    with pytest.raises(dl.UserError, match="belongs to a base of its own"):
        export(model, tmp_path / "out")
    export(model, tmp_path / "merged", "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close_by_norm(logits(plain), logits(model), 1e-5)


def test_values_that_the_dtype_cannot_hold(tmp_path):
    model = perturbed(dl.adapt(model_of("llama"), dl.LoRA(r=2, alpha=1e6)))
    with pytest.raises(dl.UserError, match="not finite in float16") as caught:
        export(model, tmp_path / "out", dtype=torch.float16)
    assert caught.value.next == "--dtype float32"


def test_peft_gets_its_own_file_where_it_has_words(tmp_path):
    model = perturbed(dl.adapt(model_of("llama"), dl.DoRA(r=2)))
    export(model, tmp_path / "out", "peft")
    theirs = peft.PeftModel.from_pretrained(model_of("llama"), tmp_path / "out").eval()
    assert_close_by_norm(logits(theirs), logits(model), 1e-5)
    two = moved("two-kinds")
    with pytest.raises(dl.UserError, match="peft has no words"):
        export(two, tmp_path / "two", "peft")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("to", ["merged", "gguf"])
def test_a_merged_model_with_its_tokenizer_and_the_way_on(to, tmp_path):
    model = moved("plain")
    done = export(model, tmp_path / "out", to, tokenizer=byte_tokenizer(), dtype=torch.bfloat16)
    plain, tokenizer = dl.load(tmp_path / "out")
    assert_close_by_norm(logits(plain), logits(model), 3e-2)
    assert len(tokenizer) == len(byte_tokenizer())
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype is torch.bfloat16
    assert ("convert_hf_to_gguf.py" in str(done)) == (to == "gguf")


def test_nothing_is_overwritten_and_mistakes_are_named(tmp_path):
    model = moved("some-layers")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(dl.UserError, match="is not empty"):
        export(model, tmp_path / "full")
    (tmp_path / "file").write_text("x")
    with pytest.raises(dl.UserError, match="is a file"):
        export(model, tmp_path / "file")
    with pytest.raises(dl.UserError, match="no export for 'vlm'") as caught:
        export(model, tmp_path / "out", "vlm")
    assert caught.value.nearest == ("vllm",)
    with pytest.raises(dl.UserError, match="no adapter"):
        export(model_of("llama"), tmp_path / "out")
    fresh = dl.adapt(model_of("llama"), dl.AdaLoRA(init_r=4, target_r=2))
    perturbed(fresh)
    loss = fresh(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss
    loss.backward()
    dl.step(fresh, 1, 10)
    with pytest.raises(dl.UserError):  # a schedule on its way
        export(fresh, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty")
    assert check_vllm(tmp_path / "empty") == []
