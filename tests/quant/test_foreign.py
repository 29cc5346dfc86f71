"""Linears that bitsandbytes quantised, as transformers puts them into a model: read, adapted, held, merged."""

import copy

import bitsandbytes as bnb
import pytest
import torch
import transformers
from torch import nn

import deltalab as dl
from deltalab.deltas.adapt import attached, base_weight, merged_weight
from deltalab.deltas.base import shape_of, weight_of
from deltalab.deltas.quantise import quantise
from deltalab.deltas.sites import is_quantised, place
from deltalab.quant import foreign
from deltalab.quant.linear import quantiser
from deltalab.quant.nf4_linear import NF4Linear
from tests.deltas.perturb import perturbed
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_llama, tokens
from tests.quant.bnb import same

AUTO = transformers.AutoModelForCausalLM
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
WAYS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-plain-scales": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
    "nf4-in-bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
ways = pytest.mark.parametrize("way", WAYS)
four_bits = pytest.mark.parametrize("way", [way for way in WAYS if way != "int8"])
# LLM.int8 rounds the activations too, in a way that the merged model does not
NEAR = {way: 3e-2 if way == "int8" else 1e-5 for way in WAYS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "model"
    tiny_llama(hidden=64, mlp=64, bias=True).save_pretrained(folder)
    return folder


def theirs(folder, way, dtype=torch.float32):
    """The model as transformers loads it."""
    fields = WAYS[way] | ({} if way == "int8" else {"bnb_4bit_compute_dtype": dtype})
    model = AUTO.from_pretrained(folder, dtype=dtype, quantization_config=transformers.BitsAndBytesConfig(**fields))
    return model.train()  # in evaluation bitsandbytes would round its scales, see `test_what_an_evaluation_does`


def quantised_linears(model):
    return {path: m for path, m in model.named_modules() if "layers" in path and isinstance(m, nn.Linear)}


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_what_transformers_dequantises_to(way, dtype, folder):
    model = theirs(folder, way, dtype)
    reference = theirs(folder, way, dtype).dequantize(dtype=torch.float32)
    assert len(quantised_linears(model)) == 14
    for path, linear in quantised_linears(model).items():
        want = reference.get_submodule(path).weight
        assert foreign.kind(linear) == way.split("-")[0]
        assert is_quantised(linear)
        assert foreign.dtype_of(linear) is place(model, path).dtype is weight_of(linear).dtype
        assert foreign.dtype_of(linear) is (torch.float32 if way == "int8" else dtype)
        assert torch.equal(weight_of(linear).float(), want)
        assert shape_of(linear) == tuple(want.shape)
        assert torch.equal(base_weight(model, path), weight_of(linear))
    if way == "int8":
        model(tokens())  # its scales move from the parameter to another place
        assert torch.equal(weight_of(model.get_submodule(Q)), reference.get_submodule(Q).weight)
    assert foreign.kind(model.lm_head) is None
    assert weight_of(model.lm_head) is model.lm_head.weight


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_rows_that_a_block_goes_over_the_end_of(quant_type, nested):
    """There bitsandbytes' kernel for AVX-512 is wrong; what it computes in torch is the reference."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    torch.compiler.set_stance("force_eager")
    for out, in_ in ((48, 40), (33, 70), (8, 192)):
        linear = bnb.nn.Linear4bit(in_, out, quant_type=quant_type, compress_statistics=nested)
        W = linear.weight.data.clone()
        linear = linear.to("cpu")
        state = linear.weight.quant_state
        codes, absmax = bnb.functional.quantize_4bit(W, quant_type=quant_type)
        absmax = absmax.absmax
        if nested:
            absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        want = _dequantize_4bit_compute(codes.reshape(-1), absmax, state.code, 64, (out, in_), torch.float32)
        assert same(foreign.weight_of(linear), want)
    torch.compiler.set_stance("default")


def test_what_bitsandbytes_has_not_quantised_is_a_linear_like_any_other():
    for linear in (
        bnb.nn.Linear4bit(64, 32, quant_type="nf4"),
        bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
        bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True).to("cpu"),
    ):
        assert foreign.kind(linear) is None
        assert weight_of(linear) is linear.weight
        assert not is_quantised(linear)


def test_a_weight_that_was_quantised_transposed():
    linear = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4")
    W = torch.randn(64, 32)
    codes, state = bnb.functional.quantize_4bit(W, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(codes, quant_state=state, quant_type="nf4", bnb_quantized=True)
    got = foreign.weight_of(linear)
    assert shape_of(linear) == got.shape == (32, 64)
    assert_close_by_norm(got, quantiser("nf4").round_trip(W).mT, 1e-2)
    with pytest.raises(dl.UserError, match=r"read here, and not made[\s\S]*quantize='nf4'"):
        foreign.own(linear)


@four_bits
def test_a_state_that_the_parameter_lost(way, folder):
    """FSDP and its like make a new parameter of the codes; the linear still has the state."""
    linear = theirs(folder, way).get_submodule(Q)
    W = foreign.weight_of(linear)
    linear.weight = nn.Parameter(linear.weight.data, requires_grad=False)
    assert foreign.kind(linear) == way.split("-")[0]
    assert torch.equal(foreign.weight_of(linear), W)


@pytest.mark.parametrize("way", ["nf4", "nf4-plain-scales", "fp4"])
def test_what_an_evaluation_does_is_read_and_put_back(way, folder):
    """Where the CPU multiplies bf16, bitsandbytes lays the codes out anew and rounds the scales, for good."""
    model = theirs(folder, way)
    exact = {path: foreign.weight_of(m) for path, m in quantised_linears(model).items()}
    for path, linear in quantised_linears(model).items():
        linear.weight.data, linear.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
            linear.weight.data, linear.weight.quant_state
        )
        read = foreign.weight_of(linear)
        assert read.dtype is torch.float32
        assert 0 < error_by_norm(read, exact[path]) < 2**-8
        scales = exact[path].view(-1, 64).abs().amax(1)
        rounded = scales.bfloat16().float()
        known = scales > 0
        ratio = (rounded / scales)[known].repeat_interleave(64)
        assert_close_by_norm(read.view(-1, 64)[known].view(-1), exact[path].view(-1, 64)[known].view(-1) * ratio, 1e-6)
    held = copy.deepcopy({path: foreign.weight_of(m) for path, m in quantised_linears(model).items()})
    foreign.hold(model)
    for path, linear in quantised_linears(model).items():
        assert not getattr(linear.weight.quant_state, "packing_format_for_cpu", False)
        assert torch.equal(foreign.weight_of(linear), held[path])
        x = torch.randn(3, 64, requires_grad=True)
        assert_close_by_norm(linear(x), x @ held[path].mT + linear.bias, 1e-5)


@four_bits
def test_adapting_keeps_the_codes_through_evaluations_and_the_gradient(way, folder):
    model = theirs(folder, way)
    before = {path: foreign.weight_of(m).clone() for path, m in quantised_linears(model).items()}
    perturbed(dl.adapt(model, dl.LoRA(r=4, targets="all-linear")))
    with torch.no_grad():
        trained = model.train()(tokens()).logits
        assert_close_by_norm(model.eval()(tokens()).logits, trained, 1e-6)
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    lowest = attached(model)[Q]
    assert float(lowest.B.grad.norm()) > 0
    for path, linear in quantised_linears(model).items():
        assert torch.equal(foreign.weight_of(linear), before[path])


METHODS = {"LoRA": dl.LoRA, "DoRA": dl.DoRA, "IA3": dl.IA3, "VeRA": dl.VeRA, "AdaLoRA": dl.AdaLoRA}


@ways
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_weight_deltas_see_the_weight_and_merge(way, method, folder):
    model = theirs(folder, way)
    total = sum(p.numel() for p in tiny_llama(hidden=64, mlp=64, bias=True).parameters())
    bare = model(tokens()).logits
    dl.adapt(model, method(targets="all-linear"), kernels="plain")  # bitwise in training too
    assert torch.equal(model(tokens()).logits, bare)
    assert dl.trainable(model).total == total
    perturbed(model)
    for path, delta in attached(model).items():
        W = foreign.weight_of(model.get_submodule(path))
        assert_close_by_norm(merged_weight(model, path), delta.adapted(W), 1e-6)
        assert_close_by_norm(merged_weight(model, path), W + dl.delta_weight(model, path), 1e-5)
    there = model(tokens()).logits
    plain = dl.merged(model)
    assert all(type(m) is nn.Linear for m in quantised_linears(plain).values())
    assert_close_by_norm(plain(tokens()).logits, there, NEAR[way])
    assert torch.equal(model(tokens()).logits, there)
    assert torch.equal(dl.unload(model)(tokens()).logits, bare)


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_is_saved_as_what_it_is(way, dtype, folder, tmp_path):
    """All of its linears plain, or some: what loads it goes by the config."""
    for targets in ("all-linear", "mlp"):
        model = perturbed(dl.adapt(theirs(folder, way, dtype), dl.LoRA(r=4, targets=targets)))
        plain = dl.merged(model)
        y = plain(tokens()).logits
        assert y.dtype is dtype
        assert plain.is_quantized is (targets == "mlp")
        assert model.is_quantized
        plain.save_pretrained(tmp_path / targets)
        again = AUTO.from_pretrained(tmp_path / targets, dtype=dtype).train()
        for path, linear in quantised_linears(again).items():
            assert (foreign.kind(linear) is None) is (targets == "all-linear" or "mlp" in path)
            assert torch.equal(weight_of(linear), weight_of(plain.get_submodule(path)))
        assert torch.equal(again(tokens()).logits, y)


@pytest.mark.parametrize("way", ["nf4", "nf4-plain-scales", "nf4-in-bfloat16"])
def test_the_same_codes_in_a_linear_of_our_own(way, folder):
    for path, linear in quantised_linears(theirs(folder, way)).items():
        own = foreign.own(linear)
        assert isinstance(own, NF4Linear)
        assert own.double_quant is (way == "nf4")
        assert torch.equal(own.weight, foreign.weight_of(linear)), path
        assert own.bias is linear.bias
        assert own.codes.data_ptr() == linear.weight.data_ptr()
        x = torch.randn(3, 64)
        assert_close_by_norm(own(x), linear(x), 1e-6)


def test_merging_into_codes_needs_codes_that_are_made_here(folder):
    model = perturbed(dl.adapt(theirs(folder, "nf4"), dl.LoRA(r=4, targets="mlp")))
    again = dl.merged(model, into="requantise")
    assert isinstance(again.get_submodule(UP), NF4Linear)
    W = merged_weight(model, UP)
    assert torch.equal(again.get_submodule(UP).weight, quantiser("nf4").round_trip(W))
    for way in ("fp4", "int8"):
        model = perturbed(dl.adapt(theirs(folder, way), dl.LoRA(r=4, targets="mlp")))
        with pytest.raises(dl.UserError, match=rf"read here, and not made[\s\S]*{way}"):
            dl.merged(model, into="requantise")


@ways
def test_what_codes_do_not_allow_is_refused_by_name(way, folder):
    model = theirs(folder, way)
    with pytest.raises(dl.UserError, match="quantised already"):
        quantise(model, quantiser("nf4"))
    for start in ("pissa", "olora"):
        with pytest.raises(dl.UserError, match=f"init='{start}' looks at the weight of .* quantised already"):
            dl.adapt(model, dl.LoRA(init=start))
    with pytest.raises(dl.UserError, match=r"QALoRA[\s\S]*is quantised without any"):
        dl.adapt(model, dl.QALoRA())
    with pytest.raises(dl.UserError, match="codes do not train"):
        dl.adapt(model, dl.Train("full"))
    assert not attached(model)
