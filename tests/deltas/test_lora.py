"""LoRA against Hugging Face peft and against its formula."""

import json
import math

import peft
import pytest
import safetensors.torch
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import deltalab as dl
from deltalab.core.spec import build
from deltalab.deltas.adapt import adaptation, attached, param_groups
from deltalab.deltas.lora import LoRADelta
from deltalab.deltas.site import Site
from tests.deltas.perturb import base_of, perturbed, states_equal, trained_alike
from tests.families import mixtral
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_gpt2, tiny_llama, tokens

SITE = Site("linear", (5, 4), "linear", torch.float64, torch.device("cpu"))

CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "use_rslora": True},
    "dropout": {"r": 3, "lora_alpha": 5, "lora_dropout": 0.2, "target_modules": ["gate_proj", "down_proj"]},
    "layers": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "layer pattern": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "expression": {"r": 2, "lora_alpha": 8, "target_modules": r".*\.0\..*(q|k)_proj"},
    "all-linear": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"},
    "without": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "patterns": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
                 "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3, "model.layers.1.*": 5}},
    "default targets": {"r": 2, "lora_alpha": 8},
}  # fmt: skip


def with_peft(config, model=None, seed=0):
    """A peft model with a delta that does something, in eval mode."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(model or tiny_llama(), peft.LoraConfig(**config, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_we_load_what_peft_saves(config, tmp_path):
    with_peft(config).save_pretrained(tmp_path)
    # loaded by peft again: it sorts the patterns on saving, and of two that match the first counts
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    ours = dl.load_adapter(tiny_llama(), tmp_path)
    assert error_by_norm(tiny_llama()(tokens()).logits, theirs(tokens()).logits) > 0.01
    assert_close_by_norm(ours(tokens()).logits, theirs(tokens()).logits, 1e-5)
    assert_close_by_norm(dl.merged(ours)(tokens()).logits, theirs.merge_and_unload()(tokens()).logits, 1e-5)
    assert all(delta.drop.p == config["lora_dropout"] for delta in attached(ours).values() if "lora_dropout" in config)


SPECS = {
    "plain": dl.LoRA(r=4, alpha=8, targets="attention"),
    "rank stabilised": dl.LoRA(r=4, alpha=3, targets="q,v", rank_stabilised=True),
    "dropout": dl.LoRA(r=2, dropout=0.1, targets=["down_proj"]),
    "layers": dl.LoRA(r=2, targets="all-linear", layers=[-1]),
    "one path": dl.LoRA(r=2, targets=["model.layers.0.self_attn.q_proj"]),
    "untied output": dl.LoRA(r=2, targets=["lm_head", "q_proj"]),
    "several ranks": [
        dl.LoRA(r=2, alpha=4, targets=["q_proj"]),
        dl.LoRA(r=5, alpha=4, targets=["v_proj"]),
        dl.LoRA(r=2, alpha=3, targets="mlp", layers=[0]),
    ],
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_peft_loads_what_we_save(spec, tmp_path):
    ours = perturbed(dl.adapt(tiny_llama(), spec))
    dl.save_adapter(ours, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    assert_close_by_norm(theirs(tokens()).logits, ours(tokens()).logits, 1e-5)
    adapted_there = {
        n.removeprefix("base_model.model.")
        for n, m in theirs.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert adapted_there == set(attached(ours))
    assert sum("lora" in name for name, _ in theirs.named_parameters()) == 2 * len(attached(ours))
    again = dl.load_adapter(tiny_llama(), tmp_path / "out")
    assert torch.equal(again(tokens()).logits, ours(tokens()).logits)


def test_gpt2_both_ways(tmp_path):
    ours = perturbed(dl.adapt(tiny_gpt2(), dl.LoRA(r=2, targets="all-linear")))
    dl.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "ours").eval()
    assert_close_by_norm(theirs(tokens()).logits, ours(tokens()).logits, 1e-5)
    theirs = with_peft({"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}, tiny_gpt2())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = dl.load_adapter(tiny_gpt2(), tmp_path / "theirs")
    assert_close_by_norm(ours(tokens()).logits, theirs(tokens()).logits, 1e-5)


def test_trains_as_peft_does(tmp_path):
    """Ten AdamW steps from the same start: the same A and B."""
    theirs = with_peft(CONFIGS["plain"])
    theirs.save_pretrained(tmp_path)
    ours = dl.load_adapter(tiny_llama(), tmp_path)
    for parameter in ours.parameters():
        assert parameter.requires_grad == any(parameter is p for d in attached(ours).values() for p in d.parameters())
    trained_alike(ours, theirs)
    state = peft.get_peft_model_state_dict(theirs)
    for path, delta in attached(ours).items():
        for key, tensor in delta.to_peft().items():
            assert_close_by_norm(tensor, state[f"base_model.model.{path}.{key}"], 1e-4)


def test_the_start_is_distributed_as_peft_draws_it():
    """A uniform on ±1/√in: the same bound and the same spread as peft's Kaiming initialisation; B zero."""
    model = nn.Sequential(nn.Linear(400, 300))
    dl.adapt(model, dl.LoRA(r=64, targets=["0"]))
    delta = attached(model)["0"]
    theirs = torch.empty(64, 400)
    nn.init.kaiming_uniform_(theirs, a=math.sqrt(5))
    assert delta.A.abs().max() <= 1 / math.sqrt(400)
    assert delta.A.std().item() == pytest.approx(theirs.std().item(), rel=0.02)
    assert abs(delta.A.mean().item()) < 1e-3
    assert torch.equal(delta.B, torch.zeros(300, 64))


def test_starts_that_are_drawn():
    """Against peft's draws, by their spread; BA is zero but for `random`, and the seed alone decides."""

    def start(init, make=lambda: nn.Sequential(nn.Linear(400, 300)), r=64, seed=0):
        return attached(dl.adapt(make(), dl.LoRA(r=r, init=init, targets=["0"]), seed=seed))["0"]

    for ours, there in (("gaussian", "gaussian"), ("orthogonal", "orthogonal"), ("random", False)):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=64, target_modules=["0"], init_lora_weights=there)
        layer = peft.get_peft_model(nn.Sequential(nn.Linear(400, 300)), config).base_model.model[0]
        delta = start(ours)
        for tensor, their in ((delta.A, layer.lora_A["default"].weight), (delta.B, layer.lora_B["default"].weight)):
            assert tensor.std().item() == pytest.approx(their.std().item(), rel=0.03, abs=1e-12)
        product = (delta.B @ delta.A).abs().max()
        assert (product > 0.01) if ours == "random" else (product <= 1e-6 * delta.A.norm() * (1 + delta.B.norm()))
        again, other = start(ours), start(ours, seed=1)
        assert torch.equal(delta.A, again.A)
        assert torch.equal(delta.B, again.B)
        assert not torch.equal(delta.A, other.A)
    odd = start("orthogonal", lambda: nn.Sequential(nn.Linear(6, 5)), r=2)
    assert odd.A.norm() > 0
    assert odd.B.norm() > 0
    table = start("kaiming", lambda: nn.Sequential(nn.Embedding(500, 300)))
    assert torch.equal(table.A, torch.zeros(64, 500))
    assert table.B.std().item() == pytest.approx(1, rel=0.02)


def test_loraplus_rates_are_those_of_peft():
    spec = dl.LoRA(r=2, targets="all-linear", lr_ratio=16)
    model = dl.adapt(tiny_llama(), spec)
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=3e-4, loraplus_lr_ratio=16)
    names = {p: name for name, p in theirs.named_parameters()}
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    ours = {p: group["lr"] for group in param_groups(model, 3e-4) for p in group["params"]}
    assert set(ours.values()) == {3e-4, 16 * 3e-4}
    for path, delta in attached(model).items():
        assert ours[delta.A] == rates[f"base_model.model.{path}.lora_A.default.weight"]
        assert ours[delta.B] == rates[f"base_model.model.{path}.lora_B.default.weight"]
    table = dl.adapt(tiny_llama(), dl.LoRA(targets=["embed_tokens"], lr_ratio=16))
    assert {group["lr"] for group in param_groups(table, 3e-4)} == {3e-4}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_own_biases_that_train_are_those_of_peft(bias):
    for spec in (dl.LoRA(r=2, bias=bias), peft.LoraConfig(r=2, bias=bias, target_modules=["q_proj", "v_proj"])):
        model = dl.adapt(tiny_llama(bias=True), spec)
        theirs = peft.get_peft_model(
            tiny_llama(bias=True), peft.LoraConfig(r=2, bias=bias, target_modules=["q_proj", "v_proj"])
        )
        there = {
            name.removeprefix("base_model.model.").replace(".base_layer", "")
            for name, p in theirs.named_parameters()
            if p.requires_grad and "lora_" not in name
        }
        assert {name for name, p in model.named_parameters() if p.requires_grad and ".delta." not in name} == there
        perturbed(model)
        assert states_equal(dl.unload(model), tiny_llama(bias=True))
    plain = tiny_llama()
    with pytest.raises(dl.UserError, match="trains nothing"):
        dl.adapt(plain, dl.LoRA(bias=bias))
    assert states_equal(plain, tiny_llama())


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}])
def test_embeddings_both_ways(fields, tmp_path):
    theirs = with_peft({"r": 4, "lora_alpha": 3, "target_modules": ["embed_tokens", "q_proj"], **fields})
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_embedding_A" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = dl.load_adapter(tiny_llama(), tmp_path / "theirs")
    assert error_by_norm(tiny_llama()(tokens()).logits, theirs(tokens()).logits) > 0.01
    assert_close_by_norm(ours(tokens()).logits, theirs(tokens()).logits, 1e-5)
    dl.save_adapter(perturbed(ours), tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    assert_close_by_norm(there(tokens()).logits, ours(tokens()).logits, 1e-5)
    keys = safetensors.torch.load_file(tmp_path / "ours/adapter_model.safetensors")
    assert {tuple(t.shape) for key, t in keys.items() if "embed" in key} == {(4, 270), (32, 4)}


def test_dropout_does_not_go_on_experts():
    model = mixtral()
    with pytest.raises(dl.UserError, match=r"dropout=0.1 cannot act on 'model.layers.0.mlp.experts"):
        dl.adapt(model, dl.LoRA(dropout=0.1, targets="all-linear"))
    assert not attached(dl.unload(dl.adapt(model, dl.LoRA(targets="all-linear"))))


def test_scale():
    assert dl.LoRA(r=4, alpha=8).scale == 2.0
    assert dl.LoRA(r=4, alpha=8, rank_stabilised=True).scale == 4.0


def test_forward_is_the_formula():
    delta = LoRADelta(SITE, dl.LoRA(r=2, alpha=3))
    delta.init(torch.Generator().manual_seed(0))
    nn.init.normal_(delta.B)
    W, x = torch.randn(5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    want = torch.stack([W @ row + 1.5 * delta.B @ (delta.A @ row) for row in x])
    assert_close_by_norm(delta(x, base_of(W)), want, 1e-12)
    A, B, s = delta.factors()
    assert_close_by_norm(delta.adapted(W), W + s * B @ A, 1e-12)
    assert delta.entries(torch.arange(0), W).shape == (0,)


def test_dropout_acts_in_training_on_the_delta_alone():
    model = perturbed(dl.adapt(tiny_llama(), dl.LoRA(r=4, dropout=0.5, targets="attention")))
    calm = model(tokens()).logits
    assert torch.equal(model(tokens()).logits, calm)
    model.train()
    assert not torch.equal(model(tokens()).logits, model(tokens()).logits)
    with dl.disabled(model):
        assert torch.equal(model(tokens()).logits, tiny_llama()(tokens()).logits)


def test_parameters_stay_fp32_under_a_16_bit_model():
    model = dl.adapt(tiny_llama(dtype=torch.bfloat16), dl.LoRA(r=2))
    assert {p.dtype for d in attached(model).values() for p in d.parameters()} == {torch.float32}
    assert model(tokens()).logits.dtype is torch.bfloat16
    assert dl.delta_weight(model, "model.layers.0.self_attn.q_proj").dtype is torch.float32
    wide = dl.adapt(tiny_llama(dtype=torch.float64), dl.LoRA(r=2))
    assert {p.dtype for d in attached(wide).values() for p in d.parameters()} == {torch.float64}


def test_a_peft_config_is_taken_for_a_spec():
    for config in CONFIGS.values():
        ours = perturbed(dl.adapt(tiny_llama(), peft.LoraConfig(**config)))
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**config))
        there = {
            n.removeprefix("base_model.model.")
            for n, m in theirs.named_modules()
            if isinstance(m, peft.tuners.lora.LoraLayer)
        }
        assert set(attached(ours)) == there
        scales = {
            n.removeprefix("base_model.model."): m.scaling["default"]
            for n, m in theirs.named_modules()
            if isinstance(m, peft.tuners.lora.LoraLayer)
        }
        assert {path: delta.s for path, delta in attached(ours).items()} == scales
    with pytest.raises(dl.UserError, match="init_lora_weights='mica'"):
        dl.adapt(tiny_llama(), peft.LoraConfig(init_lora_weights="mica", target_modules=["q_proj"]))
    with pytest.raises(dl.UserError, match="LOHA"):
        dl.adapt(tiny_llama(), peft.LoHaConfig(target_modules=["q_proj"]))


def test_the_config_is_what_people_read(tmp_path):
    model = tiny_llama()
    model.config._name_or_path = "someone/model"
    dl.save_adapter(dl.adapt(model, dl.LoRA(r=2, targets="q,v", layers=[0])), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/model"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["layers_to_transform"] == [0]
    assert list(config) == sorted(config)


@pytest.mark.parametrize(
    "fault",
    [
        {"r": 0},
        {"alpha": -1},
        {"alpha": float("inf")},
        {"dropout": 1.0},
        {"targets": []},
        {"rank": 8},
        {"r": "many"},
        {"rho": 2},
        {"svd_steps": 3},
        {"init": "eva", "svd_steps": 3},
        {"init": "pissa", "rho": 2},
    ],
)
def test_faults_of_a_spec(fault):
    with pytest.raises(dl.UserError):
        build(dl.LoRA, fault)


def test_works_with_the_trainer_of_transformers(tmp_path):
    model = dl.adapt(tiny_llama(), dl.LoRA(r=2))
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert all(delta.B.abs().max() > 0 for delta in attached(model).values())
    assert adaptation(model).plan
