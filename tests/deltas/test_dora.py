"""DoRA against Hugging Face peft, and against the norm of the matrix that it never forms."""

import copy
import json

import peft
import pytest
import torch
from torch import nn

import deltalab as dl
from deltalab.deltas.adapt import attached, param_groups
from deltalab.deltas.quantise import quantise
from deltalab.deltas.site import Site
from deltalab.deltas.sites import place
from deltalab.quant.linear import quantiser
from tests.deltas.perturb import base_of, perturbed, trained_alike
from tests.families import model_of
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_gpt2, tiny_llama, tokens

SITE = Site("linear", (7, 5), "linear", torch.float64, torch.device("cpu"))
Q = "model.layers.0.self_attn.q_proj"

CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "use_rslora": True},
    "dropout": {"r": 3, "lora_dropout": 0.2, "target_modules": ["gate_proj", "down_proj"]},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "patterns": {"r": 4, "target_modules": ["q_proj", "v_proj"],
                 "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "k_proj"]},
}  # fmt: skip
MODELS = {"llama": tiny_llama, "bias": lambda: tiny_llama(bias=True)}
SPECS = {
    "plain": dl.DoRA(r=4, alpha=8, targets="attention"),
    "rank stabilised": dl.DoRA(r=4, alpha=3, targets="q,v", rank_stabilised=True),
    "layers": dl.DoRA(r=2, targets="all-linear", layers=[-1]),
    "ranks": dl.DoRA(r=2, targets="all-linear", rank_pattern={"q_proj": 5}, alpha_pattern={"down_proj": 3}),
    "embedding": dl.DoRA(r=2, targets=["embed_tokens", "v_proj"]),
    "untied output": dl.DoRA(r=2, targets=["lm_head"]),
}
FAMILIES = {"gpt2": dl.DoRA(r=2, targets="all-linear"), "t5": dl.DoRA(r=2, targets="attention")}


def with_peft(config, model, seed=0):
    """A peft model with lengths and directions that do something, in eval mode."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(**config, use_dora=True))
    return moved(model).eval()


def moved(model, seed=1):
    """The parameters of peft's deltas, away from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def brute(W, delta):
    """The adapted weight by its definition."""
    V = W + delta.s * delta.B @ delta.A
    return (delta.m / V.norm(dim=-1)).unsqueeze(-1) * V


def delta_of(site=SITE, r=2, seed=0):
    """A delta whose every parameter is random."""
    delta = dl.DoRA(r=r, alpha=3.0).build(site)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        delta.m.abs_()
    return delta


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_we_load_what_peft_saves(config, family, tmp_path):
    theirs = with_peft(config, MODELS[family]())
    theirs.save_pretrained(tmp_path)
    ours = dl.load_adapter(MODELS[family](), tmp_path)
    want = theirs(tokens()).logits
    assert error_by_norm(MODELS[family]()(tokens()).logits, want) > 0.01
    assert_close_by_norm(ours(tokens()).logits, want, 1e-5)
    assert_close_by_norm(dl.merged(ours)(tokens()).logits, theirs.merge_and_unload()(tokens()).logits, 1e-5)
    assert {type(delta).__name__ for delta in attached(ours).values()} == {"DoRADelta"}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_peft_loads_what_we_save(spec, tmp_path):
    ours = perturbed(dl.adapt(tiny_llama(bias=True), spec))
    dl.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    theirs = peft.PeftModel.from_pretrained(tiny_llama(bias=True), tmp_path).eval()
    assert_close_by_norm(theirs(tokens()).logits, ours(tokens()).logits, 1e-5)
    lengths = [name for name, _ in theirs.named_parameters() if "lora_magnitude_vector" in name]
    assert len(lengths) == len(attached(ours))
    again = dl.load_adapter(tiny_llama(bias=True), tmp_path)
    assert torch.equal(again(tokens()).logits, ours(tokens()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_both_ways(family, tmp_path):
    ours = perturbed(dl.adapt(model_of(family), FAMILIES[family]))
    dl.save_adapter(ours, tmp_path / "ours")
    given = {"input_ids": tokens(), **({"labels": tokens()} if family == "t5" else {})}
    theirs = peft.PeftModel.from_pretrained(model_of(family), tmp_path / "ours").eval()
    assert_close_by_norm(theirs(**given).logits, ours(**given).logits, 1e-5)
    moved(theirs, seed=3).save_pretrained(tmp_path / "theirs")
    assert_close_by_norm(
        dl.load_adapter(model_of(family), tmp_path / "theirs")(**given).logits, theirs(**given).logits, 1e-5
    )
    assert error_by_norm(theirs(**given).logits, ours(**given).logits) > 0.01


def test_a_16_bit_model_computes_what_peft_does(tmp_path):
    base = tiny_llama(dtype=torch.bfloat16)
    theirs = with_peft(CONFIGS["plain"], copy.deepcopy(base))
    theirs.save_pretrained(tmp_path)
    ours = dl.load_adapter(copy.deepcopy(base), tmp_path)
    want = theirs(tokens()).logits
    assert ours(tokens()).logits.dtype is torch.bfloat16
    assert_close_by_norm(ours(tokens()).logits, want, 2e-2)
    assert error_by_norm(base(tokens()).logits, want) > 0.1
    W = base.get_submodule(Q).weight
    assert_close_by_norm(attached(ours)[Q].norm(W), _V(W.double(), attached(ours)[Q].double()).norm(dim=-1), 1e-6)


def _V(W, delta):
    return W + delta.s * delta.B @ delta.A


def test_the_start_is_pefts():
    """The same lengths, as peft sets them; the model computes what the base does, to the bit, in 16 bits too."""
    for make in (tiny_llama, lambda: tiny_llama(bias=True, dtype=torch.bfloat16), tiny_gpt2):
        targets = ["c_attn", "wte"] if make is tiny_gpt2 else ["q_proj", "embed_tokens"]
        model = make() if make is not tiny_gpt2 else _untied_gpt2()
        ours = dl.adapt(copy.deepcopy(model), dl.DoRA(r=2, targets=targets))
        assert torch.equal(ours(tokens()).logits, model(tokens()).logits)
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, use_dora=True, target_modules=targets))
        state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
        bound = 1e-2 if model.dtype is torch.bfloat16 else 1e-6
        for path, delta in attached(ours).items():
            assert_close_by_norm(delta.m, state[f"base_model.model.{path}.lora_magnitude_vector"].float(), bound)


def _untied_gpt2():
    model = tiny_gpt2()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


@pytest.mark.parametrize("config", ["plain", "dropout", "embedding"])
def test_trains_as_peft_does(config, tmp_path):
    """Ten AdamW steps from the same start, with the same entries dropped: the same A, B and lengths."""
    theirs = with_peft(CONFIGS[config], tiny_llama(bias=True))
    theirs.save_pretrained(tmp_path)
    ours = dl.load_adapter(tiny_llama(bias=True), tmp_path)
    before = {path: [p.detach().clone() for p in delta.parameters()] for path, delta in attached(ours).items()}
    trained_alike(ours.train(), theirs.train())
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    for path, delta in attached(ours).items():
        for key, tensor in delta.to_peft().items():
            assert_close_by_norm(tensor, state[f"base_model.model.{path}.{key}"], 1e-4)
        assert all(error_by_norm(p, was) > 1e-3 for p, was in zip(delta.parameters(), before[path], strict=True))


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5)], ids=["linear", "experts"])
def test_the_adapted_weight_is_the_formula(shape):
    site = SITE._replace(shape=shape, kind="linear" if len(shape) == 2 else "experts")
    delta, W = delta_of(site), torch.randn(shape, dtype=torch.float64)
    assert_close_by_norm(delta.norm(W), _V(W, delta).norm(dim=-1), 1e-13)
    assert_close_by_norm(delta.adapted(W), brute(W, delta), 1e-13)
    assert_close_by_norm(delta.change(W), brute(W, delta) - W, 1e-13)
    assert delta.factors() is None
    index = torch.randperm(W.numel())[:9]
    assert torch.equal(delta.entries(index, W), delta.change(W).flatten()[index])


def test_the_gradient_is_that_of_the_norm_held_fixed():
    """What the paper's §4.3 detaches: autograd agrees with the formula with a constant norm, not with the free one."""
    delta, W = delta_of(), torch.randn(7, 5, dtype=torch.float64)
    bias, x = torch.randn(7, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    weights = torch.randn(6, 7, dtype=torch.float64)
    norm = _V(W, delta).norm(dim=-1).detach()

    def gradients(y):
        return torch.autograd.grad((weights * y).sum(), [delta.A, delta.B, delta.m])

    got = gradients(delta(x, base_of(W, bias)))
    V = _V(W, delta)
    held = gradients(x @ ((delta.m / norm).unsqueeze(-1) * V).T + bias)
    free = gradients(x @ brute(W, delta).T + bias)
    for mine, constant, other in zip(got, held, free, strict=True):
        assert_close_by_norm(mine, constant, 1e-12)
        if mine is not got[2]:
            assert error_by_norm(mine, other) > 1e-2
    assert_close_by_norm(got[2], free[2], 1e-12)
    assert_close_by_norm(gradients(x @ delta.adapted(W).T)[1], held[1], 1e-12)


def test_what_is_remembered_of_the_weight_stays_right():
    """‖W‖² after a cast, there and back, a copy, a write in place, and another weight where the old one lay."""
    model = perturbed(dl.adapt(tiny_llama(), dl.DoRA(r=2, targets=["q_proj"])))
    model(tokens())

    def check(model, bound):
        held, delta = place(model, Q), attached(model)[Q]
        want = _V(held.W.double(), copy.deepcopy(delta).double()).norm(dim=-1)
        assert_close_by_norm(delta.norm(held.W), want, bound)
        assert delta.norm(held.W).dtype in (torch.float32, torch.float64)

    check(model, 1e-6)
    check(model.double(), 1e-13)
    check(model.to(torch.bfloat16), 1e-6)
    check(model.float(), 1e-6)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        place(twin, Q).parameter.mul_(3)
    check(twin, 1e-6)
    check(model, 1e-6)
    twin.load_state_dict(model.state_dict())
    check(twin, 1e-6)
    assert_close_by_norm(attached(twin)[Q].norm(place(twin, Q).W), attached(model)[Q].norm(place(model, Q).W), 1e-7)
    state = model.state_dict()
    assert {key.rpartition(".")[2] for key in state if ".delta." in key} == {"A", "B", "m"}


def test_the_squares_of_the_weight_are_summed_once():
    for make, path in ((tiny_llama, Q), (tiny_gpt2, "transformer.h.0.attn.c_attn")):
        model = dl.adapt(make(), dl.DoRA(r=2, targets=[path]))
        delta = attached(model)[path]
        model(tokens())
        _, first = delta._squares
        model(tokens(seed=1))
        assert delta._squares[1] is first
        with torch.no_grad():
            place(model, path).parameter.mul_(2)
        model(tokens())
        assert_close_by_norm(delta._squares[1], 4 * first, 1e-6)


def test_a_group_quantised_base_begins_as_itself():
    """Quantised before or together with the start: the lengths are those of what the codes stand for."""
    spec = dl.DoRA(r=2, targets="all-linear")
    base = quantise(tiny_llama(mlp=64), quantiser("int8"))
    want = base(tokens()).logits
    together = quantise(tiny_llama(mlp=64), quantiser("int8"), spec)
    after = dl.adapt(base, spec)
    for model in (together, after):
        assert_close_by_norm(model(tokens()).logits, want, 1e-6)
        assert_close_by_norm(dl.merged(perturbed(model))(tokens()).logits, model(tokens()).logits, 1e-5)


def test_a_16_bit_base_that_is_quantised_begins_without_a_change():
    """The lengths are those of the codes' weight in 16 bit, which is the base."""
    model = quantise(tiny_llama(mlp=64).bfloat16(), quantiser("int4-group"), dl.DoRA(r=2))
    for path in attached(model):
        assert not dl.delta_weight(model, path).any()


def test_a_row_of_zeros_stays_finite():
    model = nn.Sequential(nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight[2] = 0
    x = torch.randn(3, 5)
    want = model(x)
    dl.adapt(model, dl.DoRA(r=2, targets=["0"]))
    assert torch.equal(model(x), want)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
    for _ in range(3):
        model(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in attached(model)["0"].parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert model(x).isfinite().all()


def test_dropout_acts_in_training_on_the_change_alone():
    model = perturbed(dl.adapt(tiny_llama(), dl.DoRA(r=4, dropout=0.5, targets="attention")))
    calm = model(tokens()).logits
    assert torch.equal(model(tokens()).logits, calm)
    model.train()
    assert not torch.equal(model(tokens()).logits, model(tokens()).logits)
    fresh = dl.adapt(tiny_llama(), dl.DoRA(r=4, dropout=0.5, targets="attention"), kernels="plain").train()
    assert torch.equal(fresh(tokens()).logits, tiny_llama()(tokens()).logits)


def test_a_peft_config_is_taken_for_a_spec():
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    model = dl.adapt(tiny_llama(), config)
    assert len(attached(model)) == 3
    assert {type(delta).__name__ for delta in attached(model).values()} == {"DoRADelta"}
    assert torch.equal(model(tokens()).logits, tiny_llama()(tokens()).logits)
    for start in ("pissa", "gaussian"):
        with pytest.raises(dl.UserError, match=f"init_lora_weights='{start}'"):
            dl.adapt(tiny_llama(), peft.LoraConfig(use_dora=True, init_lora_weights=start, target_modules=["q_proj"]))


def test_of_a_saved_adapter_a_start_counts_only_if_it_moved_the_base(tmp_path):
    theirs = with_peft({**CONFIGS["plain"], "init_lora_weights": "gaussian"}, tiny_llama())
    theirs.save_pretrained(tmp_path / "gaussian")
    ours = dl.load_adapter(tiny_llama(), tmp_path / "gaussian")
    assert_close_by_norm(ours(tokens()).logits, theirs(tokens()).logits, 1e-5)
    with_peft({**CONFIGS["plain"], "init_lora_weights": "pissa"}, tiny_llama()).save_pretrained(tmp_path / "pissa")
    with pytest.raises(dl.UserError, match="init_lora_weights='pissa'"):
        dl.load_adapter(tiny_llama(), tmp_path / "pissa")


def test_experts_are_saved_where_peft_refuses_them(tmp_path):
    model = perturbed(dl.adapt(model_of("mixtral"), dl.DoRA(r=2, targets=["model.layers.0.mlp.experts.down_proj"])))
    dl.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DELTALAB"
    again = dl.load_adapter(model_of("mixtral"), tmp_path)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_a_quantised_weight_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(dl.UserError, match="DoRA looks at the weight"):
        dl.adapt(model, dl.DoRA(targets=["0"]))
    assert type(model[0]) is nn.Linear
