"""Where the loss cannot be made of the output layer's input it is that of the model's logits; and what is wrapped round a model."""

import contextlib

import accelerate
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import deltalab as dl
from deltalab.data.chat import IGNORED, Encoded
from deltalab.data.collate import collate
from deltalab.quant.linear import quantiser
from deltalab.train import head
from deltalab.train.head import After, after
from deltalab.train.loss import nll_of_logits, nll_sum, told
from tests.helpers import assert_close_by_norm, tiny_llama
from tests.train.test_loss import assert_same, gradients, samples


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
def test_under_accelerates_autocast(dtype, monkeypatch):
    """The prepared model's forward is patched: it computes in bf16, and gives fp32 logits."""
    AcceleratorState._reset_state()
    model, reference = tiny_llama(dtype=dtype), tiny_llama(dtype=torch.float64)
    reference.load_state_dict(model.state_dict())
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    AcceleratorState._reset_state()
    batch = collate(samples(), 0)
    exact, exacts = gradients(reference, nll_of_logits, batch)
    errors, on = {}, []
    fused = head.linear_cross_entropy
    monkeypatch.setattr(
        head, "linear_cross_entropy", lambda *a, **k: (on.append(torch.is_autocast_enabled("cpu")), fused(*a, **k))[1]
    )
    for function in (nll_sum, nll_of_logits):
        loss, found = gradients(prepared, function, batch)
        assert loss.dtype == torch.float32
        errors[function] = [
            float((g.double() - w).norm() / w.norm()) for g, w in [(loss, exact), *((found[n], exacts[n]) for n in exacts)]
        ]  # fmt: skip
    assert on == [True]  # the model's forward is over by then, and its autocast with it
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
