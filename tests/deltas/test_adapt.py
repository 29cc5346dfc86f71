"""Putting deltas on and off, composition, and what is counted, merged and restored."""

import copy

import pytest
import torch
from torch import nn

import deltalab as dl
from deltalab.deltas.adapt import attached, base_weight, delta_entries, is_adapted, merged_weight, param_groups
from deltalab.deltas.peft_format import load_trained_state, trained_state
from tests.deltas.perturb import perturbed, states_equal
from tests.helpers import assert_close_by_norm, tiny_gpt2, tiny_llama, tokens

Q = "model.layers.0.self_attn.q_proj"


def trained(model, steps=3, **options):
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2), **options)
    for step in range(steps):
        model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_failed_adapt_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_llama()
    for spec in (
        dl.LoRA(targets="q_prj"),
        [dl.LoRA(), dl.Train("nrms")],
        [dl.LoRA(), dl.LoRA(targets="attention")],
        [],
        "LoRA",
        [dl.LoRA(), 3],
    ):
        with pytest.raises(dl.UserError):
            dl.adapt(model, spec)
        assert states_equal(model, tiny_llama())
    calls = iter(range(3))
    monkeypatch.setattr("deltalab.deltas.lora.LoRADelta.init", lambda *_: 1 / (2 - next(calls)))
    with pytest.raises(ZeroDivisionError):
        dl.adapt(model, [dl.LoRA(), dl.Train("norms")])
    assert states_equal(model, tiny_llama())
    assert not is_adapted(model)


def test_adapting_twice_says_what_to_do():
    model = dl.adapt(tiny_llama(), dl.LoRA())
    with pytest.raises(dl.UserError, match="(?s)adapted already.*unload"):
        dl.adapt(model, dl.Train("norms"))


def test_two_deltas_for_one_linear_are_refused_by_name():
    with pytest.raises(dl.UserError, match=rf"'{Q}'"):
        dl.adapt(tiny_llama(), [dl.LoRA(targets="attention"), dl.LoRA(targets=["q_proj"])])


def test_composition_trains_both_and_merges():
    model = trained(dl.adapt(tiny_llama(), [dl.LoRA(r=2, targets="attention"), dl.Train("norms")]))
    base = tiny_llama()
    changed = {
        n for n, p in dl.merged(model).named_parameters() if not torch.equal(p, dict(base.named_parameters())[n])
    }
    norms = {n for n, _ in base.named_parameters() if "norm" in n}
    assert changed == {f"{path}.weight" for path in attached(model)} | norms
    assert_close_by_norm(dl.merged(model)(tokens()).logits, model(tokens()).logits, 1e-5)
    with dl.disabled(model):
        assert torch.equal(model(tokens()).logits, base(tokens()).logits)
    assert states_equal(dl.unload(model), base)


def test_the_merged_model_does_not_follow_the_adapted_one():
    model = trained(dl.adapt(tiny_llama(), [dl.LoRA(r=2), dl.Train(["mlp"])]))
    plain = dl.merged(model)
    want = plain(tokens()).logits
    trained(model)
    dl.unload(model)
    assert torch.equal(plain(tokens()).logits, want)
    assert all(p.requires_grad for p in plain.parameters()), "trainable as the model that was loaded"
    assert not is_adapted(plain)


@pytest.mark.parametrize("what", ["full", "norms", "last-1", ["lm_head", "layers.0.mlp.*"], "re:.*q_proj.weight"])
def test_train(what):
    model, base = dl.adapt(tiny_llama(), dl.Train(what)), tiny_llama()
    chosen = {n for n, p in model.named_parameters() if p.requires_grad}
    assert chosen == set(dl.Train(what).parameters(base))
    assert 0 < len(chosen) <= len(list(base.parameters()))
    before = dict(base.named_parameters())
    trained(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in chosen), name
    with dl.disabled(model):
        assert torch.equal(model(tokens()).logits, base(tokens()).logits)
    other = dl.adapt(tiny_llama(), dl.Train(what))
    load_trained_state(other, trained_state(model))
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)
    assert states_equal(dl.unload(model), base)


def test_train_bitfit():
    with pytest.raises(dl.UserError, match="no biases"):
        dl.adapt(tiny_llama(), dl.Train("bitfit"))
    model = dl.adapt(tiny_llama(bias=True), dl.Train("bitfit"))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 14
    assert all(n.endswith(".bias") for n in names)
    assert "ln_f.bias" in " ".join(dl.Train("bitfit").parameters(tiny_gpt2()))


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("nrms", "norms"),
        ("last-9", "2 blocks"),
        ("last-0", "2 blocks"),
        ("last-x", "2 blocks"),
        ([], "no parameters"),
        (["norms", "zzz"], "zzz"),
    ],
)
def test_train_what_is_not_there(what, match):
    with pytest.raises(dl.UserError, match=match):
        dl.adapt(tiny_llama(), dl.Train(what))


def test_train_without_norms():
    with pytest.raises(dl.UserError, match="no normalisation"):
        dl.adapt(nn.ModuleList([nn.Linear(2, 2)]), dl.Train("norms"))


def test_full_tuning_of_a_tied_model_counts_and_restores_the_weight_once():
    model = trained(dl.adapt(tiny_llama(tied=True), dl.Train("full")))
    assert dl.trainable(model).percent == 100
    moved = dl.delta_weight(model, "lm_head")
    assert moved.abs().max() > 0
    assert torch.equal(moved, dl.delta_weight(model, "model.embed_tokens").T)
    plain = dl.merged(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert states_equal(dl.unload(model), tiny_llama(tied=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merging_keeps_tied_embeddings_tied(tmp_path):
    model = perturbed(dl.adapt(tiny_llama(tied=True), dl.LoRA(r=2, targets="all-linear")))
    plain = dl.merged(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert_close_by_norm(again(tokens()).logits, model(tokens()).logits, 1e-5)


def test_delta_of_full_tuning_is_the_difference():
    model, base = trained(dl.adapt(tiny_llama(), dl.Train("full"))), tiny_llama()
    W, W0 = model.get_submodule(Q).weight, base.get_submodule(Q).weight
    assert torch.equal(dl.delta_weight(model, Q), W.detach() - W0)
    assert torch.equal(merged_weight(model, Q), W)
    assert torch.equal(base_weight(model, Q), W0)
    index = torch.tensor([0, 5, 31 * 32 + 31])
    assert torch.equal(delta_entries(model, Q, index), (W.detach() - W0).flatten()[index])
    assert torch.equal(dl.delta_weight(model, "model.norm"), model.model.norm.weight.detach() - base.model.norm.weight)


def test_delta_and_training_of_one_weight_add_up():
    model, base = trained(dl.adapt(tiny_llama(), [dl.LoRA(r=2), dl.Train([Q])])), tiny_llama()
    want = merged_weight(model, Q) - base.get_submodule(Q).weight
    assert_close_by_norm(dl.delta_weight(model, Q), want, 1e-5)
    assert_close_by_norm(delta_entries(model, Q, torch.arange(100)), want.flatten()[:100], 1e-5)
    assert not torch.equal(model.get_submodule(Q).weight, base.get_submodule(Q).weight)


def test_weights_of_modules_without_a_delta():
    model = dl.adapt(tiny_llama(dtype=torch.bfloat16), dl.LoRA(r=2, targets="mlp"))
    assert torch.equal(dl.delta_weight(model, Q), torch.zeros(32, 32))
    assert torch.equal(delta_entries(model, Q, torch.arange(7)), torch.zeros(7))
    assert merged_weight(model, Q).dtype is torch.float32
    assert base_weight(model, Q).dtype is torch.bfloat16
    assert torch.equal(dl.delta_weight(tiny_llama(), Q + ".weight"), torch.zeros(32, 32))


def test_merged_weights_are_not_rounded_to_16_bits():
    model = perturbed(dl.adapt(tiny_llama(dtype=torch.bfloat16), dl.LoRA(r=2)), size=1e-3)
    delta = attached(model)[Q]
    want = model.get_submodule(Q).weight.double() + delta.s * delta.B.double() @ delta.A.double()
    assert_close_by_norm(merged_weight(model, Q), want, 1e-6)
    assert merged_weight(dl.adapt(tiny_llama(dtype=torch.float64), dl.LoRA()), Q).dtype is torch.float64


def test_gpt2_weights_are_out_by_in():
    model = perturbed(dl.adapt(tiny_gpt2(), dl.LoRA(r=2, targets=["c_attn"])))
    path = "transformer.h.0.attn.c_attn"
    assert dl.delta_weight(model, path).shape == (96, 32)
    assert torch.equal(base_weight(model, path), tiny_gpt2().get_submodule(path).weight.T)
    assert_close_by_norm(
        delta_entries(model, path, torch.tensor([95 * 32 + 1])), dl.delta_weight(model, path)[95, 1:2], 1e-6
    )
    full = trained(dl.adapt(tiny_gpt2(), dl.Train("full")))
    assert torch.equal(
        dl.delta_weight(full, path),
        (full.get_submodule(path).weight.detach() - tiny_gpt2().get_submodule(path).weight).T,
    )


def test_unknown_paths_and_entries():
    model = dl.adapt(tiny_llama(), dl.LoRA())
    with pytest.raises(dl.UserError, match=r"nearest: model\.layers\.0\.self_attn\.q_proj"):
        dl.delta_weight(model, "model.layers.0.self_attn.q_prj")
    for index in (-1, 32 * 32):
        with pytest.raises(dl.UserError, match="entry"):
            delta_entries(model, Q, torch.tensor([index]))


def test_trainable_prints_as_a_table():
    model = dl.adapt(tiny_llama(), [dl.LoRA(r=2, targets="q,v"), dl.Train("norms")])
    shown = dl.trainable(model)
    base = sum(p.numel() for p in tiny_llama().parameters())
    lora, norms = 2 * 2 * (32 + 32) + 2 * 2 * (32 + 16), 5 * 32
    assert (shown.count, shown.total) == (lora + norms, base)
    assert shown.percent == pytest.approx(100 * (lora + norms) / base)
    assert shown.factor == pytest.approx(base / (lora + norms))
    assert shown.rows[0] == ("LoRA", "q_proj", 2, 2 * 2 * 64)
    text = str(shown)
    assert all(part in text for part in ("LoRA", "q_proj", "own", "norm", f"{shown.count:,} of {base:,}"))
    nothing = dl.trainable(tiny_llama().requires_grad_(False))
    assert (nothing.count, nothing.factor) == (0, float("inf"))
    assert "trains 0 of" in str(nothing)


def test_trainability_comes_back():
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    reference = copy.deepcopy(model)
    assert states_equal(dl.unload(dl.adapt(model, [dl.LoRA(), dl.Train("norms")])), reference)
    assert not dl.merged(dl.adapt(model, dl.LoRA())).lm_head.weight.requires_grad


def test_a_plain_model_is_its_own_base():
    model = tiny_llama()
    with dl.disabled(model):
        pass
    assert states_equal(dl.unload(model), tiny_llama())
    assert states_equal(dl.merged(model), tiny_llama())


def test_nested_disabled_and_mode():
    model = perturbed(dl.adapt(tiny_llama().train(), dl.LoRA(r=2)))
    assert all(delta.training for delta in attached(model).values())
    want = model.eval()(tokens()).logits
    with dl.disabled(model), dl.disabled(model):
        pass
    assert torch.equal(model(tokens()).logits, want)


def test_what_cannot_merge_says_so():
    from deltalab.deltas.base import Delta

    class Gate(Delta):
        def __init__(self):
            super().__init__()
            self.g = nn.Parameter(torch.zeros(1))

        def init(self, generator):
            nn.init.zeros_(self.g)

        def forward(self, x, base):
            return base(x) * (1 + self.g * x.mean(-1, keepdim=True))

    class GateSpec(dl.LoRA):
        def build(self, site):
            return Gate()

    model = dl.adapt(tiny_llama(), GateSpec())
    assert torch.equal(model(tokens()).logits, tiny_llama()(tokens()).logits)
    for look in (dl.merged, lambda m: dl.delta_weight(m, Q), lambda m: merged_weight(m, Q)):
        with pytest.raises(dl.UserError, match="depends on the input"):
            look(model)
    trained(model)
    with dl.disabled(model):
        assert torch.equal(model(tokens()).logits, tiny_llama()(tokens()).logits)
