"""A training step on a GPU beside peft: LoRA, QLoRA and DoRA on random weights of Llama-3.2-1B's and Llama-3.1-8B's shapes.

    .venv/bin/python -m benchmarks gpu --threads 1         # every row, to the results; some minutes and 60 GiB of device memory for 8B
    .venv/bin/python -m benchmarks.gpu --models 1B --methods lora dora --json gpu.json
    .venv/bin/python -m benchmarks.gpu --tiny              # every line on the CPU, at shapes whose figures mean nothing

bfloat16, r 8 on every linear of the blocks, fused AdamW, no dropout. The sides of a row get the same base, the same A and B
(B is not zero) and the same tokens, and say the loss of their first step and the norm of its gradients, so that a ratio
is one of equal mathematics. Each is built, measured and let go before the next, for the sake of memory: tokens/s is the
median of its steps, the peak is `torch.cuda.max_memory_allocated` from before the first of them, model included.
A side that cannot run says why and the others go on.
"""

import argparse
import gc
import json
import math
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import deltalab as dl
from benchmarks import harness
from deltalab.quant import nf4
from deltalab.quant.nf4_linear import NF4Linear
from deltalab.train.loss import nll_sum
from deltalab.train.memory import LEAST, Offload

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 384, "tie_word_embeddings": True},
}  # fmt: skip
METHODS = ("lora", "qlora", "dora")
SIDES = ("peft", "peft, compiled", "deltalab", "deltalab, plain", "deltalab, offload")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
R, ALPHA, LR = 8, 16.0, 1e-4


@dataclass(frozen=True)
class Setting:
    """What is measured: sequences of so many tokens each, in a dtype on a device."""

    device: torch.device
    dtype: torch.dtype
    sequences: int
    tokens: int
    steps: int
    warm_up: int
    backend: str
    """Of torch.compile."""


@dataclass(frozen=True)
class Row:
    """One side of one method on one model. tokens_per_second, peak_gib: None where they were not found."""

    model: str
    method: str
    side: str
    tokens_per_second: float | None = None
    milliseconds: float | None = None
    peak_gib: float | None = None
    loss: float | None = None
    gradient: float | None = None
    failed: str | None = None


def base(shape: str, setting: Setting) -> transformers.PreTrainedModel:
    """A Llama of random weights, the same at every call, made where it is to be."""
    longest = max(setting.tokens, 128)
    config = transformers.LlamaConfig(
        **SHAPES[shape], max_position_embeddings=longest, rope_theta=500000.0, use_cache=False
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting.dtype)
    try:
        with torch.device(setting.device):
            torch.manual_seed(0)
            return transformers.LlamaForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Each linear of the blocks gives way to what is made of it."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name.endswith(TARGETS):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, make(linear))


def of_bitsandbytes(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    W = linear.weight
    made = bnb.nn.Linear4bit(W.shape[1], W.shape[0], bias=False, compute_dtype=W.dtype, quant_type="nf4", compress_statistics=True)  # fmt: skip
    made.weight = bnb.nn.Params4bit(W.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made)  # fmt: skip
    return made.to(W.device)


def of_ours(linear: nn.Linear) -> nn.Module:
    return NF4Linear(nf4.quantise(linear.weight), None, linear.weight.dtype)


def by_peft(model: nn.Module, method: str) -> nn.Module:
    if method == "qlora":
        replaced(model, of_bitsandbytes)
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=list(TARGETS), use_dora=method == "dora", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def by_deltalab(model: nn.Module, method: str, kernels: str) -> nn.Module:
    if method == "qlora":
        replaced(model, of_ours)
    delta = dl.DoRA if method == "dora" else dl.LoRA
    return dl.adapt(model, delta(r=R, alpha=ALPHA, targets="all-linear"), kernels=kernels)


def fill(model: nn.Module) -> None:
    """A and B of each place, of the place's own seed: equal on all sides."""
    for name, p in model.named_parameters():
        which = re.search(r"layers\.(\d+)\.\w+\.(\w+)\..*(?:lora_|delta\.)([AB])\b", name)
        if p.requires_grad and which:
            seed = int(which[1]) * 64 + TARGETS.index(which[2]) * 2 + (which[3] == "B")
            drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                p.copy_(drawn * (1 / math.sqrt(p.shape[1]) if which[3] == "A" else 0.02))


def step_of(side: str, method: str, shape: str, setting: Setting) -> Callable[[], tuple[Tensor, Tensor]]:
    """Builds a side; one training step of it: the loss, a mean over tokens, and the norm of the gradients."""
    model: Any = base(shape, setting)
    ours = side.startswith("deltalab")
    model = by_deltalab(model, method, "plain" if "plain" in side else "auto") if ours else by_peft(model, method)
    fill(model)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, fused=True)
    called = torch.compile(model, backend=setting.backend) if "compiled" in side else model
    drawn = torch.randint(0, SHAPES[shape]["vocab_size"], (setting.sequences, setting.tokens), generator=torch.Generator().manual_seed(1))  # fmt: skip
    ids = drawn.to(setting.device)
    counted = setting.sequences * (setting.tokens - 1)
    away = Offload(model, setting.device, least=LEAST if setting.device.type == "cuda" else 1) if "offload" in side else None  # fmt: skip

    def loss_of() -> Tensor:
        return nll_sum(called, {"input_ids": ids, "labels": ids}) / counted if ours else called(input_ids=ids, labels=ids).loss  # fmt: skip

    def step() -> tuple[Tensor, Tensor]:
        if away is None:
            loss = loss_of()
        else:
            with away:
                loss = loss_of()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    return step


def measured(side: str, method: str, shape: str, setting: Setting) -> Row:
    """A side from its building to its end. Raises nothing that a side may come to by itself."""
    on_gpu = setting.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        step = step_of(side, method, shape, setting)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()  # what building took is no part of a step
        seconds, first = [], None
        for turn in range(setting.warm_up + setting.steps):
            began = time.perf_counter()
            found = step()
            if on_gpu:
                torch.cuda.synchronize()
            if turn >= setting.warm_up:
                seconds.append(time.perf_counter() - began)
            first = first or tuple(float(value) for value in found)
    except Exception as error:
        return Row(shape, method, side, failed=f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")  # fmt: skip
    middle = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    rate = setting.sequences * setting.tokens / middle
    return Row(shape, method, side, rate, 1e3 * middle, peak, *(first or (None, None)))


def shown(rows: list[Row]) -> str:
    """The rows of one method as a table; ratios to the first side."""
    first, lines = rows[0], []
    for row in rows:
        if row.failed:
            lines.append(f"  {row.side:<18} {row.failed}")
            continue
        faster = (
            "" if not first.tokens_per_second else f"{(row.tokens_per_second or 0) / first.tokens_per_second:6.2f} ×"
        )
        peak = "" if row.peak_gib is None else f"{row.peak_gib:7.2f} GiB"
        share = "" if not (first.peak_gib and row.peak_gib) else f"{row.peak_gib / first.peak_gib:6.2f} ×"
        rate = f"{row.tokens_per_second:10.0f} tokens/s {row.milliseconds:9.1f} ms"
        lines.append(f"  {row.side:<18} {rate} {faster}  {peak} {share}   loss {row.loss:.4f}, gradient {row.gradient:.4g}")  # fmt: skip
    return "\n".join(lines)


def machine(setting: Setting) -> dict[str, str]:
    """What the figures belong to."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "triton")
    found: dict[str, str] = {"python": platform.python_version(), "dtype": str(setting.dtype)}
    for name in names:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            found[name] = "none"
    cuda = setting.device.type == "cuda"
    return {"device": torch.cuda.get_device_name() if cuda else "cpu", "cuda": str(torch.version.cuda), **found}


def rows(asked: harness.Asked) -> Iterator[harness.Row]:
    """Time and peak memory of each side against peft's and the compiled peft's; nothing without a CUDA device."""
    if not torch.cuda.is_available():
        print(f"  torch {torch.__version__} sees no CUDA device: nothing is measured")
        return
    steps = asked.turns(10)
    for shape in ("1B",) if asked.quick else ("1B", "8B"):
        for method in METHODS:
            if not asked.wants(method, shape):
                continue
            setting = Setting(torch.device("cuda"), torch.bfloat16, 4, 1024, steps, 5, "inductor")
            torch.compiler.reset()
            found = {side: measured(side, method, shape, setting) for side in SIDES}
            gc.collect()
            for side in (side for side in SIDES if side.startswith("deltalab")):
                for other in ("peft", "peft, compiled"):
                    yield from against(
                        found[side], found[other], f"{method}, Llama shape {shape}, bf16, 4 × 1024 tokens"
                    )


def against(mine: Row, other: Row, setting: str) -> Iterator[harness.Row]:
    """Two sides as rows of the results; none where one of them could not run, which is said."""
    if mine.failed or other.failed:
        print(f"  {setting}: {mine.side}: {mine.failed or 'ran'}; {other.side}: {other.failed or 'ran'}")
        return
    checks = [
        harness.Check("loss", abs((mine.loss or 0) - (other.loss or 0)) / abs(other.loss or 1), 2e-3),
        harness.Check(
            "gradient's norm", abs((mine.gradient or 0) - (other.gradient or 0)) / abs(other.gradient or 1), 5e-2
        ),
    ]
    for what, unit, direction, values in (
        ("GPU step, tokens a second", "tokens/s", harness.LEAST, (mine.tokens_per_second, other.tokens_per_second)),
        ("GPU step, peak memory with the model", "GiB", harness.MOST, (mine.peak_gib, other.peak_gib)),
    ):
        medians = {mine.side: values[0] or 0.0, other.side: values[1] or 0.0}
        yield harness.Row(what, setting, f"{mine.side} / {other.side}", harness.exactly(*medians.values()), medians, unit,
                          direction=direction, checks=checks)  # type: ignore[arg-type]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Every row that was asked for. Without a CUDA device one line, and nothing is measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("1B", "8B"), default=["1B", "8B"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="of each sequence")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="on the CPU, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    asked = parser.parse_args(arguments)
    if not asked.tiny and not torch.cuda.is_available():
        print(f"benchmarks.gpu needs a CUDA device, and torch {torch.__version__} sees none: nothing is measured (--tiny runs it on the CPU).")  # fmt: skip
        return 0
    setting = Setting(torch.device("cuda"), torch.bfloat16, asked.sequences, asked.tokens, asked.steps, 5, "inductor")
    if asked.tiny:
        setting = Setting(torch.device("cpu"), torch.float32, 2, 32, 2, 1, "aot_eager")
    print(machine(setting), f"{setting.sequences} × {setting.tokens} tokens")
    rows: list[Row] = []
    for shape in ["tiny"] if asked.tiny else asked.models:
        for method in asked.methods:
            print(f"{shape} {method}")
            found = []
            for side in asked.sides:
                torch.compiler.reset()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found.append(measured(side, method, shape, setting))
                gc.collect()
            print(shown(found), flush=True)
            rows += found
    if asked.json:
        asked.json.write_text(
            json.dumps({"machine": machine(setting), "rows": [asdict(row) for row in rows]}, indent=1)
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
