"""QA-LoRA: its formula by loops, and the merge into the offsets of a quantised base, which is exact."""

import copy
import json

import peft
import pytest
import torch

import deltalab as dl
from deltalab.deltas.adapt import attached, merged_weight
from deltalab.deltas.quantise import quantise
from deltalab.deltas.site import Site
from deltalab.quant.linear import GroupLinear, GroupQuantiser
from tests.deltas.perturb import base_of, perturbed, states_equal
from tests.helpers import assert_close_by_norm, byte_tokenizer, tiny_gpt2, tiny_llama, tokens

bits = pytest.mark.parametrize("bits", [4, 8])


def delta_of(spec, out=5, in_=12, group=None):
    delta = spec.build(Site("x", (out, in_), "linear", torch.float64, torch.device("cpu"), group))
    delta.init(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(delta.B)
    return delta


def test_the_formula_entry_by_entry():
    delta, W, x = delta_of(dl.QALoRA(r=2, alpha=3, group_size=4)), torch.randn(5, 12).double(), torch.randn(12).double()
    assert tuple(delta.A.shape) == (2, 3)
    A, B, s, g = delta.A.tolist(), delta.B.tolist(), 1.5, 4
    change = delta.change(W)
    want = []
    for i in range(5):
        y = sum(float(W[i, j] * x[j]) for j in range(12))
        for q in range(2):
            y += s * B[i][q] * sum(A[q][k] * sum(float(x[k * g + j]) for j in range(g)) / g for k in range(3))
        want.append(y)
        for j in range(12):
            entry = s / g * sum(B[i][q] * A[q][j // g] for q in range(2))
            assert float(change[i, j]) == pytest.approx(entry, rel=1e-12)
    assert_close_by_norm(delta(x, base_of(W)), torch.tensor(want, dtype=torch.float64), 1e-12)
    assert_close_by_norm(delta.adapted(W) @ x, torch.tensor(want, dtype=torch.float64), 1e-12)
    assert torch.equal(change.unflatten(1, (3, 4)), change[:, ::4, None].expand(5, 3, 4)), "not constant to the bit"


@bits
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, lambda: tiny_llama(bias=True, tied=True)])
def test_it_merges_into_the_offsets_alone_and_exactly(bits, make):
    model = perturbed(dl.adapt(quantise(make(), GroupQuantiser(bits, 8)), dl.QALoRA(targets="all-linear")), 0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = dl.merged(model)
    assert len(attached(model)) > 3
    for path in attached(model):
        old, new = model.get_submodule(path), merged.get_submodule(path)
        assert type(new) is GroupLinear
        assert torch.equal(new.codes, old.codes)
        assert torch.equal(new.scale, old.scale)
        assert new.codes.data_ptr() == old.codes.data_ptr()
        change = dl.delta_weight(model, path)
        assert_close_by_norm(new.offset, old.offset + change[:, ::8], 1e-6)
        assert_close_by_norm(new.weight, merged_weight(model, path), 1e-6)
        assert_close_by_norm(new.weight.double(), old.weight.double() + change.double(), 1e-6)
        assert float(change.norm()) > 0.05 * float(old.weight.norm()), "a change too small to see"
    assert_close_by_norm(merged(tokens()).logits, model(tokens()).logits, 1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    bare = quantise(make(), GroupQuantiser(bits, 8))
    assert list(merged.state_dict()) == list(bare.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in bare.modules()]
    assert states_equal(dl.unload(model), bare)
    twice = dl.merged(perturbed(dl.adapt(copy.deepcopy(merged), dl.QALoRA(targets="all-linear"))))
    assert all(type(twice.get_submodule(path)) is GroupLinear for path in attached(model))


def test_other_changes_become_plain_linears():
    model = dl.adapt(quantise(tiny_llama(), GroupQuantiser(4, 16)), [dl.LoRA(targets="q,v"), dl.QALoRA(targets="mlp")])
    perturbed(model)
    path = "model.layers.0.mlp.up_proj"
    attached(model)[path].keep = torch.rand(48, 32) < 0.5  # no longer constant within groups
    merged = dl.merged(model)
    kinds = {path: type(merged.get_submodule(path)).__name__ for path in attached(model)}
    assert kinds["model.layers.0.self_attn.q_proj"] == "Linear" == kinds[path]
    assert kinds["model.layers.1.mlp.up_proj"] == "GroupLinear"
    assert_close_by_norm(merged.get_submodule(path).weight, merged_weight(model, path), 1e-7)
    assert_close_by_norm(merged(tokens()).logits, model(tokens()).logits, 1e-5)


def test_in_bfloat16_it_merges_into_fp32_offsets():
    model = quantise(tiny_llama(dtype=torch.bfloat16), GroupQuantiser(4, 16))
    perturbed(dl.adapt(model, dl.QALoRA(targets="all-linear")))
    merged = dl.merged(model)
    for path in attached(model):
        old, new = model.get_submodule(path), merged.get_submodule(path)
        assert new.offset.dtype is torch.float32
        assert_close_by_norm(new.offset, old.offset + dl.delta_weight(model, path)[:, ::16], 1e-6)
    assert_close_by_norm(merged(tokens()).logits, model(tokens()).logits, 2e-2)


def test_the_group_is_the_quantisers_or_a_multiple_of_it():
    assert delta_of(dl.QALoRA(), in_=64).g == 32
    assert delta_of(dl.QALoRA(), in_=64, group=16).g == 16
    assert delta_of(dl.QALoRA(group_size=32), in_=64, group=16).g == 32
    with pytest.raises(dl.UserError, match=r"groups of 8 does not fit 'x', quantised in groups of 16"):
        delta_of(dl.QALoRA(group_size=8), in_=64, group=16)
    with pytest.raises(dl.UserError, match=r"groups of 5 do not divide 12 inputs[\s\S]*4"):
        delta_of(dl.QALoRA(group_size=5))
    model = tiny_llama()
    with pytest.raises(dl.UserError, match="groups of 5"):
        dl.adapt(model, dl.QALoRA(group_size=5))
    assert states_equal(model, tiny_llama())
    wide = dl.adapt(quantise(tiny_llama(), GroupQuantiser(4, 8)), dl.QALoRA(group_size=16, targets="mlp"))
    assert all(
        type(m) is GroupLinear for m in dl.merged(perturbed(wide)).model.layers[0].mlp.children() if hasattr(m, "bits")
    )


def test_it_is_loaded_with_the_quantised_base(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = dl.load(tmp_path, quantize="int4-group", group_size=8, adapt=dl.QALoRA(r=4), seed=1)
    want = dl.adapt(quantise(tiny_llama(), GroupQuantiser(4, 8)), dl.QALoRA(r=4), seed=1)
    assert states_equal(model, want)
    assert {delta.g for delta in attached(model).values()} == {8}


def test_files_are_ours_alone(tmp_path):
    model = perturbed(dl.adapt(quantise(tiny_llama(), GroupQuantiser(4, 16)), dl.QALoRA()))
    dl.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DELTALAB"
    again = dl.load_adapter(quantise(tiny_llama(), GroupQuantiser(4, 16)), tmp_path)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    with pytest.raises(dl.UserError, match=r"does not fit[\s\S]*shape"):
        dl.load_adapter(quantise(tiny_llama(), GroupQuantiser(4, 8)), tmp_path)
    with pytest.raises(Exception, match="DELTALAB"):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with pytest.raises(NotImplementedError):
        dl.QALoRA().to_peft()


def test_pefts_variant_is_refused_by_name_and_with_the_reason():
    config = peft.LoraConfig(use_qalora=True, qalora_group_size=16, target_modules=["q_proj"])
    model = tiny_llama()
    with pytest.raises(dl.UserError, match=r"use_qalora=True[\s\S]*number of groups[\s\S]*cannot merge"):
        dl.adapt(model, config)
    assert states_equal(model, tiny_llama())
