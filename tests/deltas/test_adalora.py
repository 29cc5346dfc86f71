"""AdaLoRA against peft, step by step and file by file; its arithmetic, and what is refused."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.budget import importance
from deltalab.deltas.peft_format import write_adapter
from tests.deltas.perturb import perturbed
from tests.helpers import assert_close_by_norm, tiny_gpt2, tiny_llama, tokens

STEPS = 40
MODELS = {"llama": (tiny_llama, ["q_proj", "v_proj", "down_proj"]), "gpt2": (tiny_gpt2, ["c_attn", "mlp.c_proj"])}
family = pytest.mark.parametrize("family", MODELS)
when = pytest.mark.parametrize("done", [True, False], ids=["pruned", "before"])


def spec(family="llama", **fields):
    targets = [f"*{name}" for name in MODELS[family][1]]
    return dl.AdaLoRA(**{"init_r": 6, "target_r": 2, "alpha": 24.0, "tinit": 5, "tfinal": 8, "delta_t": 3, "total_step": STEPS, "targets": targets, **fields})  # fmt: skip


def theirs(family="llama", **fields):
    config = peft.AdaLoraConfig(**{"init_r": 6, "target_r": 2, "lora_alpha": 24, "tinit": 5, "tfinal": 8, "deltaT": 3, "total_step": STEPS, "target_modules": MODELS[family][1], "task_type": "CAUSAL_LM", **fields})  # fmt: skip
    return peft.get_peft_model(MODELS[family][0](), config)


def ours(family="llama", **fields):
    return dl.adapt(MODELS[family][0](), spec(family, **fields))


def pairs(model, other):
    """(path, part, our parameter, peft's name, peft's parameter) of every A, B and E."""
    named = dict(other.named_parameters())
    return [
        (path, part, getattr(delta, part), name := f"base_model.model.{path}.lora_{part}.default", named[name])
        for path, delta in attached(model).items()
        for part in "ABE"
    ]


def same_start(model, other):
    with torch.no_grad():
        for _, _, our, _, their in pairs(model, other):
            their.copy_(our)
    return model, other


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)


def one_step(model, optimizer, seed, **told):
    """As in any loop: loss and penalty, optimizer, schedule."""
    ids = tokens(seed=seed)
    extra = dl.penalty(model)
    (model(input_ids=ids, labels=ids).loss + (0 if extra is None else extra)).backward()
    optimizer.step()
    dl.step(model, **told)
    optimizer.zero_grad()


def without_schedule(model):
    """One step of a loop that does not know of it."""
    optimizer, ids = optimizer_of(model), tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return model


def trained(model, steps=STEPS):
    optimizer = optimizer_of(model)
    for t in range(1, steps + 1):
        one_step(model, optimizer, t)
    return model


def their_step(other, optimizer, t):
    ids = tokens(seed=t)
    other(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    other.base_model.update_and_allocate(t)
    optimizer.zero_grad()


def both_trained(family="llama"):
    model, other = same_start(ours(family), theirs(family))
    optimizer, their_optimizer = optimizer_of(model), optimizer_of(other)
    for t in range(1, STEPS + 1):
        one_step(model, optimizer, t)
        their_step(other, their_optimizer, t)
        yield t, model, other


def tensors_in(folder):
    return load_file(folder / "adapter_model.safetensors")


def of_peft(name):
    """Their allocator knows a parameter by its name below the wrapper."""
    return name.removeprefix("base_model.model.")


@family
def test_a_whole_run_is_that_of_peft(family):
    """Same start and data: the same importance, budget, pruned entries and weights after each of forty steps."""
    with_pattern, budgets = 0, set()
    for t, model, other in both_trained(family):
        allocator, pattern = other.base_model.rankallocator, other.peft_config["default"].rank_pattern
        with_pattern += pattern is not None
        for path, part, our, name, their in pairs(model, other):
            delta = attached(model)[path]
            assert_close_by_norm(our, their, 1e-5)
            if t < STEPS - 8:
                averages = allocator.exp_avg_ipt[of_peft(name)], allocator.exp_avg_unc[of_peft(name)]
                assert_close_by_norm(delta.get_buffer(f"sensitivity_{part}"), averages[0], 1e-5)
                assert_close_by_norm(delta.get_buffer(f"variation_{part}"), averages[1], 1e-5)
            if part == "E" and pattern:
                assert delta.mask.tolist() == pattern[of_peft(name)]
        budgets.add(sum(int(delta.mask.sum()) for delta in attached(model).values()))
    assert min(budgets) == 2 * len(attached(model))
    assert len(budgets) > 5
    assert with_pattern > 20
    assert len({int((delta.E != 0).sum()) for delta in attached(model).values()}) > 1, "the budget did not choose"


@family
@when
def test_peft_loads_what_we_save(family, done, tmp_path):
    model = trained(ours(family), STEPS if done else 7)
    write_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(MODELS[family][0](), tmp_path)
    assert_close_by_norm(other(tokens()).logits, model(tokens()).logits, 1e-5)
    shapes = {tuple(p.shape) for name, p in other.named_parameters() if "lora_E" in name}
    assert (shapes == {(6, 1)}) != done


@family
@when
def test_we_load_what_peft_saves(family, done, tmp_path):
    _, other = same_start(perturbed(ours(family)), theirs(family))
    optimizer = optimizer_of(other)
    for t in range(1, (STEPS if done else 3) + 1):
        their_step(other, optimizer, t)
    other.save_pretrained(tmp_path / "theirs")
    model = dl.load_adapter(MODELS[family][0](), tmp_path / "theirs")
    assert_close_by_norm(model(tokens()).logits, other(tokens()).logits, 1e-5)
    dl.save_adapter(model, tmp_path / "ours")  # loaded and not trained: no schedule has been missed
    first, second = (tensors_in(tmp_path / name) for name in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    again = peft.PeftModel.from_pretrained(MODELS[family][0](), tmp_path / "ours")
    assert_close_by_norm(again(tokens()).logits, other(tokens()).logits, 1e-5)


def test_config_and_shapes_are_written_as_peft_writes_them(tmp_path):
    *_, (_, model, other) = both_trained()
    dl.save_adapter(model, tmp_path / "ours")
    other.save_pretrained(tmp_path / "theirs")
    mine, their = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    keys = ["rank_pattern", "init_r", "target_r", "lora_alpha", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"]  # fmt: skip
    assert {key: mine[key] for key in keys} == {key: their[key] for key in keys}
    first, second = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    assert {key: t.shape for key, t in first.items()} == {key: t.shape for key, t in second.items()}


def test_a_module_may_lose_every_rank(tmp_path):
    model = perturbed(ours(init_r=2, target_r=1, tinit=0, tfinal=0, total_step=1, delta_t=1))
    deltas = list(attached(model).values())
    for i, delta in enumerate(deltas):
        for part in "AEB":
            delta.get_buffer(f"sensitivity_{part}").fill_(float(i >= len(deltas) // 2) + 0.01 * i)
            delta.get_buffer(f"variation_{part}").fill_(1.0)
    dl.step(model)
    dl.save_adapter(model, tmp_path)
    ranks = [tensor.shape[0] for key, tensor in tensors_in(tmp_path).items() if key.endswith("lora_E")]
    assert sorted(ranks) == [0, 0, 0, 2, 2, 2]
    for other in (dl.load_adapter(tiny_llama(), tmp_path), peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)):
        assert_close_by_norm(other(tokens()).logits, model(tokens()).logits, 1e-5)


def test_a_pruned_adapter_trains_on_without_a_schedule(tmp_path):
    dl.save_adapter(trained(ours()), tmp_path / "first")
    model = without_schedule(dl.load_adapter(tiny_llama(), tmp_path / "first"))
    dl.save_adapter(model, tmp_path / "second")
    again = dl.load_adapter(tiny_llama(), tmp_path / "second")
    assert_close_by_norm(again(tokens()).logits, model(tokens()).logits, 1e-6)
    trained(model)
    assert all(bool(delta.mask.all()) for delta in attached(model).values()), "there was nothing left to prune"


def test_the_penalty_is_that_of_peft():
    model, other = same_start(perturbed(ours()), theirs())
    ids = tokens()
    with_it = other(input_ids=ids, labels=ids).loss
    plain = other.base_model.model(input_ids=ids, labels=ids).loss
    assert_close_by_norm(dl.penalty(model), with_it - plain, 1e-5)
    assert dl.penalty(ours(orth_reg_weight=0.0)) is None


def test_the_penalty_and_its_gradient_in_fp64():
    model = perturbed(ours()).double()
    exact = dl.penalty(model)
    frames = [f for d in attached(model).values() for f in (d.A @ d.A.T, d.B.T @ d.B)]
    want = 0.5 * sum(((f - torch.eye(6, dtype=f.dtype)) ** 2).sum().sqrt() for f in frames) / len(frames)
    assert_close_by_norm(exact, want, 1e-12)
    parts = [getattr(d, part) for d in attached(model).values() for part in "AB"]
    for part, gradient in zip(parts, torch.autograd.grad(exact, parts), strict=True):
        small = 1e-5 * torch.randn_like(part)
        with torch.no_grad():
            part += small
            up = dl.penalty(model)
            part -= 2 * small
            down = dl.penalty(model)
            part += small
        assert float((up - down) / 2) == pytest.approx(float((gradient * small).sum()), rel=1e-6, abs=1e-14)


def test_importance_against_loops():
    delta = attached(ours())["model.layers.0.self_attn.q_proj"].double()
    for name, buffer in delta.named_buffers():
        if name.startswith(("sensitivity", "variation")):
            buffer.copy_(torch.rand(buffer.shape))
    score = {p: delta.get_buffer(f"sensitivity_{p}") * delta.get_buffer(f"variation_{p}") for p in "AEB"}
    for i, got in enumerate(importance(delta)):
        row, column = score["A"][i].tolist(), score["B"][:, i].tolist()
        want = float(score["E"][i, 0]) + sum(row) / len(row) + sum(column) / len(column)
        assert float(got) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("fields", "said"), [
    ({"target_r": 7}, "target_r 7 is more than init_r 6"),
    ({"tinit": 20, "tfinal": 20}, "leave none of 40 steps"),
    ({"beta1": 1.0}, "less than 1"),
    ({"tinit": -1}, "tinit"),
])  # fmt: skip
def test_faults_of_the_spec(fields, said):
    with pytest.raises(dl.UserError, match=said):
        spec(**fields)


def test_a_rank_for_a_module_that_is_not_there():
    with pytest.raises(dl.UserError, match="rank_pattern names 'model.layers.9.self_attn.q_proj'"):
        ours(rank_pattern={"model.layers.9.self_attn.q_proj": 1})


def test_a_pattern_that_does_not_fit_is_refused(tmp_path):
    dl.save_adapter(trained(ours()), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    key = next(iter(config["rank_pattern"]))
    wrong = {"none of its modules on this model.*\n.*the model that it was": {"model.layers.7.lora_E": [True] * 6},
             "rank_pattern for": {**config["rank_pattern"], key: [True]}}  # fmt: skip
    for said, pattern in wrong.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": pattern}))
        with pytest.raises(dl.UserError, match=said):
            dl.load_adapter(tiny_llama(), tmp_path)
