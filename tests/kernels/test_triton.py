"""The Triton kernels against torch in fp64, on whole tensors: interpreted on a CPU, compiled where there is a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import transformers
from torch.nn import functional as F

import deltalab as dl
from deltalab.kernels import triton as twins
from deltalab.train.loss import nll_sum
from tests.helpers import ROOT, assert_close_by_norm, error_by_norm, tiny_llama, tokens

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
DTYPES = [
    (torch.float32, 2e-6),
    (torch.bfloat16, 8e-3),
    (torch.float16, 1e-3),
]  # the interpreter cuts 16-bit numbers off
dtypes = pytest.mark.parametrize(("dtype", "bound"), DTYPES, ids=[str(d)[6:] for d, _ in DTYPES])


def draw(*shape, dtype=torch.float32, spread=1.0):
    return (spread * torch.randn(shape)).to(DEVICE, dtype)


def grads(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def tiny_phi3():
    torch.manual_seed(0)
    config = transformers.Phi3Config(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=270,
                                     max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return transformers.Phi3ForCausalLM(config).requires_grad_(False)


class OnCuda(torch.Tensor):
    """A tensor that says it is on CUDA."""

    is_cuda = True


def test_they_are_for_cuda_alone_and_import_nothing_before(monkeypatch):
    assert not twins.available(torch.randn(3))
    for there in (True, False):
        monkeypatch.setattr(twins, "installed", lambda there=there: there)
        assert twins.available(torch.randn(3).as_subclass(OnCuda)) is there
    monkeypatch.setattr(twins, "installed", lambda: True)
    assert not twins.available(torch.randn(3))
    assert not twins.available(torch.randn(3).double().as_subclass(OnCuda))
    assert [twins.tile(n, 64) for n in (0, 1, 2, 3, 33, 64, 65, 1000)] == [1, 1, 2, 4, 64, 64, 64, 64]


def losses_in_fp64(z, targets, softcap, scale, smoothing):
    u = scale * z
    u = softcap * torch.tanh(u / softcap) if softcap else u
    return F.cross_entropy(u, targets, reduction="none", label_smoothing=smoothing)


@needs_triton
@dtypes
@pytest.mark.parametrize("v", [7, 64, 150])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "smoothing": 0.1}, {"scale": 0.25, "smoothing": 0.2}], ids=str
)
def test_losses_of_rows_and_their_gradients(dtype, bound, v, options, monkeypatch):
    """Vocabularies of less than a tile, of whole tiles, and with a last one that is short."""
    from deltalab.kernels.triton import cross_entropy
    from deltalab.kernels.triton.cross_entropy import row_losses

    monkeypatch.setattr(cross_entropy, "MOST", 32)
    z, targets, weights = draw(3, v, dtype=dtype, spread=4.0), torch.randint(0, v, (3,), device=DEVICE), draw(3)
    targets[0], targets[1] = 0, v - 1
    wide = z.double().requires_grad_()
    want = losses_in_fp64(
        wide, targets, options.get("softcap"), options.get("scale", 1.0), options.get("smoothing", 0.0)
    )
    before = z.clone()
    assert_close_by_norm(row_losses(z, targets, **options), want.detach().float(), 2e-6)
    assert torch.equal(z, before)
    found = row_losses(z, targets, weights, graded=True, **options)
    assert_close_by_norm(found, want.detach().float(), 2e-6)
    assert_close_by_norm(z.double(), grads((want * weights).sum(), wide)[0], bound)


@needs_triton
def test_losses_of_a_slice_of_extreme_and_of_no_logits():
    from deltalab.kernels.triton.cross_entropy import row_losses

    whole = draw(6, 50)
    rest, part = whole.clone(), whole[1:5, 8:40]
    targets = torch.randint(0, 32, (4,), device=DEVICE)
    wide = part.double().requires_grad_()
    want = F.cross_entropy(wide, targets, reduction="none")
    assert_close_by_norm(row_losses(part, targets, graded=True), want.detach().float(), 2e-6)
    assert_close_by_norm(part.double(), grads(want.sum(), wide)[0], 2e-6)
    rest[1:5, 8:40] = part
    assert torch.equal(whole, rest)  # what lies beside the slice is as it was

    large = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4], [float("-inf"), 1.0, 2.0]], device=DEVICE)
    at = torch.tensor([0, 1, 2], device=DEVICE)
    want = F.cross_entropy(large, at, reduction="none")
    found = row_losses(large, at, graded=True)
    torch.testing.assert_close(found, want)
    assert large.isfinite().all()
    assert row_losses(draw(0, 5), at[:0], graded=True).shape == (0,)


@needs_triton
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "label_smoothing": 0.1, "scale": 0.5}], ids=str)
def test_a_heads_loss_goes_to_them(monkeypatch, options):
    """The whole loss of a head, its gradients included, with the kernel in its place and without."""
    from deltalab.kernels.cross_entropy import linear_cross_entropy

    hidden, W = draw(9, 16).requires_grad_(), draw(50, 16).requires_grad_()
    targets = torch.randint(0, 50, (9,), device=DEVICE)
    targets[3] = -100
    found = []
    for there in (False, True):
        monkeypatch.setattr(twins, "available", lambda tensor, there=there: there)
        loss = linear_cross_entropy(hidden, W, targets, reduction="mean", chunk=4, **options)
        found.append((loss, *grads(loss, hidden, W)))
    for want, got in zip(*found, strict=True):
        assert_close_by_norm(got.detach(), want.detach(), 2e-6)


@needs_triton
@dtypes
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("shape", [(3, 75), (1, 3), (0, 8)], ids=str)
def test_swiglu_and_its_gradients(dtype, bound, halves, shape, monkeypatch):
    from deltalab.kernels.triton import swiglu as module
    from deltalab.kernels.triton.swiglu import swiglu, swiglu_back

    monkeypatch.setattr(module, "MOST", 32)
    both = draw(shape[0], 2 * shape[1], dtype=dtype, spread=3.0)
    gate, up = both.chunk(2, -1) if halves else (draw(*shape, dtype=dtype), draw(*shape, dtype=dtype))
    dh = draw(*shape, dtype=dtype)
    g, u = (t.double().requires_grad_() for t in (gate, up))
    h = F.silu(g) * u
    assert_close_by_norm(swiglu(gate, up).double(), h.detach(), bound)
    want = grads((h * dh.double()).sum(), g, u)
    found = swiglu_back(gate, up, dh, halves)
    assert [t.shape for t in found] == ([both.shape] if halves else [gate.shape, up.shape])
    for got, grad in zip(found[0].chunk(2, -1) if halves else found, want, strict=True):
        assert_close_by_norm(got.double(), grad, bound)


@needs_triton
@dtypes
@pytest.mark.parametrize(("m", "n"), [(3, 60), (11, 16), (0, 8)])
@pytest.mark.parametrize("plus", [None, 0.0, 1.0])
def test_rms_norm_and_its_gradients(dtype, bound, m, n, plus, monkeypatch):
    """plus None: a norm without a weight. 11 rows are more than there are programs in the backward."""
    from deltalab.kernels.triton import rms_norm as module
    from deltalab.kernels.triton.rms_norm import rms_norm, rms_norm_again, rms_norm_back

    monkeypatch.setattr(module, "PARTS", 4)
    x, dy, eps = draw(m, n, dtype=dtype), draw(m, n, dtype=dtype), 1e-5
    w = None if plus is None else draw(n)
    wide, weight = x.double().requires_grad_(), None if w is None else w.double().requires_grad_()
    want = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    want = want if weight is None else want * (weight + plus)
    y, scale = rms_norm(x, w, eps, plus or 0.0)
    assert y.dtype is dtype
    assert_close_by_norm(y.double(), want.detach(), bound)
    assert torch.equal(rms_norm_again(x, w, scale, plus or 0.0), y)
    loss = (want * dy.double()).sum()
    dx, dw = rms_norm_back(dy, x, w, scale, plus or 0.0, trained=w is not None)
    expected = grads(loss, wide) if weight is None else grads(loss, wide, weight)
    assert_close_by_norm(dx.double(), expected[0], bound)
    if weight is not None:
        assert_close_by_norm(dw.double(), expected[1], 2e-6)
    assert rms_norm_back(dy, x, w, scale, plus or 0.0)[1] is None


@needs_triton
def test_rms_norm_of_rows_that_lie_apart():
    from deltalab.kernels.triton.rms_norm import rms_norm, rms_norm_back

    x, dy, w = draw(5, 80)[:, :64], draw(5, 100)[:, 30:94], draw(64)
    y, scale = rms_norm(x, w, 1e-5)
    torch.testing.assert_close(y, F.rms_norm(x, (64,), w, 1e-5))
    dx, _ = rms_norm_back(dy, x, w, scale)
    torch.testing.assert_close(dx, rms_norm_back(dy.contiguous(), x.contiguous(), w, scale)[0])


@needs_triton
@dtypes
@pytest.mark.parametrize(("out", "n", "r"), [(65, 130, 4), (64, 64, 16), (3, 5, 1), (130, 70, 40)])
def test_squares_of_doras_rows(dtype, bound, out, n, r):
    """Against W + s B A formed in fp64. The bound is fp32's for every dtype: W is exact as it is."""
    from deltalab.kernels.triton.dora_norm import row_squares

    A, B, s = draw(r, n), draw(out, r), 0.7
    for W in (draw(out, n, dtype=dtype), draw(n, out, dtype=dtype).mT):
        want = (W.double() + s * B.double() @ A.double()).square().sum(-1)
        assert_close_by_norm(row_squares(W, A, B, s).double(), want, 1e-6)


@needs_triton
def test_squares_at_the_start_are_the_weights_own():
    from deltalab.kernels.triton.dora_norm import row_squares

    W, A = draw(70, 90), draw(8, 90)
    found = row_squares(W, A, torch.zeros(70, 8, device=DEVICE), 2.0)
    assert_close_by_norm(found.double(), W.double().square().sum(-1), 3e-7)


@needs_triton
@pytest.mark.parametrize("make", [tiny_llama, tiny_phi3], ids=["gated", "halves"])
def test_a_training_pass_goes_to_them(monkeypatch, make):
    """DoRA on every linear, norms that train and the loss: the gradients with all of them in place and with none."""
    model = dl.adapt(make(), [dl.DoRA(r=4, targets="all-linear"), dl.Train("norms")], seed=1).to(DEVICE).train()
    for name, p in model.named_parameters():
        if name.endswith("delta.B"):
            torch.nn.init.normal_(p, std=0.02)
    ids, found, used = tokens(batch=2, length=10).to(DEVICE), [], set()

    def counted(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (used.add(name), real(*a, **k))[1])

    for name, functions in {"cross_entropy": ["row_losses"], "swiglu": ["swiglu", "swiglu_back"], "dora_norm": ["row_squares"],
                            "rms_norm": ["rms_norm", "rms_norm_again", "rms_norm_back"]}.items():  # fmt: skip
        module = importlib.import_module(f"deltalab.kernels.triton.{name}")
        for function in functions:
            counted(module, function)
    for there in (False, True):
        monkeypatch.setattr(twins, "available", lambda tensor, there=there: there)
        loss = nll_sum(model, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found.append((loss, *grads(loss, *trained.values())))
        assert there or not used
    for name, want, got in zip(["loss", *trained], *found, strict=True):
        assert error_by_norm(got.detach(), want.detach()) < 2e-5, name
    assert used == {"row_losses", "swiglu", "swiglu_back", "row_squares", "rms_norm", "rms_norm_again", "rms_norm_back"}


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_for_gpus(tmp_path):
    """To machine code of two generations, which needs no GPU; in a process of its own, where nothing is interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.compile_triton"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 2 * 2 * (2 + 1 + 1 + 2 * 2 + 2)
