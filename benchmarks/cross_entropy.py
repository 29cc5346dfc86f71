"""Loss over a language model's output layer, forward and backward: only counted rows, in chunks, against all logits.

    .venv/bin/python -m benchmarks cross_entropy

torch is F.cross_entropy(F.linear(h, W).float()) over all rows, `chosen` the same of the counted rows of the logits. The limit
are the products that nobody can do without, of the counted rows: h Wᵀ, its gradient times W, and Gᵀ h where W trains.
Peak memory is what one step adds, in a process of its own.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Asked, Check, Row, apart, compared, exactly, in_child, peak_above, timed
from deltalab.kernels.cross_entropy import IGNORED, linear_cross_entropy

CASES = [(4096, 512, 1024), (32000, 512, 400), (32000, 1024, 1024), (128256, 512, 400), (128256, 1024, 1024)]
"""Vocabulary, width, rows."""
QUICK = [(1000, 64, 128)]
KINDS = [(0.0, "bfloat16", False), (0.6, "bfloat16", False), (0.0, "float32", False), (0.6, "float32", False),
         (0.6, "bfloat16", True)]  # fmt: skip
"""Share of ignored rows, dtype, whether W trains."""
ROUNDS, PARITY, HALF = 7, 1.0, 2.0

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def torchs(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    z = F.linear(h, W)
    return F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), targets, reduction="sum")


def chosen(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    """As a training loop does that masks the logits."""
    counted = targets != IGNORED
    return F.cross_entropy(F.linear(h, W)[counted].float(), targets[counted], reduction="sum")


WAYS: dict[str, Loss] = {"ours": linear_cross_entropy, "torch": torchs, "chosen": chosen}


def tensors(v: int, d: int, n: int, masked: float, dtype: str, trains: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two units; the same each time."""
    torch.manual_seed(0)
    h = torch.randn(n, d).to(getattr(torch, dtype)).requires_grad_()
    W = torch.empty(v, d, dtype=h.dtype).normal_(std=2 / d**0.5).requires_grad_(trains)
    targets = torch.randint(0, v, (n,))
    targets[torch.rand(n) < masked] = IGNORED
    return h, W, targets


def step(loss: Loss, h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    """The gradient of h. Divided as in a training step."""
    h.grad = W.grad = None
    (loss(h, W, targets) / 37).backward()  # type: ignore[no-untyped-call]
    assert h.grad is not None
    return h.grad


def products(h: Tensor, W: Tensor, targets: Tensor) -> None:
    with torch.no_grad():
        rows = h[targets != IGNORED]
        z = rows @ W.mT
        z @ W
        if W.requires_grad:
            z.mT @ rows


def peak(way: str, v: int, d: int, n: int, masked: float, dtype: str, trains: bool) -> int:
    """Bytes; in a process of its own."""
    h, W, targets = tensors(v, d, n, masked, dtype, trains)
    step(WAYS[way], h[:2].detach().requires_grad_(), W[:64].detach(), targets[:2] % 64)
    return peak_above(lambda: step(WAYS[way], h, W, targets))


def errors(h: Tensor, W: Tensor, targets: Tensor) -> dict[str, float]:
    """Of the gradient of h against fp64's, for the first rows."""
    few, at = h[:128].detach(), targets[:128]
    exact = step(torchs, few.double().requires_grad_(), W.detach().double(), at)
    return {name: apart(step(loss, few.clone().requires_grad_(), W.detach(), at), exact) for name, loss in WAYS.items()}


def rows(asked: Asked) -> Iterator[Row]:
    for shape in QUICK if asked.quick else CASES:
        for masked, dtype, trains in KINDS:
            case = (*shape, masked, dtype, trains)
            setting = f"{shape[0]} tokens, width {shape[1]}, {shape[2]} rows, {masked:.0%} masked, {dtype}, {'trained' if trains else 'frozen'}"  # fmt: skip
            if asked.wants("cross-entropy", setting):
                yield from of(case, setting, asked)


def of(case: tuple[int, int, int, float, str, bool], setting: str, asked: Asked) -> Iterator[Row]:
    """The rows of one case."""
    given = tensors(*case)
    error = errors(*given)
    # a gradient that is divided afterwards is rounded once more
    checks = [Check("gradient from fp64's", error["ours"], 1.2 * error["torch"])]
    sides: dict[str, Callable[[], object]] = {name: lambda loss=loss: step(loss, *given) for name, loss in WAYS.items()}  # type: ignore[misc]
    sides["limit"] = lambda: products(*given)
    seconds = timed(sides, asked.turns(ROUNDS))
    yield compared("cross-entropy", setting, seconds, "torch", "ours", target=HALF if case[3] else PARITY, checks=checks)  # fmt: skip
    yield compared("cross-entropy", setting, seconds, "chosen", "ours", checks=checks)
    yield compared("cross-entropy", setting, seconds, "ours", "limit", direction="at most")
    mib = {name: in_child(peak, name, *case, threads=asked.threads) / 2**20 for name in WAYS}
    yield Row("cross-entropy, peak memory", setting, "ours / torch", exactly(mib["ours"], mib["torch"]), mib, "MiB", direction="at most")  # fmt: skip
