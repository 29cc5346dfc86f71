"""Loss over a language model's output layer, forward and backward, beside torch's own over all logits.

    .venv/bin/python -m benchmarks.cross_entropy                 # frozen layer, bf16 and fp32; some minutes
    .venv/bin/python -m benchmarks.cross_entropy --trained       # the layer's weight trains too
    .venv/bin/python -m benchmarks.cross_entropy --json FILE     # the rows

Three ways, that take turns in one process; the same loss and gradients, compared before the first round.
ours      linear_cross_entropy: only counted rows, in chunks
torch     F.cross_entropy(F.linear(h, W).float()), all rows, the ignored ones left to it
chosen    the same of the counted rows of the logits: what nll_sum did before
limit     the products that nobody can do without, of the counted rows: h Wᵀ, its gradient times W (and Gᵀ h)
Times are of the process's own time on one thread, ratios medians over rounds of two calls of the same round. memory: what
the peak of resident memory rises by in a process of its own. error: of the gradient of h against fp64's, by norm.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltalab.kernels.cross_entropy import IGNORED, linear_cross_entropy

CASES = [(4096, 512, 1024), (32000, 512, 400), (32000, 1024, 1024), (128256, 512, 400), (128256, 1024, 1024)]
"""Vocabulary, width, rows."""
MASKED = (0.0, 0.6)
DTYPES = ("bfloat16", "float32")
ROUNDS = 5

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, W).float(), targets, reduction="sum")


def chosen(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    counted = targets != IGNORED
    return F.cross_entropy(F.linear(h, W)[counted].float(), targets[counted], reduction="sum")


WAYS: dict[str, Loss] = {"ours": linear_cross_entropy, "torch": plain, "chosen": chosen}


def tensors(v: int, d: int, n: int, masked: float, dtype: str, trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two units; the same each time."""
    torch.manual_seed(0)
    h = torch.randn(n, d).to(getattr(torch, dtype)).requires_grad_()
    W = torch.empty(v, d, dtype=h.dtype).normal_(std=2 / d**0.5).requires_grad_(trained)
    targets = torch.randint(0, v, (n,))
    targets[torch.rand(n) < masked] = IGNORED
    return h, W, targets


def step(loss: Loss, h: Tensor, W: Tensor, targets: Tensor) -> None:
    """As a training step that divides by the number of counted tokens."""
    h.grad = W.grad = None
    (loss(h, W, targets) / 37).backward()


def products(h: Tensor, W: Tensor, targets: Tensor) -> None:
    with torch.no_grad():
        rows = h[targets != IGNORED]
        z = rows @ W.mT
        z @ W
        if W.requires_grad:
            z.mT @ rows


def timed(h: Tensor, W: Tensor, targets: Tensor) -> dict[str, float]:
    """Milliseconds of each way and of the limit, and the ratios to ours."""
    calls: dict[str, Callable[[], None]] = {
        name: lambda loss=loss: step(loss, h, W, targets)  # type: ignore[misc]
        for name, loss in WAYS.items()
    }
    calls["limit"] = lambda: products(h, W, targets)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if number:  # the first warms up
                taken[name].append(1e3 * (time.process_time() - began))
    ratios = {
        f"{name}/ours": statistics.median(a / b for a, b in zip(taken[name], taken["ours"], strict=True))
        for name in calls if name != "ours"
    }  # fmt: skip
    return {name: statistics.median(times) for name, times in taken.items()} | ratios


def errors(h: Tensor, W: Tensor, targets: Tensor) -> dict[str, float]:
    """Of the gradient of h, for the rows of a few hundred tokens."""
    few = [t[:256] for t in (h.detach(), targets)]
    exact = few[0].double().requires_grad_()
    step(plain_double, exact, W.detach().double(), few[1])
    assert exact.grad is not None
    found = {}
    for name, loss in WAYS.items():
        mine = few[0].clone().requires_grad_()
        step(loss, mine, W.detach(), few[1])
        assert mine.grad is not None
        found[name] = float((mine.grad.double() - exact.grad).norm() / exact.grad.norm())
    return found


def plain_double(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, W), targets, reduction="sum")


def memory(way: str, *case: Any) -> float:
    """MiB that one step adds to a process's peak."""
    arguments = [sys.executable, "-m", "benchmarks.cross_entropy", "--peak", way, *map(str, case)]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def peak(way: str, v: str, d: str, n: str, masked: str, dtype: str, trained: str) -> float:
    """The same in this process."""
    h, W, targets = tensors(int(v), int(d), int(n), float(masked), dtype, trained == "True")
    step(WAYS[way], h[:2].detach().requires_grad_(), W[:64].detach(), targets[:2] % 64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = resident()
    step(WAYS[way], h, W, targets)
    return resident() - before


def resident() -> float:
    """The peak of resident memory in MiB, on Linux. `getrusage` would count the process that started this one."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(peak(*options.peak))
        return
    rows = []
    print("| V, d, rows | masked | dtype | ours ms | torch/ours | chosen/ours | limit/ours | MiB ours, torch | error ours, torch |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for (v, d, n), masked, dtype in ((c, m, t) for c in CASES for m in MASKED for t in DTYPES):
        case = (v, d, n, masked, dtype, options.trained)
        given = tensors(*case)
        e, t = errors(*given), timed(*given)
        del given
        mib = {way: memory(way, *case) for way in WAYS}
        rows.append({"case": case, "ms": t, "MiB": mib, "error": e})
        print(f"| {v}, {d}, {n} | {masked:.0%} | {dtype} | {t['ours']:.0f} | {t['torch/ours']:.2f} | {t['chosen/ours']:.2f} | {t['limit/ours']:.2f} "
              f"| {mib['ours']:.0f}, {mib['torch']:.0f} | {e['ours']:.2e}, {e['torch']:.2e} |", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
