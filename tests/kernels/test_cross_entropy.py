"""Cross-entropy over a head in chunks against torch's own over all logits: values, gradients, what is kept, what is read."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deltalab.kernels import cross_entropy
from deltalab.kernels.cross_entropy import IGNORED, linear_cross_entropy, plain_linear_cross_entropy
from tests.helpers import assert_close_by_norm, error_by_norm

N, D, V = 23, 8, 37
FORMS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "smoothed": {"label_smoothing": 0.1},
    "all": {"softcap": 2.0, "scale": 1.7, "label_smoothing": 0.2},
}
REDUCTIONS = ("sum", "mean", "none")


def place(*, dtype=torch.float64, n=N, d=D, v=V, bias=True, masked=0.4, seed=0, trains=True):
    """hidden, W, targets, bias; logits of a few units."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    W = torch.randn(v, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_(trains)
    b = torch.randn(v, generator=g, dtype=torch.float64).to(dtype).requires_grad_(trains) if bias else None
    targets = torch.randint(0, v, (n,), generator=g)
    targets[torch.rand(n, generator=g) < masked] = IGNORED
    return hidden, W, targets, b


def gradients(loss, *tensors, weight=0.15):
    """Those of `weight` times a sum, with weights that differ from row to row."""
    weights = torch.linspace(1, 3, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    return torch.autograd.grad(
        (loss * weights * weight).sum(), [t for t in tensors if t is not None and t.requires_grad]
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("bias", "masked", "chunk"), [(True, 0.4, 5), (False, 0.0, None), (True, 0.0, 4)])
def test_values_and_gradients_are_torchs(form, reduction, bias, masked, chunk, monkeypatch):
    monkeypatch.setitem(cross_entropy.BLOCK, "cpu", 3 * 4 * V)  # three rows at a time
    hidden, W, targets, b = place(bias=bias, masked=masked)
    got = linear_cross_entropy(hidden, W, targets, b, reduction=reduction, chunk=chunk, **FORMS[form])
    want = plain_linear_cross_entropy(hidden, W, targets, b, reduction=reduction, **FORMS[form])
    assert got.dtype == want.dtype == torch.float64
    assert_close_by_norm(got, want, 1e-12)
    pairs = zip(gradients(got, hidden, W, b), gradients(want, hidden, W, b), strict=True)
    for ours, torchs in pairs:
        assert_close_by_norm(ours, torchs, 1e-12)


def test_the_reference_is_torchs_cross_entropy():
    hidden, W, targets, b = place()
    want = F.cross_entropy(F.linear(hidden, W, b), targets, reduction="sum")
    assert_close_by_norm(plain_linear_cross_entropy(hidden, W, targets, b), want, 1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_finite_differences(form):
    hidden, W, targets, b = place(n=6, d=3, v=5)
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(
            lambda h, w, c, reduction=reduction: linear_cross_entropy(
                h, w, targets, c, reduction=reduction, chunk=4, **FORMS[form]
            ),
            (hidden, W, b),
        )


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_the_gradients_that_are_wanted(wanted, monkeypatch):
    """A frozen head makes no gradient of its weight, and hidden states that need none no product for them."""
    hidden, W, targets, b = place()
    for tensor, flag in zip((hidden, W, b), wanted, strict=True):
        tensor.requires_grad_(flag)
    products = []
    mm, band = torch.mm, cross_entropy._add_product
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (products.append("hidden"), mm(*a, **k))[1])
    monkeypatch.setattr(cross_entropy, "_add_product", lambda *a: (products.append("W"), band(*a))[1])
    got = linear_cross_entropy(hidden, W, targets, b)
    assert set(products) == {name for name, flag in zip(("hidden", "W"), wanted, strict=False) if flag}
    assert got.requires_grad == any(wanted)
    if any(wanted):
        want = plain_linear_cross_entropy(hidden, W, targets, b)
        for ours, torchs in zip(gradients(got, hidden, W, b), gradients(want, hidden, W, b), strict=True):
            assert_close_by_norm(ours, torchs, 1e-12)
    products.clear()
    with torch.no_grad():
        assert_close_by_norm(linear_cross_entropy(hidden, W, targets, b), got, 1e-14)
    assert not products


@pytest.mark.parametrize(
    ("reduction", "weight", "chunk", "again"),
    [("sum", 1, None, (0, 0, 0)), ("mean", 1, 50, (0, 2, 0)), ("sum", 0.3, 50, (1, 3, 1))],
)
def test_bf16_is_no_further_from_fp64_than_torchs_own_path(reduction, weight, chunk, again):
    """Of the same rounded tensors: loss, and the gradients of hidden states, weight and bias.

    again: how often more than torch's each gradient is rounded. Once if it is multiplied afterwards by what is no power of
    two; of the weight, a sum over chunks, twice: each product on its own, and the sum.
    """
    ours, torchs = [], []
    for seed in range(4):
        hidden, W, targets, b = place(dtype=torch.bfloat16, n=160, d=64, v=500, seed=seed)
        W.data.mul_(0.3)
        exact = [t.detach().double().requires_grad_() for t in (hidden, W, b)]
        want = plain_linear_cross_entropy(exact[0], exact[1], targets, exact[2], reduction=reduction)
        wants = (want, *gradients(want, *exact, weight=weight))
        for errors, function, options in ((ours, linear_cross_entropy, {"chunk": chunk}), (torchs, plain_linear_cross_entropy, {})):  # fmt: skip
            loss = function(hidden, W, targets, b, reduction=reduction, **options)
            assert loss.dtype == torch.float32
            found = (loss, *gradients(loss, hidden, W, b, weight=weight))
            errors.append([error_by_norm(g, w) for g, w in zip(found, wants, strict=True)])
    mean, reference = torch.tensor(ours).mean(0), torch.tensor(torchs).mean(0)
    bound = (reference.square() + torch.tensor([0, *again]) * (2**-9) ** 2 / 3).sqrt()
    assert (mean <= bound * torch.tensor([1.05, 1.02, 1.02, 1.02])).all(), (mean, reference)


def test_fp32():
    hidden, W, targets, b = place(dtype=torch.float32, n=160, d=64, v=500)
    exact = [t.detach().double().requires_grad_() for t in (hidden, W, b)]
    got, want = linear_cross_entropy(hidden, W, targets, b, chunk=50), plain_linear_cross_entropy(exact[0], exact[1], targets, exact[2])  # fmt: skip
    assert_close_by_norm(got, want, 1e-6)
    for g, w in zip(gradients(got, hidden, W, b), gradients(want, *exact), strict=True):
        assert g.dtype == torch.float32
        assert_close_by_norm(g, w, 1e-6)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")], ids=str)
def test_autocast_casts_as_a_linear_does(dtypes):
    hidden, W, targets, b = place(dtype=torch.float32, n=60, d=32, v=100)
    hidden, W, b = (
        t.detach().to(getattr(torch, dtype)).requires_grad_()
        for t, dtype in zip((hidden, W, b), (*dtypes, dtypes[1]), strict=True)
    )
    results = []
    for function in (linear_cross_entropy, plain_linear_cross_entropy):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(hidden, W, targets, b)
            results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, W, b))))  # backward under it too
    (got, *ours), (want, *torchs) = results
    assert_close_by_norm(got, want, 1e-5)
    for g, w, t in zip(ours, torchs, (hidden, W, b), strict=True):
        assert g.dtype == t.dtype
        assert_close_by_norm(g, w, 2e-2)


def test_nothing_of_the_vocabularys_width_is_kept():
    """Of a frozen head: one row a counted row, in the products' dtype."""
    hidden, W, targets, _ = place(dtype=torch.bfloat16, n=64, d=16, v=4096, bias=False, trains=False)
    kept = []
    with saved_tensors_hooks(lambda t: (kept.append((tuple(t.shape), t.dtype)), t)[1], lambda t: t):
        linear_cross_entropy(hidden, W, targets)
    counted = int((targets != IGNORED).sum())
    assert sorted(kept) == sorted([((counted, 16), torch.bfloat16), ((counted,), torch.int64)])


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.most = max(self.most, out.numel())
            return out

    hidden, W, targets, b = place(dtype=torch.float32, n=200, d=4, v=50, masked=0.0)
    with Largest() as seen:
        linear_cross_entropy(hidden, W, targets, b, chunk=20).backward()
    assert seen.most == 20 * 50


def test_ignored_rows_never_reach_the_product():
    hidden, W, targets, b = place()
    with torch.no_grad():
        hidden[targets == IGNORED] = float("nan")
    loss = linear_cross_entropy(hidden, W, targets, b, reduction="mean")
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(W.grad.isfinite().all())
    assert (hidden.grad[targets == IGNORED] == 0).all()
    other = linear_cross_entropy(hidden, W, targets.where(targets != IGNORED, -1), b, ignore_index=-1, reduction="mean")
    assert torch.equal(loss, other)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n", [0, 5])
def test_no_counted_row(n, reduction):
    hidden, W, _, b = place(n=n)
    targets = torch.full((n,), IGNORED)
    got = linear_cross_entropy(hidden, W, targets, b, reduction=reduction)
    want = plain_linear_cross_entropy(hidden, W, targets, b, reduction=reduction)
    assert torch.equal(got, want) or (got.isnan().all() and want.isnan().all())
    if reduction != "mean":
        for gradient in torch.autograd.grad(got.sum(), (hidden, W, b)):
            assert not gradient.any()


def test_strides_do_not_matter():
    hidden, W, targets, b = place()
    want = gradients(linear_cross_entropy(hidden, W, targets, b), hidden, W, b)
    odd = (hidden.detach().T.contiguous().T, W.detach().repeat(1, 2)[:, :D], b.detach().repeat_interleave(2)[::2])
    assert not any(t.is_contiguous() for t in odd)
    odd = [t.requires_grad_() for t in odd]
    strided = targets.repeat_interleave(3)[::3]
    for got, wanted in zip(gradients(linear_cross_entropy(odd[0], odd[1], strided, odd[2]), *odd), want, strict=True):
        assert_close_by_norm(got, wanted, 1e-14)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_checkpointing_and_accumulation(reduction, reentrant):
    """Two pieces, each within a checkpoint, into the same gradients of a tied embedding."""
    grads = []
    for kept in (False, True):
        torch.manual_seed(0)
        embedding, mix = nn.Embedding(V, D).double(), nn.Linear(D, D).double()
        for piece in range(2):
            ids = torch.arange(9) + 9 * piece

            def loss(x, ids=ids, embedding=embedding, mix=mix):
                return linear_cross_entropy(mix(x).tanh(), embedding.weight, (ids + 1) % V, reduction=reduction).sum()

            x = embedding(ids)
            (checkpoint(loss, x, use_reentrant=reentrant) if kept else loss(x)).backward()
        grads.append([p.grad for p in (embedding.weight, *mix.parameters())])
    for plain, with_checkpoint in zip(*grads, strict=True):
        assert_close_by_norm(with_checkpoint, plain, 1e-14)


def test_a_second_backward_and_the_tensors_that_were_given():
    hidden, W, targets, b = place()
    before = [t.detach().clone() for t in (hidden, W, b)]
    loss = linear_cross_entropy(hidden, W, targets, b)
    first = torch.autograd.grad(loss, (hidden, W, b), retain_graph=True)
    second = torch.autograd.grad(loss * 2, (hidden, W, b))
    for once, twice in zip(first, second, strict=True):
        assert torch.equal(2 * once, twice)
    assert all(torch.equal(t, was) for t, was in zip((hidden, W, b), before, strict=True))


def test_large_logits_stay_finite():
    """A target's probability that underflows still has its loss."""
    W = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    hidden = torch.tensor([[400.0], [-300.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, W, torch.tensor([1, 1]), reduction="none")
    assert loss.tolist() == [800.0, 0.0]
    loss.sum().backward()
    assert hidden.grad.tolist() == [[2.0], [0.0]]


def test_small_losses_of_large_logits_are_exact():
    W = torch.tensor([[1.0], [0.0]])
    hidden = torch.full((1, 1), 4096.0)
    near = torch.tensor([4096.0 - 2.0])
    loss = linear_cross_entropy(hidden, W, torch.tensor([0]), torch.cat([torch.zeros(1), near]))
    assert float(loss) == pytest.approx(float(F.cross_entropy(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))), rel=1e-6)
