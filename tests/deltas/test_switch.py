"""Several named adapters in one model: one acts, the others wait, and every change between them is bitwise."""

import copy
import pickle

import pytest
import torch

import deltalab as dl
from deltalab.deltas import methods
from deltalab.deltas.adapt import adaptation, adapters, attached, param_groups
from deltalab.deltas.base import WeightDelta
from deltalab.deltas.freeze import freeze
from deltalab.deltas.peft_format import trained_state, write_adapter
from tests.deltas.perturb import perturbed, states_equal
from tests.deltas.test_freeze import masks_of
from tests.families import logits, loss_of, model_of
from tests.helpers import assert_close_by_norm

FAMILY = "llama-bias"  # tied, with biases
SPECS = {
    "de": dl.LoRA(r=2),
    "fr": [dl.LoRA(r=4, targets="mlp", bias="lora_only"), dl.Train(["q_proj"])],
    "it": dl.Train(["embed_tokens", "norm"]),
}
SPECS |= {name: spec(targets="attention") for name, spec in methods().items() if name not in ("LoRA", "QALoRA")}


def base():
    return model_of(FAMILY)


def alone(name):
    """A model with this adapter and no other."""
    return perturbed(dl.adapt(base(), SPECS[name]), seed=list(SPECS).index(name))


def together():
    """A model with all of them, the last one active."""
    model = base()
    for seed, (name, spec) in enumerate(SPECS.items()):
        perturbed(dl.adapt(model, spec, adapter=name), seed=seed)
    return model


@pytest.fixture(scope="module")
def want():
    return {name: logits(alone(name)) for name in SPECS}


def test_each_is_what_it_would_be_alone(want):
    model = together()
    assert adapters(model)[0] == list(SPECS)[-1]
    assert sorted(adapters(model)) == sorted(SPECS)
    for name in [*SPECS, *reversed(SPECS)]:
        assert dl.set_active(model, name) is model
        assert adapters(model)[0] == name
        assert torch.equal(logits(model), want[name])
        one = alone(name)
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in one.named_parameters()]
        assert states_equal(model, one)


def test_the_active_one_again_changes_nothing(want):
    model = together()
    dl.set_active(model, "fr")
    deltas = {path: id(delta) for path, delta in attached(model).items()}
    dl.set_active(model, "fr")
    assert {path: id(delta) for path, delta in attached(model).items()} == deltas
    assert torch.equal(logits(model), want["fr"])


def test_a_tie_holds_through_every_change(want):
    model = together()
    for name in ("it", "de", "it"):
        dl.set_active(model, name)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), want["it"])


def test_unload_takes_all_of_them():
    model = together()
    loss_of(model).backward()
    assert states_equal(dl.unload(model), base())
    assert adapters(model) == []
    assert all(p.grad is None for p in model.parameters())


def test_disabled_is_the_base_for_each(want):
    model = together()
    for name in SPECS:
        dl.set_active(model, name)
        with dl.disabled(model):
            assert torch.equal(logits(model), logits(base()))
        assert torch.equal(logits(model), want[name])


def test_merged_holds_the_active_one_alone(want):
    model = together()
    for name in SPECS:
        dl.set_active(model, name)
        if not all(isinstance(delta, WeightDelta) for delta in attached(model).values()):
            with pytest.raises(dl.UserError, match="depends on the input"):
                dl.merged(model)
            continue
        plain = dl.merged(model)
        assert_close_by_norm(logits(plain), want[name], 1e-5)
        assert adapters(plain) == []
        assert list(plain.state_dict()) == list(base().state_dict())
    assert sorted(adapters(model)) == sorted(SPECS)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(copied, want):
    model = together()
    twin = copied(model)
    for name in SPECS:
        perturbed(dl.set_active(twin, name), seed=50)
        assert not torch.equal(logits(twin), want[name])
    for name in SPECS:
        assert torch.equal(logits(dl.set_active(model, name)), want[name])
    assert states_equal(dl.unload(twin), base())


def test_the_active_one_is_saved(want, tmp_path):
    model = together()
    for name in SPECS:
        write_adapter(dl.set_active(model, name), tmp_path / name)
    with pytest.raises(dl.UserError, match="schedule"):
        dl.save_adapter(dl.set_active(model, "AdaLoRA"), tmp_path / "out")
    again = base()
    for name in SPECS:
        dl.load_adapter(again, tmp_path / name, adapter=name)
        assert torch.equal(logits(again), want[name])
    for name in SPECS:
        assert torch.equal(logits(dl.set_active(again, name)), want[name])
    assert states_equal(dl.unload(again), base())


def test_save_pretrained_writes_the_base_whichever_is_active(tmp_path):
    model = together()
    for name in ("de", "fr"):
        dl.set_active(model, name).save_pretrained(tmp_path / name)
        keys = {key for key, _ in type(model).from_pretrained(tmp_path / name).named_parameters()}
        assert keys == {key for key, _ in base().named_parameters()}


def test_an_optimizer_over_a_waiting_adapter_trains_it_when_it_is_back(want):
    model = together()
    dl.set_active(model, "de")
    optimizer = torch.optim.SGD(param_groups(model, 0.1))
    dl.set_active(model, "fr")
    loss_of(model).backward()
    optimizer.step()  # nothing of the waiting one has a gradient
    assert torch.equal(logits(model), want["fr"])
    assert torch.equal(logits(dl.set_active(model, "de")), want["de"])
    loss_of(model).backward()
    optimizer.step()
    assert not torch.equal(logits(model), want["de"])
    assert torch.equal(logits(dl.set_active(model, "fr")), want["fr"])


def test_an_optimizer_over_own_weights_does_not_step_the_base(want):
    model = together()
    dl.set_active(model, "it")
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), weight_decay=0.1)
    loss_of(model).backward()
    dl.set_active(model, "de")
    optimizer.step()
    assert torch.equal(logits(model), want["de"])
    assert states_equal(dl.unload(model), base())


def test_training_one_leaves_the_others_bitwise(want):
    model = together()
    dl.set_active(model, "fr")
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
    for seed in range(2):
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model)
    assert not torch.equal(after, want["fr"])
    for name in SPECS:
        if name != "fr":
            assert torch.equal(logits(dl.set_active(model, name)), want[name])
    assert torch.equal(logits(dl.set_active(model, "fr")), after)


def test_frozen_entries_wait_with_their_adapter():
    model = dl.adapt(base(), SPECS["de"], adapter="de")
    freeze(model, masks_of(model), "delta_mask")
    perturbed(model)
    there = logits(model)
    dl.adapt(model, SPECS["fr"], adapter="fr")
    assert all(delta.keep is None for delta in attached(model).values())
    assert torch.equal(logits(dl.set_active(model, "de")), there)
    assert all(delta.keep is not None for delta in attached(model).values())


def test_what_trains_is_what_the_active_one_says():
    model = together()
    for name in SPECS:
        dl.set_active(model, name)
        assert dl.trainable(model).rows == dl.trainable(alone(name)).rows
        assert {n for n, p in model.named_parameters() if p.requires_grad} <= set(trained_state(model))


def test_it_moves_to_another_dtype_and_back_with_the_model():
    model = together()
    dl.set_active(model, "de")
    model.double()
    dl.set_active(model, "fr")
    assert logits(model).dtype is torch.float64


def test_an_unknown_name_leaves_everything(want):
    model = together()
    dl.set_active(model, "de")
    with pytest.raises(dl.UserError, match=r"(?s)no adapter 'df'.*found: adapters: de.*nearest: .*load_adapter"):
        dl.set_active(model, "df")
    assert adapters(model)[0] == "de"
    assert torch.equal(logits(model), want["de"])
    with pytest.raises(dl.UserError, match="found: adapters: none"):
        dl.set_active(base(), "de")


def test_a_name_that_is_taken_is_refused(want, tmp_path):
    model = together()
    dl.save_adapter(model, tmp_path / "out")
    for name in ("de", adapters(model)[0]):
        with pytest.raises(dl.UserError, match="(?s)adapted already.*another adapter"):
            dl.adapt(model, dl.LoRA(), adapter=name)
        with pytest.raises(dl.UserError, match="(?s)adapted already.*another adapter"):
            dl.load_adapter(model, tmp_path / "out", adapter=name)
    assert torch.equal(logits(model), want[adapters(model)[0]])


FAULTS = {
    "no such target": lambda model, folder: dl.adapt(model, dl.LoRA(targets="q_prj"), adapter="new"),
    "two at one place": lambda model, folder: dl.adapt(model, [dl.LoRA(), dl.LoRA(r=2)], adapter="new"),
    "a start without data": lambda model, folder: dl.adapt(model, dl.LoRA(init="eva"), adapter="new"),
    "no folder": lambda model, folder: dl.load_adapter(model, folder / "none", adapter="new"),
    "a cut file": lambda model, folder: dl.load_adapter(model, folder / "cut", adapter="new"),
    "another model's": lambda model, folder: dl.load_adapter(model, folder / "other", adapter="new"),
    "another model's, own format": lambda model, folder: dl.load_adapter(model, folder / "own", adapter="new"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("active", ["de", "fr", "it"])
def test_a_failure_leaves_the_active_one_as_it_was(fault, active, want, tmp_path):
    elsewhere = {"other": dl.LoRA(targets=["dense"]), "own": [dl.LoRA(targets=["dense"]), dl.Train(["dense"])]}
    for name, spec in elsewhere.items():
        dl.save_adapter(dl.adapt(model_of("gpt_neox"), spec), tmp_path / name)
    dl.save_adapter(dl.adapt(base(), dl.LoRA(r=2)), tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    model = together()
    dl.set_active(model, active)
    before = copy.deepcopy(model)
    with pytest.raises(dl.UserError):
        fault(model, tmp_path)
    assert adapters(model) == adapters(before)
    assert states_equal(model, before)
    assert torch.equal(logits(model), want[active])
    for name in SPECS:
        assert torch.equal(logits(dl.set_active(model, name)), want[name])


@pytest.mark.parametrize(
    "spec", [dl.LoRA(r=2), [dl.LoRA(r=2), dl.Train("v_proj")]], ids=["peft's format", "own format"]
)
def test_an_interrupted_load_brings_the_active_one_back(spec, want, tmp_path, monkeypatch):
    dl.save_adapter(dl.adapt(base(), spec), tmp_path)
    model = together()
    dl.set_active(model, "it")
    before = copy.deepcopy(model)
    for place in ("base.Delta.from_peft", "own_format.load_trained_state"):
        monkeypatch.setattr(f"deltalab.deltas.{place}", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dl.load_adapter(model, tmp_path, adapter="new")
    assert adapters(model) == adapters(before)
    assert states_equal(model, before)
    assert torch.equal(logits(model), want["it"])


def test_an_interrupted_start_brings_the_active_one_back(want, monkeypatch):
    model = together()
    dl.set_active(model, "fr")
    calls = iter(range(4))
    monkeypatch.setattr("deltalab.deltas.lora.LoRADelta.init", lambda *_: 1 / (3 - next(calls)))
    with pytest.raises(ZeroDivisionError):
        dl.adapt(model, [dl.LoRA(r=3), dl.Train("norms")], adapter="new")
    assert adapters(model)[0] == "fr"
    assert "new" not in adapters(model)
    assert torch.equal(logits(model), want["fr"])
    assert adaptation(model).plan
