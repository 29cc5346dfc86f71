"""`deltalab doctor`: what is installed, on what machine, and whether the chain from delta to merged model works here."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from deltalab.core.errors import UserError
from deltalab.core.files import free_bytes

GIB = 2**30
NEEDED = 1 * GIB
"""Memory and disk below which a small study will not get through."""


@dataclass(frozen=True)
class Check:
    """One thing looked at. ok: None where it is only told, not judged. next: the command that mends it."""

    part: str
    name: str
    ok: bool | None
    detail: str
    next: str = ""


def command(
    json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of lines")] = False,
    self_test: Annotated[bool, typer.Option(help="adapt, train, save, load and merge a tiny model")] = True,
) -> None:
    """Show versions, devices, memory, disk and extras, and run a ten-second self-test; exit 1 if something fails."""
    parts: list[Callable[[], Iterator[Check]]] = [packages, machine, extras, start_up]
    checks = [check for part in parts for check in part()]
    if self_test and all(check.ok is not False for check in checks if check.part == "packages"):
        checks += list(tested())
    failed = [check for check in checks if check.ok is False]
    if json:
        import json as writer

        print(writer.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        print(as_text(checks))
    if failed:
        raise typer.Exit(1)


def as_text(checks: list[Check]) -> str:
    """The checks by part, one line each; what fails again at the end, with what to do."""
    lines, width = [], max(len(check.name) for check in checks)
    for part in dict.fromkeys(check.part for check in checks):
        lines.append(part)
        for check in (c for c in checks if c.part == part):
            mark = {True: "ok  ", False: "FAIL", None: "    "}[check.ok]
            lines.append(f"  {mark} {check.name:<{width}}  {check.detail}".rstrip())
    failed = [check for check in checks if check.ok is False]
    lines += ["", f"{len(failed)} of {len(checks)} checks fail:" if failed else "everything that was checked works."]
    lines += [
        f"  {check.name}: {check.detail}" + (f"\n    next: {check.next}" if check.next else "") for check in failed
    ]
    return "\n".join(lines if failed else [*lines, "next: deltalab demo"])


def packages() -> Iterator[Check]:
    """Python, deltalab and what it needs, each with its version against the range that is asked for."""
    from packaging.requirements import Requirement

    yield Check(
        "packages", "python", sys.version_info >= (3, 11), platform.python_version(), "install Python 3.11 or newer"
    )
    try:
        yield Check("packages", "deltalab", True, importlib.metadata.version("deltalab"))
        wanted = importlib.metadata.requires("deltalab") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "deltalab", False, "runs from a folder that is not installed", "pip install -e .")
        return
    for requirement in (Requirement(text) for text in wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None:
            yield Check(
                "packages",
                requirement.name,
                False,
                "not installed",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
        else:
            ok = requirement.specifier.contains(found, prereleases=True)
            detail = found if ok else f"{found}, needed is {requirement.specifier}"
            yield Check(
                "packages",
                requirement.name,
                ok,
                detail,
                "" if ok else f"pip install '{requirement.name}{requirement.specifier}'",
            )


def machine() -> Iterator[Check]:
    """Processor, threads, accelerators, memory, disk."""
    try:
        import psutil
        import torch
    except ImportError as error:
        yield Check("machine", "torch", False, str(error), "pip install torch")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    more = f"; more threads than cores: export OMP_NUM_THREADS={cores}" if threads > cores else ""
    yield Check("machine", "processor", None, f"{_processor()}, {cores} cores, {threads} torch threads{more}")
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        yield Check(
            "machine",
            f"cuda:{i}",
            None,
            f"{device.name}, {device.total_memory / GIB:.0f} GiB, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}",
        )
    if torch.backends.mps.is_available():
        yield Check("machine", "mps", None, "Apple GPU")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        yield Check("machine", "accelerator", None, "none: everything runs on the processor")
    yield _bfloat16()
    memory, limit = psutil.virtual_memory(), _memory_limit()
    free = min(memory.available, limit or memory.available)
    yield Check("machine", "memory", free >= NEEDED, f"{free / GIB:.1f} GiB free of {min(memory.total, limit or memory.total) / GIB:.1f}",
                "close other programs; the bundled study needs about 1 GiB")  # fmt: skip
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for name, folder in {
        "disk here": Path(),
        "disk for temporary files": Path(tempfile.gettempdir()),
        "disk of the hub's cache": cache,
    }.items():
        yield Check(
            "machine",
            name,
            free_bytes(folder) >= NEEDED,
            f"{free_bytes(folder) / GIB:.1f} GiB free in {folder.absolute()}",
            "free some space",
        )


def extras() -> Iterator[Check]:
    """Each optional group: installed, or how to install it."""
    from packaging.requirements import Requirement

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        about = importlib.metadata.metadata("deltalab")
        wanted = [Requirement(text) for text in importlib.metadata.requires("deltalab") or []]
        for extra in about.get_all("Provides-Extra") or []:
            own = [
                r
                for r in wanted
                if r.marker is not None and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
            ]
            missing = [r.name for r in own if _version(r.name) is None]
            there = ", ".join(f"{r.name} {_version(r.name)}" for r in own if r.name not in missing)
            how = f"pip install 'deltalab[{extra}]'  (missing: {', '.join(missing)})"
            yield Check("extras", extra, None if missing else True, how if missing else there)


def start_up() -> Iterator[Check]:
    """How long a fresh process takes; the second of two runs, so that the disk's cache is warm."""
    for name, args in {
        "import deltalab": ["-c", "import deltalab"],
        "deltalab --help": ["-m", "deltalab", "--help"],
    }.items():
        seconds = 0.0
        for _ in range(2):
            began = time.perf_counter()
            subprocess.run([sys.executable, *args], check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - began
        yield Check("start-up", name, None, f"{seconds:.2f} s")


MERGED = "logits of the merged and of the adapted model"


def tested() -> Iterator[Check]:
    """Every method on a tiny random Llama: adapt, train, save, load, merge, take off; each against the model itself."""
    from deltalab.deltas import methods

    began = time.perf_counter()
    for name, spec in methods().items():
        done = "adapt"
        steps = []
        try:
            for done in _exercise(spec):
                steps.append(done)
            merges = "merges, " if MERGED in steps else "has nothing to merge, "
            yield Check("self-test", name, True, f"adapts, trains, saves, loads, {merges}comes off bitwise")
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield Check(
                "self-test",
                name,
                False,
                f"after '{done}': {said}",
                "DELTALAB_DEBUG=1 deltalab doctor, and report what it prints",
            )
            if os.environ.get("DELTALAB_DEBUG", "0") not in ("", "0"):
                raise
    yield _bundled()
    yield Check("self-test", "time", None, f"{time.perf_counter() - began:.1f} s")


def _exercise(spec: Any) -> Iterator[str]:
    """Yields the name of each step that is done; raises at the first that is not right."""
    import torch
    import transformers

    import deltalab as dl
    from deltalab.deltas.adapt import attached, param_groups
    from deltalab.deltas.base import WeightDelta

    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        tokens = torch.randint(1, 64, (4, 16))

    def logits(of: Any) -> torch.Tensor:
        with torch.no_grad():
            values: torch.Tensor = of(tokens).logits
        return values

    def same(got: torch.Tensor, want: torch.Tensor, bound: float, what: str) -> str:
        error = float((got - want).norm() / want.norm())
        if not error <= bound:
            raise UserError(f"{what} differ by {error:.2g}, at most {bound:g} is right.")
        return what

    base = logits(model)
    dl.adapt(model, spec())
    yield "adapt"
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
    losses = []
    for step in range(1, 6):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        dl.step(model, step, 5)
        optimizer.zero_grad()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise UserError(f"the loss did not fall in five steps: {losses[0]:.4f} to {losses[-1]:.4f}.")
    yield "train"
    adapted = logits(model)
    with dl.disabled(model):
        yield same(logits(model), base, 0.0, "logits of the disabled delta and of the base")
    if all(isinstance(delta, WeightDelta) for delta in attached(model).values()):
        yield same(logits(dl.merged(model)), adapted, 1e-5, MERGED)
    with tempfile.TemporaryDirectory() as folder:
        dl.save_adapter(model, f"{folder}/adapter")
        dl.unload(model)
        yield same(logits(model), base, 0.0, "logits after unload and of the base")
        dl.load_adapter(model, f"{folder}/adapter")
        yield same(logits(model), adapted, 1e-6, "logits of the loaded and of the saved adapter")


def _bundled() -> Check:
    """Whether the bundled model is there and loads."""
    try:
        import deltalab as dl

        model, tokenizer = dl.load("organism")
    except Exception as error:
        said = error.asked if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Check(
            "self-test",
            "bundled model",
            False,
            said,
            "install deltalab again: pip install --force-reinstall --no-deps .",
        )
    size = sum(parameter.numel() for parameter in model.parameters())
    return Check("self-test", "bundled model", True, f"{size / 1e6:.1f} M parameters, {len(tokenizer)} tokens")


def _bfloat16() -> Check:
    """Whether the processor computes in bfloat16. Not judged: everything runs in float32 unless asked."""
    from deltalab.models.precision import BROKEN, REMEDY, cpu_multiplies_bfloat16

    works = cpu_multiplies_bfloat16()
    detail = "works on the processor" if works else f"not on the processor: {BROKEN}; {REMEDY}, or stay with float32"
    return Check("machine", "bfloat16", None, detail)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_limit() -> int | None:
    """Bytes that the container allows, if it limits them."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    return None
