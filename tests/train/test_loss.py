"""The loss through the output layer's input is that of the model's own logits, on every kind of model; else it is the latter."""

import contextlib

import accelerate
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import deltalab as dl
from deltalab.data.chat import IGNORED, Encoded
from deltalab.data.collate import collate
from deltalab.data.packing import pack
from deltalab.quant.linear import quantiser
from deltalab.train.head import After, after
from deltalab.train.loss import nll_of_logits, nll_sum, told
from tests.families import DECODER, FAMILIES, MLP, model_of
from tests.helpers import assert_close_by_norm, tiny_llama

LENGTHS = (9, 5, 12)


def samples(*, masked=0.6, vocab=270, lengths=LENGTHS):
    g = torch.Generator().manual_seed(0)
    found = []
    for n in lengths:
        ids = torch.randint(5, vocab, (n,), generator=g)
        labels = ids.where(torch.rand(n, generator=g) >= masked, torch.tensor(IGNORED))
        labels[-1] = ids[-1]
        found.append(Encoded(ids.tolist(), labels.tolist()))
    return found


def cohere():
    return transformers.CohereForCausalLM(
        transformers.CohereConfig(**DECODER, intermediate_size=MLP, logit_scale=0.0625)
    )


def granite():
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**DECODER, intermediate_size=MLP, logits_scaling=8.0)
    )


def gemma2():
    config = transformers.Gemma2Config(
        **DECODER, intermediate_size=MLP, head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=50.0, query_pre_attn_scalar=8
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def phi():
    return transformers.PhiForCausalLM(transformers.PhiConfig(**DECODER, intermediate_size=MLP))


def opt():
    """Hidden states wider than the embeddings, projected before the output layer."""
    config = transformers.OPTConfig(
        hidden_size=WIDE, word_embed_proj_dim=16, ffn_dim=MLP, num_hidden_layers=2, num_attention_heads=4, vocab_size=270,
        dropout=0.0, pad_token_id=1, do_layer_norm_before=False,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def bart():
    config = transformers.BartConfig(
        d_model=WIDE, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=MLP, decoder_ffn_dim=MLP, vocab_size=270, dropout=0.0, pad_token_id=0,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def mamba():
    config = transformers.MambaConfig(hidden_size=WIDE, num_hidden_layers=2, vocab_size=270, state_size=4)
    return transformers.MambaForCausalLM(config)


WIDE = 32
MORE = {"cohere": cohere, "granite": granite, "gemma2": gemma2, "phi": phi, "opt": opt, "bart": bart, "mamba": mamba}
AFTER = {"cohere": ", times 0.0625", "granite": ", times 0.125", "gemma2": ", capped at 3"}
NAMES = {"bert": "cls.predictions.decoder"}
ALL = [name for name in FAMILIES if name != "bert-classifier"] + list(MORE)


def made(name):
    if name in FAMILIES:
        return model_of(name)
    torch.manual_seed(0)
    model = MORE[name]()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif key.endswith(("lm_head.weight", "embed_tokens.weight")):
            nn.init.normal_(parameter, std=0.5)  # logits of a few units: a cap would else not be seen
    return model


def batches(name, model):
    padded = collate(samples(), 0)
    if model.config.is_encoder_decoder:
        return [padded | {"decoder_input_ids": padded["input_ids"]}]
    return [padded, pack(samples())] if name not in ("bert", "opt", "mamba") else [padded]


def gradients(model, function, batch):
    """The loss, and the gradients of a share of it. Dropout is the same each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    loss = function(model, batch)
    (loss / 7).backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, batch, bound=1e-5):
    want, wants = gradients(model, nll_of_logits, batch)
    got, gots = gradients(model, nll_sum, batch)
    assert_close_by_norm(got, want, bound)
    assert gots.keys() == wants.keys()
    whole = max(gradient.norm() for gradient in wants.values())
    for name, gradient in wants.items():
        # a bias of keys has the gradient zero, and what is there is rounding
        assert (gots[name] - gradient).norm() <= 3 * bound * gradient.norm() + 1e-3 * bound * whole, name


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradients_are_those_of_the_models_logits(name):
    """All parameters train: the output layer, tied or not, its bias, and what is below."""
    model = made(name)
    model.requires_grad_(True) if not getattr(FAMILIES.get(name), "codes", False) else None
    bf16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
    for batch in batches(name, model):
        assert_same(model, batch, 1e-2 if bf16 else 1e-5)
        assert told(model) == f"cross-entropy over {NAMES.get(name, 'lm_head')} in chunks of the counted rows{AFTER.get(name, '')}"  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_adapted(name):
    model = dl.adapt(made(name), dl.LoRA(r=4, targets="all-linear")).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for batch in batches(name, model):
        assert_same(model, batch)
    assert told(model).startswith("cross-entropy over")


class Sizes(TorchDispatchMode):
    """The most rows of a product that are of the vocabulary's width."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.most = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and out.shape[-1] == self.vocab:
            self.most = max(self.most, len(out))
        return out


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_only_counted_rows_reach_the_output_layer(packed, training):
    model, data = tiny_llama().train(training), samples()
    batch = pack(data) if packed else collate(data, 0)
    counted = sum(label != IGNORED for sample in data for label in sample.labels[1:])
    nll_sum(model, batch)  # the first call tries
    with torch.set_grad_enabled(training), Sizes(270) as seen:
        nll_sum(model, batch)
    assert seen.most == counted
    with Sizes(270) as seen:
        nll_of_logits(model, batch)
    assert seen.most == (counted if packed else 36)


def with_delta(model):
    return dl.adapt(model, dl.LoRA(r=2, targets=["lm_head"])), "of class AdaptedLinear"


def with_plain_kernels(model):
    return dl.adapt(model, dl.LoRA(r=2, targets=["q_proj"]), kernels="plain"), "kernels='plain'"


def with_hook_on_the_head(model):
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    return model, "hooks"


def with_hook_on_the_model(model):
    model.register_forward_hook(lambda module, args, out: out)
    return model, "hooks"


def with_codes(model):
    model.lm_head = quantiser("int8").linear(model.lm_head.weight, None, torch.float32)
    return model, "of class GroupLinear"


def with_a_forward_of_its_own(model):
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: own(x) * 2
    return model, "spread over devices"


def with_something_added(model):
    class Added(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + torch.arange(270) / 100
            return out

    model.__class__ = Added
    return model, "scaled and capped"


def with_rows_that_it_counts(model):
    class Counts(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            assert out.logits.shape[1] in (12, 26), "too few logits"
            return out

    model.__class__ = Counts
    return model, "too few logits"


def with_a_head_that_is_not_asked(model):
    class Unasked(type(model)):
        def forward(self, *args, **kwargs):
            kwargs.pop("logits_to_keep", None)
            hidden = self.model(*args, **kwargs).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=F.linear(hidden, self.lm_head.weight))

    model.__class__ = Unasked
    return model, "not asked once"


ODD = [with_delta, with_plain_kernels, with_hook_on_the_head, with_hook_on_the_model, with_codes, with_a_forward_of_its_own,
       with_something_added, with_rows_that_it_counts, with_a_head_that_is_not_asked]  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_else_the_models_own_logits_decide(odd):
    model, why = odd(tiny_llama())
    model.config.attention_dropout = 0.2  # what the trial drew is drawn again
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    model.train()
    for _ in range(2):
        results = []
        for function in (nll_sum, nll_of_logits):
            results.append((*gradients(model, function, collate(samples(), 0)), torch.rand(())))
        (got, gots, drawn), (want, wants, same) = results
        assert torch.equal(got, want)
        assert drawn == same
        assert all(torch.equal(gots[name], wants[name]) for name in wants)
    assert told(model).startswith("of the model's logits: ")
    assert why in told(model)
    assert not any(getattr(m, h) for m in (model, model.lm_head) for h in ("_forward_pre_hooks",))


def test_what_comes_and_goes_is_seen_at_every_call():
    model, batch = tiny_llama(), collate(samples(), 0)
    plain = float(nll_sum(model, batch).detach())
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    assert float(nll_sum(model, batch).detach()) != pytest.approx(plain, rel=1e-3)
    handle.remove()
    assert float(nll_sum(model, batch).detach()) == plain
    dl.adapt(model, dl.LoRA(r=2, targets=["lm_head"]))
    assert "AdaptedLinear" in told(model)
    dl.unload(model)
    assert float(nll_sum(model, batch).detach()) == plain
    model.lm_head = nn.Linear(32, 270)
    assert_same(model, batch)
    assert told(model).startswith("cross-entropy")


def test_an_error_of_the_forward_is_shown():
    model, batch = tiny_llama(), collate(samples(), 0)
    for _ in range(2):
        with pytest.raises(IndexError):
            nll_sum(model, batch | {"input_ids": batch["input_ids"] + 1000})
    assert not model.lm_head._forward_pre_hooks
    assert not model._forward_hooks


def test_no_counted_label_still_reaches_every_parameter():
    model = tiny_llama()
    batch = collate([Encoded([5, 6, 7], [IGNORED] * 3)], 0)
    loss, found = gradients(model, nll_sum, batch)
    assert loss == 0
    assert found.keys() == {n for n, _ in model.named_parameters()}
    assert not any(g.any() for g in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_accelerates_autocast(dtype):
    """The prepared model's forward is patched: it computes in bf16, and gives fp32 logits."""
    AcceleratorState._reset_state()
    model, reference = tiny_llama(dtype=dtype), tiny_llama(dtype=torch.float64)
    reference.load_state_dict(model.state_dict())
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    AcceleratorState._reset_state()
    batch = collate(samples(), 0)
    exact, exacts = gradients(reference, nll_of_logits, batch)
    errors = {}
    for function in (nll_sum, nll_of_logits):
        loss, found = gradients(prepared, function, batch)
        assert loss.dtype == torch.float32
        errors[function] = [
            float((g.double() - w).norm() / w.norm()) for g, w in [(loss, exact), *((found[n], exacts[n]) for n in exacts)]
        ]  # fmt: skip
    assert told(prepared).startswith("cross-entropy")
    ours, torchs = (torch.tensor(errors[f]) for f in (nll_sum, nll_of_logits))
    assert ours.square().mean() <= 1.1 * torchs.square().mean() + 1e-6
    assert ours.max() < 0.1


@contextlib.contextmanager
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_under_data_parallelism(options, odd, tmp_path):
    """The loss is what the wrapper's forward gives, so that its reducer knows of every parameter."""
    batch, (reference, model) = collate(samples(), 0), (tiny_llama(), tiny_llama())
    if odd:
        with_something_added(reference), with_something_added(model)
    with one_process(tmp_path):
        wrapped, seen = DistributedDataParallel(model, **options), []

        def reduced(state, bucket):
            seen.extend(bucket.parameters())
            done = torch.futures.Future()
            done.set_result(bucket.buffer() * 3)  # what the reducer gives back is what the parameters get
            return done

        wrapped.register_comm_hook(None, reduced)
        for _ in range(3):
            seen.clear()
            loss, found = gradients(wrapped, nll_sum, batch)
            want, wants = gradients(reference, nll_of_logits, batch)
            assert_close_by_norm(loss, want, 1e-5)
            assert len(seen) == len(wants)
            for name, gradient in wants.items():
                assert_close_by_norm(found[f"module.{name}"], 3 * gradient, 1e-5)
    assert told(wrapped).startswith("of the model's logits" if odd else "cross-entropy")


def test_the_formula_is_found_by_its_values():
    given = (4 * torch.linspace(-5, 5, 500).sinh())[None, None]
    for want in (After(), After(0.125), After(8.0), After(1.0, 30.0), After(0.125, 30.0)):
        assert after(given, want.of(given), [50.0, 8.0, 30.0]) == want
        half = given.bfloat16()
        assert after(half, want.of(half), [50.0, 8.0, 30.0]) == want
    assert after(given, given + 0.1, [8.0]) is None
    assert after(given, 3 * given, [8.0]) is None
    assert after(given, given[..., :-1], [8.0]) is None
    assert after(given, torch.full_like(given, float("nan")), [8.0]) is None
