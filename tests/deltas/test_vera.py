"""VeRA against Hugging Face peft and against its formula; its projections: one pair, wherever the model goes."""

import copy
import json
import pickle

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.peft_format import load_trained_state, trained_state
from deltalab.deltas.site import Site
from deltalab.deltas.vera import Projections
from tests.deltas.perturb import base_of, perturbed, states_equal, trained_alike
from tests.families import model_of
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_gpt2, tiny_llama, tokens

ALL = ["q_proj", "v_proj", "gate_proj", "down_proj"]  # (32, 32), (16, 32), (48, 32), (32, 48): corners of 48 × 48

CONFIGS = {
    "corners": {"r": 8, "target_modules": ALL},
    "one shape": {"r": 5, "target_modules": ["gate_proj"], "d_initial": 0.3},
    "another seed": {"r": 8, "target_modules": ALL, "projection_prng_key": 11},
    "not saved": {"r": 8, "target_modules": ALL, "save_projection": False, "projection_prng_key": 3},
    "dropout": {"r": 4, "target_modules": ["q_proj", "v_proj"], "vera_dropout": 0.2},
    "layers": {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "all-linear": {"r": 4, "target_modules": "all-linear"},
}


def tiny_t5(seed: int = 0) -> transformers.T5ForConditionalGeneration:
    config = transformers.T5Config(
        vocab_size=270, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.T5ForConditionalGeneration(config).eval()


def logits(model):
    if model.config.is_encoder_decoder:
        return model(input_ids=tokens(), decoder_input_ids=tokens(seed=1)).logits
    return model(input_ids=tokens()).logits


MODELS = {
    "gpt2": (tiny_gpt2, {"r": 6, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "t5": (tiny_t5, {"r": 6, "target_modules": ["q", "v", "wi", "wo"]}),
}


def with_peft(config, model=None):
    """A peft model with a delta that does something, in eval mode."""
    model = peft.get_peft_model(model or tiny_llama(), peft.VeraConfig(**config))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def agree(ours, theirs, base):
    assert error_by_norm(logits(base), logits(theirs)) > 0.01
    assert_close_by_norm(logits(ours), logits(theirs), 1e-5)
    assert_close_by_norm(logits(dl.merged(ours)), logits(copy.deepcopy(theirs).merge_and_unload()), 1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_we_load_what_peft_saves(config, tmp_path):
    theirs = with_peft(config)
    theirs.save_pretrained(tmp_path)
    ours = dl.load_adapter(tiny_llama(), tmp_path)
    agree(ours, theirs, tiny_llama())
    deltas = attached(ours).values()
    assert all(delta.drop.p == config["vera_dropout"] for delta in deltas if "vera_dropout" in config)
    assert all(delta.shared.read is None for delta in deltas), "the seed gives what peft drew, to the bit"


@pytest.mark.parametrize(("make", "config"), MODELS.values(), ids=MODELS)
def test_other_models_both_ways(make, config, tmp_path):
    theirs = with_peft(config, make())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = dl.load_adapter(make(), tmp_path / "theirs")
    agree(ours, theirs, make())
    dl.save_adapter(ours, tmp_path / "ours")
    agree(ours, peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval(), make())


SPECS = {
    "corners": dl.VeRA(r=8, targets=ALL),
    "not saved": dl.VeRA(r=8, targets=ALL, save_projection=False, projection_seed=5),
    "dropout": dl.VeRA(r=4, targets="attention", dropout=0.1),
    "layers": dl.VeRA(r=4, targets="all-linear", layers=[-1]),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_peft_loads_what_we_save(spec, tmp_path):
    ours = perturbed(dl.adapt(tiny_llama(), spec), 0.3)
    dl.save_adapter(ours, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    agree(ours, theirs, tiny_llama())
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert ({"base_model.vera_A", "base_model.vera_B"} <= keys) == spec.save_projection
    assert len(keys) == 2 * len(attached(ours)) + 2 * spec.save_projection


@pytest.mark.parametrize("config", [CONFIGS["corners"], CONFIGS["not saved"]], ids=["saved", "not saved"])
def test_a_config_object_of_peft_starts_as_peft_does(config):
    ours = dl.adapt(tiny_llama(), peft.VeraConfig(**config))
    theirs = peft.get_peft_model(tiny_llama(), peft.VeraConfig(**config))
    state = peft.get_peft_model_state_dict(theirs)
    for path, delta in attached(ours).items():
        for key, tensor in delta.to_peft().items():
            assert torch.equal(tensor, state[f"base_model.model.{path}.{key}"])
    delta = next(iter(attached(ours).values()))
    theirs = next(m for m in theirs.modules() if isinstance(m, peft.tuners.vera.VeraLayer))
    A, B = delta.shared.on(torch.device("cpu"), torch.float32)
    assert torch.equal(A, theirs.vera_A["default"])
    assert torch.equal(B, theirs.vera_B["default"])
    assert A.shape == (8, 48)
    assert B.shape == (48, 8)


def test_trains_as_peft_does(tmp_path):
    """Ten AdamW steps from the same start: the same d and b."""
    theirs = peft.get_peft_model(tiny_llama(), peft.VeraConfig(**CONFIGS["corners"])).eval()
    theirs.save_pretrained(tmp_path)
    ours = dl.load_adapter(tiny_llama(), tmp_path)
    before = trained_state(ours)
    before = {key: value.clone() for key, value in before.items()}
    trained_alike(ours, theirs)
    state = peft.get_peft_model_state_dict(theirs)
    for path, delta in attached(ours).items():
        for key, tensor in delta.to_peft().items():
            assert_close_by_norm(tensor, state[f"base_model.model.{path}.{key}"], 1e-4)
    assert all(error_by_norm(value, before[key]) > 0.01 for key, value in trained_state(ours).items())


def test_the_formula():
    """Wx + b ⊙ B(d ⊙ Ax), entry by entry, of a module that reads a corner of larger projections."""
    delta = dl.VeRA(r=3, projection_seed=2).build(Site("x", (5, 4), "linear", torch.float64, torch.device("cpu")))
    delta.shared = Projections(2, 3, 7, 9)
    A, B = (t[:, :4] if t.shape[0] == 3 else t[:5] for t in delta.shared.on(torch.device("cpu"), torch.float64))
    W, x = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        delta.d.normal_()
        delta.b.normal_()
        want = torch.stack([W @ v + delta.b * (B @ (delta.d * (A @ v))) for v in x])
        assert_close_by_norm(delta(x, base_of(W)), want, 1e-14)
        assert_close_by_norm(x @ delta.adapted(W).T, want, 1e-14)


def test_experts():
    """One A and B for all experts, d and b for each."""
    delta = dl.VeRA(r=3).build(Site("x", (2, 5, 4), "experts", torch.float64, torch.device("cpu")))
    with torch.no_grad():
        delta.d.normal_()
        delta.b.normal_()
    A, B = delta.corner(torch.device("cpu"), torch.float64)
    W = torch.randn(2, 5, 4, dtype=torch.float64)
    want = torch.stack([W[e] + delta.b[e].diag() @ B @ delta.d[e].diag() @ A for e in range(2)])
    assert_close_by_norm(delta.adapted(W), want, 1e-14)


def tensors_of(model):
    """Address of the projections that each module computes with, on the model's device and in its dtype."""
    return {
        tuple(t.data_ptr() for t in delta.corner(delta.d.device, delta.d.dtype)) for delta in attached(model).values()
    }


def test_one_pair_of_projections_wherever_the_model_goes():
    model = perturbed(dl.adapt(tiny_llama(), dl.VeRA(r=8, targets="all-linear")))
    assert len(attached(model)) == 14
    want = logits(model)
    moves = {
        "as made": model,
        "copied": copy.deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
        "to and back": copy.deepcopy(model).to(torch.bfloat16).float(),
        "double": copy.deepcopy(model).double(),
    }
    for name, moved in moves.items():
        assert len(tensors_of(moved)) == 1, name
        assert len({id(delta.shared) for delta in attached(moved).values()}) == 1, name
    assert_close_by_norm(logits(moves["double"]), want, 1e-5)
    assert tensors_of(moves["copied"]) == tensors_of(model)
    assert next(iter(attached(moves["double"]).values())).factors().A.dtype is torch.float64


def test_nothing_but_the_vectors_is_kept_of_them():
    """The state that checkpoints hold, the pickle and the state dict know the projections by their seed."""
    model = dl.adapt(tiny_llama(), dl.VeRA(r=256, targets="all-linear"))
    logits(model)
    deltas = attached(model).values()
    assert sum(t.numel() for t in trained_state(model).values()) == sum(256 + delta.b.numel() for delta in deltas)
    projections = next(iter(deltas)).shared
    assert len(pickle.dumps(projections)) < 500
    assert not [name for name, _ in model.named_buffers() if ".delta." in name]


def test_adapters_by_name_each_with_its_projections(tmp_path):
    base = tiny_llama()
    model = perturbed(dl.adapt(base, dl.VeRA(r=8, targets=ALL), adapter="one"), 0.3)
    first = logits(model)
    perturbed(dl.adapt(model, dl.VeRA(r=4, targets=["k_proj", "up_proj"], projection_seed=9), adapter="two"), 0.3)
    second = logits(model)
    assert error_by_norm(first, second) > 0.01
    dl.save_adapter(dl.set_active(model, "one"), tmp_path / "one")
    for name, want in (("two", second), ("one", first)):
        assert torch.equal(logits(dl.set_active(model, name)), want)
        assert len(tensors_of(model)) == 1
    dl.load_adapter(model, tmp_path / "one", adapter="three")
    assert torch.equal(logits(model), first)
    assert states_equal(dl.unload(model), tiny_llama())


@pytest.fixture
def from_another_torch(tmp_path):
    """A file of peft's whose projections are not what the seed gives here, and the model that it came from."""
    theirs = with_peft(CONFIGS["corners"])
    layer = next(m for m in theirs.modules() if isinstance(m, peft.tuners.vera.VeraLayer))
    for shared in (layer.vera_A["default"], layer.vera_B["default"]):
        shared.copy_(torch.randn_like(shared))
    theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", theirs


def test_projections_that_the_seed_does_not_give(from_another_torch, tmp_path):
    folder, theirs = from_another_torch
    ours = dl.load_adapter(tiny_llama(), folder)
    agree(ours, theirs, tiny_llama())
    assert len(tensors_of(ours)) == 1
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(logits(twin), logits(ours))
        assert len(tensors_of(twin)) == 1
    dl.save_adapter(ours, tmp_path / "again")
    assert torch.equal(logits(dl.load_adapter(tiny_llama(), tmp_path / "again")), logits(ours))
    agree(ours, peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "again").eval(), tiny_llama())


def test_a_file_that_peft_cannot_read_keeps_them_too(from_another_torch, tmp_path):
    """With an entry frozen the adapter is saved in the own format: its projections are in it."""
    ours = dl.load_adapter(tiny_llama(), from_another_torch[0])
    for delta in attached(ours).values():
        delta.keep = torch.rand(delta.out, delta.in_) < 0.5
    dl.save_adapter(ours, tmp_path / "own")
    assert json.loads((tmp_path / "own" / "adapter_config.json").read_text())["peft_type"] == "DELTALAB"
    assert torch.equal(logits(dl.load_adapter(tiny_llama(), tmp_path / "own")), logits(ours))


def test_a_file_with_projections_that_its_config_denies(from_another_torch):
    """peft would ignore them with a warning, and compute with others."""
    folder, _ = from_another_torch
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"save_projection": False}))
    with pytest.raises(dl.UserError, match="2 not expected, the first 'base_model.vera_A'"):
        dl.load_adapter(tiny_llama(), folder)


def test_two_groups_have_two_pairs(tmp_path):
    """peft's file has room for one pair: two groups are saved in the own format."""
    specs = [dl.VeRA(r=8, targets=["q_proj"]), dl.VeRA(r=8, targets=["gate_proj"])]
    model = perturbed(dl.adapt(tiny_llama(), specs), 0.3)
    assert len({id(delta.shared) for delta in attached(model).values()}) == 2
    dl.save_adapter(model, tmp_path / "two")
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["peft_type"] == "DELTALAB"
    assert torch.equal(logits(dl.load_adapter(tiny_llama(), tmp_path / "two")), logits(model))


def test_files_that_do_not_fit(tmp_path):
    dl.save_adapter(dl.adapt(tiny_llama(), dl.VeRA(r=8, targets=ALL)), tmp_path)
    whole = load_file(tmp_path / "adapter_model.safetensors")
    for change, match in (
        ({"base_model.vera_A": None}, "1 missing, the first 'base_model.vera_A'"),
        ({"base_model.vera_B": torch.zeros(40, 8)}, r"'base_model.vera_B' has shape \(40, 8\), expected \(48, 8\)"),
        ({"base_model.vera_C": torch.zeros(1)}, "1 not expected, the first 'base_model.vera_C'"),
    ):
        changed = {key: tensor for key, tensor in {**whole, **change}.items() if tensor is not None}
        save_file(changed, tmp_path / "adapter_model.safetensors")
        model = tiny_llama()
        with pytest.raises(dl.UserError, match=match):
            dl.load_adapter(model, tmp_path)
        assert states_equal(model, tiny_llama())


def test_the_state_of_one_model_sets_another():
    one = perturbed(dl.adapt(tiny_llama(), dl.VeRA(r=8, targets=ALL)))
    other = dl.adapt(tiny_llama(), dl.VeRA(r=8, targets=ALL))
    load_trained_state(other, {key: value.clone() for key, value in trained_state(one).items()})
    assert torch.equal(logits(one), logits(other))


def test_dropout_on_experts_is_refused():
    with pytest.raises(dl.UserError, match=r"dropout=0.1 cannot act on 'model.layers.0.mlp.experts"):
        dl.adapt(model_of("mixtral"), dl.VeRA(r=8, targets=["down_proj"], dropout=0.1))
