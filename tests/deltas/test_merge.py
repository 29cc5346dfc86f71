"""Merging into quantised linears: each way against brute force, and what it must leave alone."""

import pytest
import torch

import deltalab as dl
from deltalab.deltas.adapt import attached, merged_weight
from deltalab.deltas.merge import corrected
from deltalab.deltas.quantise import quantise
from deltalab.quant.groups import dequantise as of_codes
from deltalab.quant.groups import quantise as to_codes
from deltalab.quant.linear import GroupLinear, GroupQuantiser
from tests.deltas.perturb import perturbed, states_equal
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_gpt2, tiny_llama, tokens

bits = pytest.mark.parametrize("bits", [4, 8])
makes = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, lambda: tiny_llama(bias=True, tied=True)])
GROUP = 8


def adapted(bits, make=tiny_llama, spec=None):
    base = quantise(make(), GroupQuantiser(bits, GROUP))
    return perturbed(dl.adapt(base, spec or dl.LoRA(r=4, targets="all-linear")), 0.3)


@bits
@makes
def test_requantised_has_the_codes_of_the_merged_weight(bits, make):
    model = adapted(bits, make)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = dl.merged(model, into="requantise")
    assert len(attached(model)) > 3
    for path in attached(model):
        made, base = plain.get_submodule(path), model.get_submodule(path)
        W = merged_weight(model, path)
        want = of_codes(*to_codes(W, bits, GROUP))
        assert type(made) is GroupLinear
        assert (made.bits, made.group_size, made.training) == (bits, GROUP, False)
        assert torch.equal(made.weight, want)
        assert made.codes.dtype is base.codes.dtype
        assert made.bias is None or torch.equal(made.bias, base.bias)
        assert 0 < error_by_norm(want, W) < (0.15 if bits == 4 else 0.01)
    assert not attached(plain)
    bare = quantise(make(), GroupQuantiser(bits, GROUP))
    assert list(plain.state_dict()) == list(bare.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in bare.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert states_equal(dl.unload(model), bare)


@bits
@makes
def test_dequantised_loses_nothing(bits, make):
    model = adapted(bits, make)
    plain = dl.merged(model, into="dequantise")
    for path in attached(model):
        assert type(plain.get_submodule(path)) is torch.nn.Linear
        assert torch.equal(plain.get_submodule(path).weight, merged_weight(model, path))
    assert_close_by_norm(plain(tokens()).logits, model(tokens()).logits, 1e-5)
    assert states_equal(plain, dl.merged(model))


@makes
@pytest.mark.parametrize(("bits", "rank"), [(4, 1), (8, 3), (4, 16)])
def test_a_correction_is_the_best_that_its_rank_allows(make, bits, rank):
    model = adapted(bits, make)
    plain, codes = dl.merged(model, into="correct", rank=rank), dl.merged(model, into="requantise")
    assert attached(plain).keys() == attached(model).keys()
    for path, delta in attached(plain).items():
        W, Q = merged_weight(model, path).double(), codes.get_submodule(path).weight.double()
        assert torch.equal(plain.get_submodule(path).codes, codes.get_submodule(path).codes)
        tail = torch.linalg.svdvals(W - Q)[rank:].norm()
        left = (W - Q - dl.delta_weight(plain, path).double()).norm()
        assert float(left) == pytest.approx(float(tail), rel=1e-4, abs=1e-6 * float(W.norm()))
        assert left < (W - Q).norm()
        A, B, s = delta.factors()
        assert (s, tuple(A.shape), tuple(B.shape)) == (1.0, (rank, W.shape[1]), (W.shape[0], rank))
    assert type(dl.unload(plain).get_submodule(path)) is GroupLinear
    assert states_equal(plain, codes)


def test_a_correction_of_full_rank_leaves_nothing():
    model = adapted(4)
    plain = dl.merged(model, into="correct", rank=1000)
    assert max(delta.factors().A.shape[0] for delta in attached(plain).values()) == 32
    assert_close_by_norm(plain(tokens()).logits, model(tokens()).logits, 1e-5)


def test_more_steps_are_those_of_loftq():
    """Algorithm 1 of the paper, written out, with the merged weight for W."""
    model = adapted(4)
    left = {}
    for steps in (1, 2, 5):
        plain = dl.merged(model, into="correct", rank=4, steps=steps)
        for path in attached(model):
            W = merged_weight(model, path)
            A, B = torch.zeros(4, W.shape[1]), torch.zeros(W.shape[0], 4)
            for _ in range(steps):
                Q = of_codes(*to_codes(W - B @ A, 4, GROUP))
                U, S, V = torch.linalg.svd(W - Q)
                root = S[:4].sqrt()
                B, A = U[:, :4] * root, root[:, None] * V[:4]
            assert_close_by_norm(plain.get_submodule(path).weight, Q, 1e-5)
            assert_close_by_norm(merged_weight(plain, path), Q + B @ A, 1e-5)
            left[path, steps] = float((W - Q - B @ A).norm())
    assert sum(left[path, 5] < left[path, 1] for path, steps in left if steps == 1) > len(attached(model)) / 2


def test_a_corrected_model_saves_its_adapter_for_its_own_base_alone(tmp_path):
    model = adapted(4)
    plain = dl.merged(model, into="correct", rank=3)
    dl.save_adapter(plain, tmp_path / "correction")
    want = plain(tokens()).logits
    base = dl.unload(plain)
    assert torch.equal(dl.load_adapter(base, tmp_path / "correction")(tokens()).logits, want)
    with pytest.raises(dl.UserError, match="belongs to another base"):
        dl.load_adapter(quantise(tiny_llama(), GroupQuantiser(4, GROUP)), tmp_path / "correction")


@pytest.mark.parametrize("into", ["dequantise", "requantise", "correct"])
def test_what_goes_into_the_offsets_does_in_every_way(into):
    specs = [dl.LoRA(targets="q,v", r=2), dl.QALoRA(targets="mlp", r=2)]
    model = adapted(4, spec=specs)
    plain = dl.merged(model, into=into)
    for layer in (0, 1):
        old, new = (m.get_submodule(f"model.layers.{layer}.mlp.up_proj") for m in (model, plain))
        assert type(new) is GroupLinear
        assert torch.equal(new.codes, old.codes)
        assert not torch.equal(new.offset, old.offset)
        untouched = f"model.layers.{layer}.self_attn.o_proj"
        assert plain.get_submodule(untouched).codes.data_ptr() == model.get_submodule(untouched).codes.data_ptr()
    on = {path for path in attached(model) if path.endswith(("q_proj", "v_proj"))}
    assert set(attached(plain)) == (on if into == "correct" else set())


@pytest.mark.parametrize("into", ["requantise", "correct"])
@pytest.mark.parametrize(
    "spec", [dl.DoRA(r=2), dl.IA3(targets="all-linear"), dl.VeRA(r=4), dl.AdaLoRA(init_r=4, target_r=4)], ids=repr
)
def test_every_method_with_a_weight_and_its_bias(spec, into):
    model = adapted(8, lambda: tiny_llama(bias=True), spec)
    plain = dl.merged(model, into=into)
    for path in attached(model):
        assert type(dl.merged(model, into="requantise").get_submodule(path)) is GroupLinear
        assert_close_by_norm(merged_weight(plain, path), merged_weight(model, path), 1e-2)
        want = dl.merged(model).get_submodule(path).bias
        assert torch.equal(plain.get_submodule(path).bias, want)
    assert_close_by_norm(plain(tokens()).logits, model(tokens()).logits, 3e-2)


def test_in_bfloat16_the_codes_are_of_the_unrounded_weight():
    base = quantise(tiny_llama(dtype=torch.bfloat16), GroupQuantiser(4, GROUP))
    model = perturbed(dl.adapt(base, dl.LoRA(r=4)), 0.3)
    plain, better = dl.merged(model, into="requantise"), dl.merged(model, into="correct", rank=4)
    for path in attached(model):
        W = merged_weight(model, path)
        assert W.dtype is torch.float32
        made = plain.get_submodule(path)
        assert made.dtype is torch.bfloat16
        assert torch.equal(made.weight, of_codes(*to_codes(W, 4, GROUP)).bfloat16())
        assert error_by_norm(merged_weight(better, path), W) < 0.9 * error_by_norm(merged_weight(plain, path), W)


def test_corrected_alone():
    linear = GroupLinear(torch.randn(12, 16), None, 4, 8, torch.float64)
    W = torch.randn(12, 16).double()
    codes, none = corrected(linear, W, 0)
    made, (A, B) = corrected(linear, W, 2)
    assert none is None
    assert torch.equal(codes.weight, made.weight)
    U, S, V = torch.linalg.svd(W - made.weight)
    assert_close_by_norm(B @ A, U[:, :2] * S[:2] @ V[:2], 1e-10)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"into": "requantize"}, r"no way to merge[\s\S]*nearest: requantise"),
        ({"into": "requantise", "rank": 4}, "rank=4 is of a correction"),
        ({"steps": 2}, "steps=2 is of a correction"),
        ({"into": "correct", "rank": 0}, "rank=0 corrects nothing"),
        ({"into": "correct", "steps": 0}, "steps=0 corrects nothing"),
    ],
)
def test_options_that_mean_nothing(options, match):
    model = adapted(4)
    with pytest.raises(dl.UserError, match=match):
        dl.merged(model, **options)


@pytest.mark.parametrize("into", ["requantise", "correct"])
def test_codes_where_there_are_none(into):
    model = perturbed(dl.adapt(tiny_llama(), dl.LoRA()))
    with pytest.raises(dl.UserError, match=r"no delta of .* is on one[\s\S]*plain linears are merged as they are"):
        dl.merged(model, into=into)
