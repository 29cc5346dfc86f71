"""Every way of freezing, under full tuning and under a delta: what moves, what is held, and what the proof says of it."""

import peft
import pytest
import torch
from torch import nn

import deltalab as dl
from deltalab.deltas.adapt import attached, base_weight, merged_weight, param_groups
from deltalab.deltas.base import weight_of
from deltalab.deltas.freeze import VARIANTS, freeze
from deltalab.deltas.peft_format import trained_state
from tests.deltas.perturb import perturbed
from tests.deltas.test_freeze import masks_of, steps
from tests.helpers import assert_close_by_norm, tiny_gpt2, tiny_llama, tokens

WAYS = [("full", v) for v in VARIANTS if v != "delta_mask"] + [("lora", v) for v in VARIANTS if v != "exact"]
HOLD = {"exact", "delta_mask", "rewind"}
OPTIMIZERS = {
    "SGD": lambda groups, decay: torch.optim.SGD(groups, momentum=0.9, weight_decay=decay),
    "AdamW": lambda groups, decay: torch.optim.AdamW(groups, weight_decay=decay),
}


def start(kind, make=tiny_llama, dtype=torch.float32):
    spec = dl.Train("full") if kind == "full" else dl.LoRA(r=4, targets="all-linear")
    return dl.adapt(make().to(dtype), spec)


def optimizer_of(model, name="AdamW", *, decay=0.1, momentum=True):
    """With `momentum`, moments of three steps that moved nothing: the learning rate was 0."""
    optimizer = OPTIMIZERS[name](param_groups(model, 1e-2), decay)
    if momentum:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        steps(model, optimizer, 3)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return optimizer


def trained(kind, variant, name="AdamW", *, share=0.3, count=4, make=tiny_llama, dtype=torch.float32, **options):
    """(model, freezer, masks) after training with the variant, not finished; `variant` None trains without a freezer."""
    model = start(kind, make, dtype)
    masks = masks_of(model, share)
    optimizer = optimizer_of(model, name, **options)
    freezer = None if variant is None else freeze(model, masks, variant)
    if freezer is not None:
        freezer.install(optimizer)
    steps(model, optimizer, count)
    return model, freezer, masks


def largest_change(model, masks, make, dtype):
    """Brute force in fp64: the model's weights and s·B·A ⊙ keep, against a model that was never trained."""
    base, deltas, largest = make().to(dtype), attached(model), 0.0
    for path, mask in masks.items():
        change = weight_of(model.get_submodule(path)).double() - weight_of(base.get_submodule(path)).double()
        if path in deltas:
            delta = deltas[path]
            product = delta.s * delta.B.double() @ delta.A.double()
            change = change + (product if delta.keep is None else product * delta.keep)
        largest = max(largest, float(change[mask].detach().abs().max()))
    return largest


@pytest.mark.parametrize(
    ("make", "dtype", "name"),
    [
        (tiny_llama, torch.float32, "SGD"),
        (tiny_llama, torch.float32, "AdamW"),
        (tiny_llama, torch.bfloat16, "SGD"),
        (tiny_llama, torch.bfloat16, "AdamW"),
        (tiny_gpt2, torch.float32, "AdamW"),
    ],
)
@pytest.mark.parametrize(("kind", "variant"), WAYS)
@pytest.mark.parametrize("share", [0.01, 0.9])
def test_the_proof_is_true(kind, variant, share, make, dtype, name):
    """Weight decay and earlier momentum included; a group of 1 %, gathered, and a complement of 90 %, dense."""
    model, freezer, masks = trained(kind, variant, name, share=share, make=make, dtype=dtype)
    free = freezer.proof()
    assert free["max_change"] == pytest.approx(largest_change(model, masks, make, dtype), rel=1e-5)
    assert free["held"] is (variant in HOLD - {"rewind"})
    assert (free["max_change"] > 0) is not free["held"]
    before = {name: t.clone() for name, t in trained_state(model).items()}
    freezer.finish()
    freezer.finish()
    proof = freezer.proof()
    assert (proof["variant"], proof["entries"]) == (variant, sum(int(mask.sum()) for mask in masks.values()))
    assert proof["held"] is (variant in HOLD)
    assert proof["max_change"] == pytest.approx(largest_change(model, masks, make, dtype), rel=1e-5)
    assert ("note" in proof) is ((kind, variant) == ("lora", "grad_mask"))
    if variant == "rewind":
        assert proof["max_change_before_rewind"] == free["max_change"]
    else:
        assert proof == free
        assert all(torch.equal(tensor, before[name]) for name, tensor in trained_state(model).items())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("decay", "momentum", "holds"), [(0.0, False, True), (0.1, False, False), (0.0, True, False)])
def test_a_gradient_hook_holds_without_decay_and_earlier_momentum_only(name, decay, momentum, holds):
    model, freezer, masks = trained("full", "grad_mask", name, decay=decay, momentum=momentum)
    base = tiny_llama()
    same = [torch.equal(base_weight(base, p)[m], weight_of(model.get_submodule(p))[m]) for p, m in masks.items()]
    assert freezer.proof()["held"] is all(same) is holds
    if not holds:
        assert not any(same)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("variant", ["grad_mask", "exact"])
def test_full_tuning_is_what_the_loop_by_hand_does(variant, make):
    """The reference zeroes the gradients itself, and for `exact` copies the entries back itself: bitwise the same."""
    got, _, masks = trained("full", variant, make=make)
    want, base = start("full", make), make()
    optimizer = optimizer_of(want)
    for step in range(4):
        want(input_ids=tokens(seed=step % 5), labels=tokens(seed=step % 5)).loss.backward()
        weights = {path: want.get_submodule(path).weight for path in masks}
        stored = {
            path: m if weights[path].shape == m.shape and make is tiny_llama else m.T for path, m in masks.items()
        }
        for path, weight in weights.items():
            weight.grad[stored[path]] = 0
        nn.utils.clip_grad_norm_(want.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if variant == "exact":
            for path, weight in weights.items():
                weight.data[stored[path]] = base.get_submodule(path).weight.data[stored[path]]
    for name, tensor in trained_state(want).items():
        assert torch.equal(trained_state(got)[name], tensor), name


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_rewinding_full_tuning_is_the_free_run_but_for_the_entries(make):
    free, _, masks = trained("full", None, make=make)
    rewound, freezer, _ = trained("full", "rewind", make=make)
    freezer.finish()
    base = make()
    for name, parameter in free.named_parameters():
        path = name.removesuffix(".weight")
        got = rewound.get_parameter(name)
        if path in masks:
            mask = masks[path]
            want = torch.where(mask, base_weight(base, path), weight_of(free.get_submodule(path)))
            assert torch.equal(weight_of(rewound.get_submodule(path)), want)
        else:
            assert torch.equal(got, parameter)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rewinding_a_delta_masks_the_change_of_the_free_run(make, dtype):
    free, _, masks = trained("lora", None, make=make, dtype=dtype)
    rewound, freezer, _ = trained("lora", "rewind", make=make, dtype=dtype)
    assert torch.equal(rewound(tokens()).logits, free(tokens()).logits)
    freezer.finish()
    for path, mask in masks.items():
        want = dl.delta_weight(free, path) * ~mask
        assert torch.equal(dl.delta_weight(rewound, path), want)
        assert torch.equal(merged_weight(rewound, path), base_weight(make().to(dtype), path) + want)
        assert want.count_nonzero() > 0.9 * (~mask).sum()
    if dtype is torch.float32:
        assert_close_by_norm(dl.merged(rewound)(tokens()).logits, rewound(tokens()).logits, 1e-5)


def test_a_gradient_hook_changes_nothing_under_a_delta():
    """The run with it is the run without it, bit for bit: no gradient reaches the base, and what moves is ΔW."""
    plain, _, masks = trained("lora", None)
    hooked, freezer, _ = trained("lora", "grad_mask")
    assert all(torch.equal(t, trained_state(plain)[name]) for name, t in trained_state(hooked).items())
    assert all(not hooked.get_submodule(path).weight._backward_hooks for path in masks)
    proof = freezer.proof()
    assert proof["note"].startswith(f"{len(masks)} of the {len(masks)} base matrices do not train, so the hook never")
    assert proof["note"].endswith(f"{len(masks)} have a delta, whose change of W no hook on W holds")
    assert not proof["held"]


def test_a_gradient_hook_says_what_it_does_not_reach():
    model = dl.adapt(tiny_llama(), [dl.Train("last-1"), dl.LoRA(r=2, targets=["q_proj"], layers=[-1])])
    freezer = freeze(model, masks_of(model), "grad_mask")
    optimizer = torch.optim.SGD(param_groups(model, 1e-2))
    steps(model, optimizer, 2)
    proof = freezer.proof()
    assert "7 of the 14 base matrices do not train" in proof["note"]
    assert "1 have a delta" in proof["note"]
    freezer.remove()
    assert freeze(dl.adapt(tiny_llama(), dl.Train("full")), masks_of(model), "grad_mask").proof().get("note") is None


def test_rewinding_own_weights_and_a_delta_at_once():
    model = dl.adapt(tiny_llama(), [dl.Train("full"), dl.LoRA(r=2, targets=["q_proj"])])
    masks = masks_of(model)
    freezer = freeze(model, masks, "rewind")
    steps(model, optimizer_of(model), 3)
    assert freezer.proof()["max_change"] == pytest.approx(
        largest_change(model, masks, tiny_llama, torch.float32), rel=1e-5
    )
    freezer.finish()
    assert freezer.proof()["held"]
    base = tiny_llama()
    assert all(torch.equal(merged_weight(model, p)[m], base_weight(base, p)[m]) for p, m in masks.items())


def test_a_rewound_freezer_trains_freely_again():
    model = start("lora")
    freezer = freeze(model, masks_of(model), "rewind")
    optimizer = optimizer_of(model)
    for _ in range(2):
        freezer.install(optimizer)
        assert all(delta.keep is None for delta in attached(model).values())
        steps(model, optimizer, 2)
        assert not freezer.proof()["held"]
        assert "max_change_before_rewind" not in freezer.proof()
        freezer.finish()
        assert freezer.proof()["held"]
    freezer.remove()
    assert all(delta.keep is None for delta in attached(model).values())


@pytest.mark.parametrize("variant", ["delta_mask", "rewind"])
def test_a_masked_delta_can_be_masked_further(variant):
    model = start("lora")
    first, second = masks_of(model, seed=1), masks_of(model, seed=2)
    outer = freeze(model, first, "delta_mask")
    inner = freeze(model, second, variant)
    steps(model, optimizer_of(model), 2)
    inner.finish()
    assert inner.proof()["held"]
    for path, delta in attached(model).items():
        assert torch.equal(delta.keep, ~first[path] & ~second[path])
    inner.remove()
    assert outer.proof()["held"]
    assert all(torch.equal(delta.keep, ~first[path]) for path, delta in attached(model).items())


@pytest.mark.parametrize("variant", ["delta_mask", "rewind"])
def test_entries_that_a_delta_had_moved_before_count_as_changed(variant):
    """Masking takes them back to the base, which is no holding: the proof says how far."""
    model = perturbed(start("lora"))
    masks = masks_of(model)
    want = largest_change(model, masks, tiny_llama, torch.float32)
    freezer = freeze(model, masks, variant)
    freezer.finish()
    proof = freezer.proof()
    assert proof["max_change"] == pytest.approx(want, rel=1e-5)
    assert not proof["held"]
    kept = freeze(model, masks, "none")
    assert kept.proof()["held"], "the start of a new freezer is the model as it is"


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_a_start_that_is_not_zero_is_taken_off(share):
    model = perturbed(start("lora"))
    freezer = freeze(model, masks_of(model, share), "none")
    assert freezer.proof() == {"variant": "none", "entries": freezer.entries, "max_change": 0.0, "held": True}
    with torch.no_grad():
        for delta in attached(model).values():
            delta.B *= 3
    want = max(float((dl.delta_weight(model, p) * 2 / 3)[m].abs().max()) for p, m in masks_of(model, share).items())
    assert freezer.proof()["max_change"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(("kind", "variant"), [("lora", "delta_mask"), ("lora", "rewind"), ("full", "rewind")])
def test_what_is_saved_carries_the_mask_and_peft_refuses_it(kind, variant, tmp_path):
    model, freezer, masks = trained(kind, variant)
    freezer.finish()
    dl.save_adapter(model, tmp_path / "out")
    again = dl.load_adapter(tiny_llama(), tmp_path / "out")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    base = tiny_llama()
    assert all(torch.equal(merged_weight(again, p)[m], base_weight(base, p)[m]) for p, m in masks.items())
    with pytest.raises((ValueError, KeyError)):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")


def test_the_digest_is_of_the_entries():
    model = start("full")
    masks = masks_of(model)
    digest = freeze(model, masks, "none").digest
    assert freeze(model, dict(reversed(masks.items())), "none").digest == digest
    path = next(iter(masks))
    rolled = {**masks, path: masks[path].roll(1, 0)}  # as many entries, others
    assert freeze(model, rolled, "none").entries == freeze(model, masks, "none").entries
    assert freeze(model, rolled, "none").digest != digest
    names = dict(zip(masks, [*list(masks.values())[1:], next(iter(masks.values()))], strict=True))
    same_shapes = {p: m for p, m in names.items() if m.shape == masks[p].shape}
    assert freeze(model, same_shapes, "none").digest != freeze(model, {p: masks[p] for p in same_shapes}, "none").digest


def test_empty_and_whole_masks():
    for kind, variant in WAYS:
        model = start(kind)
        empty = freeze(model, {p: torch.zeros_like(m) for p, m in masks_of(model).items()}, variant)
        optimizer = optimizer_of(model)
        empty.install(optimizer)
        steps(model, optimizer, 1)
        empty.finish()
        assert (empty.proof()["max_change"], empty.proof()["held"], empty.entries) == (0.0, True, 0)
    model = start("lora")
    whole = freeze(model, {p: torch.ones_like(m) for p, m in masks_of(model).items()}, "delta_mask")
    steps(model, optimizer_of(model), 2)
    assert whole.proof()["held"]
    assert torch.equal(model(tokens()).logits, tiny_llama()(tokens()).logits)


@pytest.mark.parametrize("variant", ["none", "grad_mask", "rewind", "delta_mask"])
def test_a_quantised_base_is_never_needed_as_floats(variant, monkeypatch):
    """On bitsandbytes' own 4-bit linears: only the forward dequantises."""
    import bitsandbytes as bnb

    model = tiny_llama(hidden=64, mlp=64)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            four = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
            )
            four.load_state_dict(linear.state_dict())
            model.set_submodule(name, four.to("cpu"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    dl.adapt(model, dl.LoRA(r=4, targets="all-linear"))
    masks = {
        path: torch.rand(*(module.out_features, module.in_features), generator=torch.Generator().manual_seed(0)) < 0.02
        for path, module in model.named_modules()
        if path in attached(model)
    }
    optimizer = optimizer_of(model)
    dequantise = bnb.functional.dequantize_4bit
    refuse = lambda *_, **__: pytest.fail("the base was dequantised")  # noqa: E731
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", refuse)
    freezer = freeze(model, masks, variant)
    freezer.install(optimizer)
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", dequantise)
    steps(model, optimizer, 3)
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", refuse)
    free = freezer.proof()
    assert free["held"] is (variant == "delta_mask")
    freezer.finish()
    proof = freezer.proof()
    assert proof["held"] is (variant in HOLD)
    for path, mask in masks.items():
        delta, change = attached(model)[path], dl.delta_weight(model, path)
        whole = delta.s * delta.B.double() @ delta.A.double()
        assert_close_by_norm(change, whole * ~mask if variant in HOLD else whole, 1e-6)
        assert torch.equal(change[mask] == 0, torch.full((int(mask.sum()),), variant in HOLD))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
