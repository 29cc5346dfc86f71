"""Activations that are kept elsewhere or made again: the gradients are bitwise the same, and less is kept."""

import contextlib
import types

import pytest
import torch
from torch import nn

from deltalab.core.errors import UserError
from deltalab.data.chat import encode_all
from deltalab.deltas import LoRA
from deltalab.deltas.adapt import adapt
from deltalab.train import EvalSpec, LoopSpec, OptimSpec, RunSpec, memory, train
from deltalab.train.checkpoint import changes
from deltalab.train.memory import Moved, Offload, checkpointed, offload
from tests.helpers import byte_tokenizer, tiny_gpt2, tiny_llama, tokens
from tests.train.runs import At, conversations, interrupt, run

CPU = torch.device("cpu")
TOKENIZER = byte_tokenizer()


def gradients(model, around, pieces=1, ids=None):
    """Of a model with dropout, the loss of `pieces` passes added up."""
    torch.manual_seed(0)
    model.train().zero_grad(set_to_none=True)
    ids = tokens(batch=2, length=16) if ids is None else ids
    for _ in range(pieces):
        with around:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def adapted(make=tiny_llama):
    return adapt(make(), LoRA(r=4, dropout=0.1, targets="all-linear"), seed=1)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("least", [1, 4096])
@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_bitwise_the_same(make, least, again):
    model = adapted(make)
    want = gradients(model, contextlib.nullcontext(), pieces=2)
    away = Offload(model, CPU, least=least)
    with checkpointed(model, again):
        got = gradients(model, away, pieces=2)
    assert away.moved > 0
    assert want.keys() == got.keys()
    for name, grad in want.items():
        assert torch.equal(grad, got[name]), name


def test_parameters_small_and_expanded_tensors_stay_and_a_shared_input_moves_once():
    model = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(3)])
    x, small = torch.randn(32, 64, requires_grad=True), torch.randn(4, requires_grad=True)
    away = Offload(model, CPU, least=1024)
    with away:
        h = x * 2
        loss = (
            sum(layer(h).sum() for layer in model) + (small * small).sum() + (h * torch.ones(1, 1).expand(32, 64)).sum()
        )
    assert away.moved == h.numel() * 4
    h.detach().fill_(float("nan"))  # what was saved is a copy elsewhere
    loss.backward()
    want = 2 * (sum(layer.weight.detach().sum(0) for layer in model) + 1)
    torch.testing.assert_close(x.grad, want.expand(32, 64))
    assert all(layer.weight.grad.isfinite().all() for layer in model)


def test_a_tensor_that_changed_moves_again_and_so_does_another_at_its_address():
    away, device = Offload(nn.Module(), CPU, least=1), CPU
    with away:
        x = torch.randn(64, 64, device=device)
        first, same = away._pack(x), away._pack(x)
        x.add_(1)
        changed = away._pack(x)
        assert first is same is not changed
        where, value = x.data_ptr(), x.clone()
        del x
        for _ in range(50):
            y = torch.randn(64, 64)
            y.add_(1)
            if y.data_ptr() == where:
                other = away._pack(y)
                assert other is not changed
                assert torch.equal(away._unpack(other), y)
                break
    assert torch.equal(away._unpack(changed), value)


def test_layout_and_dtype_come_back():
    away = Offload(nn.Module(), CPU, least=1)
    x = torch.randn(6, 4, 8, dtype=torch.bfloat16).transpose(0, 1)
    for tensor in (x, x.mT, torch.randn(7, 9)[:, 2:5], torch.rand(5, 5) < 0.5, torch.arange(9)):
        with away:
            packed = away._pack(tensor)
        back = away._unpack(packed)
        assert isinstance(packed, Moved)
        assert torch.equal(back, tensor)
        assert back.dtype is tensor.dtype
        if tensor.is_contiguous() or tensor.transpose(0, 1).is_contiguous():
            assert back.stride() == tensor.stride()


def test_the_backward_is_met_halfway_and_asks_twice_where_the_graph_is_kept():
    away = Offload(nn.Module(), CPU, least=1)
    with away:
        packed = [away._pack(torch.full((4,), float(i))) for i in range(8)]
    away._unpack(packed[7])
    assert [m.back is not None for m in packed] == [False] * 4 + [True] * 3 + [False]
    for i in (6, 5, 4, 3, 2, 1, 0):
        assert away._unpack(packed[i]).tolist() == [float(i)] * 4
    assert all(m.back is None for m in packed)
    assert away._unpack(packed[3]).tolist() == [3.0] * 4

    x = torch.randn(32, 32, requires_grad=True)
    with away:
        loss = (x.exp() * x.sin()).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


class Stand:
    """What is used of torch.cuda, writing down in which order it is asked for."""

    def __init__(self):
        self.told = []
        self.now = self.Stream(self, "compute")

    class Event:
        def __init__(self, stand, name):
            self.stand, self.name = stand, name

        def synchronize(self):
            self.stand.told.append(f"wait for {self.name}")

    class Stream:
        def __init__(self, stand, name):
            self.stand, self.name, self.count = stand, name, 0

        def wait_stream(self, other):
            self.stand.told.append(f"{self.name} after {other.name}")

        def wait_event(self, event):
            self.stand.told.append(f"{self.name} after {event.name}")

        def record_event(self):
            self.count += 1
            self.stand.told.append(f"event {self.count}")
            return Stand.Event(self.stand, f"event {self.count}")

    def module(self):
        @contextlib.contextmanager
        def stream(which):
            self.told.append(f"on {which.name}")
            yield

        return types.SimpleNamespace(
            Stream=lambda device: self.Stream(self, "side"), stream=stream, current_stream=lambda device: self.now
        )


def test_copies_on_a_gpu_are_ordered_by_events_and_bounded(monkeypatch):
    """The order of what is asked of CUDA, on tensors of the CPU: no copy before its source is computed, no use before it
    has arrived, and sources held until they have left."""
    stand = Stand()
    fake = types.SimpleNamespace(cuda=stand.module(), empty_like=lambda t, **_: torch.zeros(t.shape, dtype=t.dtype))
    monkeypatch.setattr(memory, "torch", fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, s: stand.told.append(f"kept for {s.name}"))
    away = Offload(nn.Module(), torch.device("cuda"), least=1, in_flight=2 * 400)
    away.device = CPU
    away.__enter__()
    sources = [torch.randn(100) for _ in range(3)]
    packed = [away._pack(t) for t in sources]
    out = ["side after compute", "on side"]
    assert stand.told == [*out, "event 1", *out, "event 2", *out, "event 3", "wait for event 1"]
    assert [t is s for (_, t), s in zip(away._leaving, sources[1:], strict=True)] == [True, True]
    stand.told.clear()
    away.__exit__(None, None, None)
    assert stand.told == ["wait for event 2", "wait for event 3"]
    assert not away._leaving
    stand.told.clear()
    assert torch.equal(away._unpack(packed[2]), sources[2])
    assert stand.told == ["on side", "event 4", "compute after event 4", "kept for compute",
                          "on side", "event 5", "on side", "event 6"]  # fmt: skip
    stand.told.clear()
    assert torch.equal(away._unpack(packed[1]), sources[1])
    assert stand.told == ["compute after event 5", "kept for compute"]


def test_a_run_on_the_cpu_has_nothing_to_offload_to():
    with pytest.raises(UserError, match="no such device") as error:
        train(adapted(), TOKENIZER, conversations(), LoopSpec(run=RunSpec(offload=True)), progress=False)
    assert "device cpu" in error.value.found
    assert "run.checkpointing=true" in error.value.next
    with pytest.raises(UserError):
        offload(nn.Module(), torch.device("meta"))


def test_a_run_is_bitwise_the_same_with_less_kept(monkeypatch):
    """The loop with offload (to the same memory, as far as a CPU goes) and with checkpointing, against the plain one."""
    samples, found, sent = encode_all(TOKENIZER, conversations(), 128), {}, []

    class Told(Offload):
        def __exit__(self, *error):
            super().__exit__(*error)
            sent.append(self.moved)

    monkeypatch.setattr("deltalab.train.loop.offload", lambda model, device: Told(model, device, least=256))
    for name, fields in {"plain": {}, "offload": {"offload": True}, "again": {"checkpointing": True}}.items():
        model = adapted()
        spec = LoopSpec(optim=OptimSpec(lr=5e-3, steps=4, batch=4, accumulate=2), run=RunSpec(**fields), eval=EvalSpec(fraction=0.2))  # fmt: skip
        losses = train(model, TOKENIZER, samples, spec, progress=False).losses
        found[name] = (losses, {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad})
        assert not model.is_gradient_checkpointing
    assert len(sent) == 8
    assert min(sent) > 0
    for name in ("offload", "again"):
        assert found[name][0] == found["plain"][0]
        for key, value in found["plain"][1].items():
            assert torch.equal(found[name][1][key], value), (name, key)


def kept_bytes(model, again):
    seen = {}

    def note(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = tokens(batch=2, length=64)
    with checkpointed(model, again), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model.train()(input_ids=ids, labels=ids, use_cache=False)
    return sum(seen.values()) - sum(p.numel() * 4 for p in model.parameters())


def test_checkpointing_keeps_less_and_is_switched_off_again():
    model = adapted(lambda: tiny_llama(layers=4))
    assert kept_bytes(model, True) < 0.5 * kept_bytes(model, False)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    with checkpointed(model, True):
        pass
    assert model.is_gradient_checkpointing
    with pytest.raises(UserError, match="Linear has no way to"), checkpointed(nn.Linear(2, 2), True):
        pass


def test_a_run_may_change_where_it_keeps_activations(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", probes=[At(5, interrupt)])
    run(tmp_path / "b", probes=[], run=RunSpec(checkpoint_every=3, checkpointing=True))
    adapters = [(tmp_path / x / "adapter/adapter_model.safetensors").read_bytes() for x in "ab"]
    assert adapters[0] == adapters[1]
    old, new = LoopSpec().plain(), LoopSpec(run=RunSpec(checkpointing=True, offload=True)).plain()
    assert changes(old, new) == []
    assert changes(old, LoopSpec(optim=OptimSpec(paged=8)).plain()) == [("optim.paged", None, 8)]
