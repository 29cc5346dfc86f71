"""Linear maps, MLPs and norms of the kernels beside their plain references: values and gradients of whole tensors."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deltalab.kernels.dropout import draw, dropout
from deltalab.kernels.linear import LowRank, Map, linears, plain_linears
from deltalab.kernels.mlp import ACTIVATIONS, mlp, plain_mlp
from deltalab.kernels.norm import Norm, norm, plain_norm

WIDTH, MLP = 12, 16
KINDS = [Norm(1e-6), Norm(1e-5, centred=True), Norm(1e-6, plus=1.0)]
FORMS = [("gated", 2, MLP), ("halves", 1, MLP // 2), ("plain", 1, MLP)]


def random(*shape, dtype=torch.float64, seed=0, grad=False):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return made.to(dtype).requires_grad_(grad)


def one(out, in_, *, p=0.0, stretch=False, bias=True, low=True, dtype=torch.float64, master=None, seed=0):
    W, master = random(out, in_, dtype=dtype, seed=seed) / in_**0.5, master or dtype
    change = None
    if low:
        rows = (random(out, dtype=master, seed=seed).abs() + 0.5).requires_grad_() if stretch else None
        A, B = (random(*s, dtype=master, seed=seed, grad=True) for s in ((3, in_), (out, 3)))
        change = LowRank(A, B, 0.7, p, rows)
    return Map(lambda wanted: W.to(wanted), random(out, dtype=dtype, seed=seed + 1) if bias else None, change)


def trained(maps):
    return [t for m in maps if m.low for t in m.low if isinstance(t, Tensor)]


def results(function, x, parameters, seed=1):
    """The outputs and the gradients of x and the parameters, for one random direction of the outputs."""
    torch.manual_seed(seed)
    outputs = function(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    along = sum((y * random(*y.shape, seed=i).to(y.dtype)).sum() for i, y in enumerate(outputs))
    wanted = [t for t in (x, *parameters) if t.requires_grad]
    return [*outputs, *torch.autograd.grad(along, wanted)]


def assert_alike(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype is b.dtype
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


def maps_and_mlp(p, stretch, **options):
    """Three maps of one input, one without a change; and an MLP of each form and activation."""
    maps = [one(8, WIDTH, p=p, stretch=stretch, **options), one(6, WIDTH, p=p, bias=False, **options), one(4, WIDTH, low=False, **options)]  # fmt: skip
    yield lambda x: linears(x, maps), lambda x: plain_linears(x, maps), trained(maps)
    for form, count, inner in FORMS:
        first = [one(MLP, WIDTH, p=p, stretch=stretch, seed=i, **options) for i in range(count)]
        down = one(WIDTH, inner, p=p, stretch=stretch, **options)
        for act in ACTIVATIONS:
            call = (first, down, act, form)
            yield lambda x, call=call: mlp(x, *call), lambda x, call=call: plain_mlp(x, *call), trained([*first, down])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("stretch", [False, True])
def test_values_and_gradients_are_the_plain_ones(p, stretch):
    x = random(2, 5, WIDTH, grad=True)
    for ours, plain, parameters in maps_and_mlp(p, stretch):
        assert_alike(results(ours, x, parameters), results(plain, x, parameters), 1e-12)


@pytest.mark.parametrize("x", [random(5, WIDTH, 2, grad=True).transpose(1, 2), random(0, WIDTH, grad=True), random(WIDTH, grad=True)],
                         ids=["not contiguous", "no token", "one token"])  # fmt: skip
def test_inputs_of_any_layout(x):
    x = x.detach().requires_grad_()
    for ours, plain, parameters in maps_and_mlp(0.0, True):
        assert_alike(results(ours, x, parameters), results(plain, x, parameters), 1e-12)


def test_gradients_are_those_of_finite_differences():
    x = random(3, WIDTH, grad=True)
    for ours, _, parameters in maps_and_mlp(0.0, True):
        if parameters:
            function = ours
            assert torch.autograd.gradcheck(lambda *t, f=function: f(t[0]), (x, *parameters), fast_mode=True)


def test_masters_stay_in_fp32_over_a_base_in_bf16():
    """The error against fp64 is no larger than that of torch's own operations in bf16."""
    for ours, plain, exact in zip(*(maps_and_mlp(0.0, True, **o) for o in (
        {"dtype": torch.bfloat16, "master": torch.float32}, {"dtype": torch.bfloat16, "master": torch.float32}, {}
    )), strict=True):  # fmt: skip
        x = random(2, 50, WIDTH, dtype=torch.bfloat16, grad=True)
        want = results(exact[1], x.double().detach().requires_grad_(), exact[2])
        got, theirs = results(ours[0], x, ours[2]), results(plain[1], x, plain[2])
        assert [g.dtype for g in got] == [t.dtype for t in theirs]
        for g, t, w in zip(got, theirs, want, strict=True):
            assert (g.double() - w).norm() <= max(1.5 * (t.double() - w).norm(), 1e-2 * w.norm())


def test_under_autocast_the_dtype_is_autocasts():
    for ours, plain, parameters in maps_and_mlp(0.0, False, dtype=torch.float32):
        x = random(2, 5, WIDTH, dtype=torch.float32, grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            got = results(ours, x, parameters)
            want = results(lambda x, f=plain: f(x.bfloat16()), x, parameters)
        assert_alike(got, want, 2e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_entries_again(reentrant):
    x = random(2, 5, WIDTH, grad=True)
    for ours, _, parameters in maps_and_mlp(0.3, False):
        outputs = []
        for function in (ours, lambda x, f=ours: checkpoint(f, x, use_reentrant=reentrant)):
            for t in (x, *parameters):
                t.grad = None
            torch.manual_seed(3)
            y = function(x)
            sum((part * random(*part.shape)).sum() for part in (y if isinstance(y, tuple) else (y,))).backward()
            outputs.append([t.grad.clone() for t in (x, *parameters)])
        assert_alike(outputs[1], outputs[0], 1e-14)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norms(kind, dtype):
    x, w = (3 * random(2, 5, WIDTH) + 1).to(dtype).requires_grad_(), random(WIDTH, dtype=dtype, grad=True)
    b = random(WIDTH, dtype=dtype, seed=4, grad=True) if kind.centred else None
    parameters = [w] if b is None else [w, b]
    got = results(lambda x: norm(x, w, b, kind)[0], x, parameters)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    assert_alike(got, results(lambda x: plain_norm(x, w, b, kind), x, parameters), tolerance)
    y, made = norm(x, w, b, kind)
    assert torch.equal(made.again(made.tensors), y)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_input_that_a_norm_made_is_made_again(kind):
    """Neither the maps nor the MLP keep it."""
    x, w = random(2, 5, WIDTH, grad=True), random(WIDTH, grad=True)
    maps = [one(8, WIDTH, p=0.2), one(6, WIDTH)]
    first, down = [one(MLP, WIDTH), one(MLP, WIDTH, seed=1)], one(WIDTH, MLP)

    def ours(x):
        y, made = norm(x, w, None, kind)
        return (*linears(y, maps, made), mlp(y, first, down, "silu", "gated", made))

    def plain(x):
        y = plain_norm(x, w, None, kind)
        return (*plain_linears(y, maps), plain_mlp(y, first, down, "silu", "gated"))

    parameters = [w, *trained([*maps, *first, down])]
    assert_alike(results(ours, x, parameters), results(plain, x, parameters), 1e-12)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, made = norm(x, w, None, kind)
        linears(y, maps, made)
        mlp(y, first, down, "silu", "gated", made)
    assert y.data_ptr() not in {t.data_ptr() for t in kept}


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_gaps_drop_each_entry_with_probability_p(p):
    """Counts, and pairs of neighbours, of many draws: as independent ones, to five standard deviations."""
    n, draws = 997, 400
    torch.manual_seed(0)
    hits = torch.zeros(draws, n, dtype=torch.bool)
    for row in hits:
        row[draw(torch.empty(n), p).at.long()] = True
    total, pairs = int(hits.sum()), int((hits[:, 1:] & hits[:, :-1]).sum())
    assert abs(total - n * draws * p) < 5 * (n * draws * p * (1 - p)) ** 0.5
    assert abs(pairs - (n - 1) * draws * p * p) < 5 * ((n - 1) * draws * p * p * (1 + 2 * p)) ** 0.5
    each = hits.sum(0)
    assert (each - draws * p).abs().max() < 5 * (draws * p * (1 - p)) ** 0.5 + 1


def test_dropout_is_torchs_with_its_own_entries():
    x = random(7, 11, grad=True)
    torch.manual_seed(5)
    at = draw(x, 0.4).at.long()
    keep = torch.ones(77, dtype=torch.float64).index_fill(0, at, 0).view(7, 11) / 0.6
    torch.manual_seed(5)
    y = dropout(x, 0.4)
    (grad,) = torch.autograd.grad((y * y.detach()).sum(), x)
    assert torch.allclose(y, x * keep)
    assert torch.allclose(grad, y * keep)
    assert dropout(x, 0.0) is x
    assert dropout(x[:0], 0.4).shape == (0, 11)
