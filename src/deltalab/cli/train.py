"""`deltalab train SPEC [key=value…]`: one run, from a spec to an adapter, curves and a record."""

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    spec: Annotated[Path, typer.Argument(help="spec file (YAML)")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="changes to the spec: optim.lr=3e-4 adapt.0.r=16 output=runs/second")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress, the result only")] = False,
) -> None:
    """Train a delta from a spec; the same command goes on after a kill."""
    from deltalab.core.records import read_record
    from deltalab.core.spec import load_spec
    from deltalab.train import TrainSpec, run_spec
    from deltalab.train.devices import processes

    plan = load_spec(TrainSpec, spec, overrides or [])
    path = run_spec(plan, plan.output or Path("runs") / spec.stem, progress=not quiet)
    if processes().is_main_process:
        print(summary(read_record(path), path.parent))


def scores(before: dict[str, Any], after: dict[str, Any]) -> str:
    """A task's measures, the interval with the first of them."""
    parts: list[str] = []
    for name, value in after.items():
        if name not in ("low", "high", "n"):
            was = f"{before[name]:.3f} → " if before.get(name) is not None else ""
            wide = f" [{after['low']:.3f}, {after['high']:.3f}]" if "low" in after and not parts else ""
            parts.append(f"{name} {was}{value:.3f}{wide}")
    return ", ".join(parts) + (f", n = {after['n']}" if "n" in after else "")


def summary(record: dict[str, Any], folder: Path) -> str:
    """A finished run in a few lines."""
    result, sizes = record["result"], record["sizes"]
    early = " (stopped early)" if result["stopped_early"] else ""
    lines = [f"{result['steps']} steps{early}, {result['tokens']:,} tokens in {result['training_seconds']:.0f} s",
             f"  loss       {result['loss'][0]:.3f} → {result['loss'][1]:.3f} (the tokens of the first and last steps, at most 10)"]  # fmt: skip
    if result["held_out"]:
        best = f", best {result['best']['loss']:.3f} at step {result['best']['step']}" if result["best"] else ""
        lines.append(f"  held-out   {result['held_out'][0]:.3f} → {result['held_out'][-1]:.3f}{best}")
    for task, after in record["scores"]["after"].items():
        lines.append(f"  {task:<10} {scores(record['scores']['before'].get(task, {}), after)}")
    lines.append(
        f"  trained    {sizes['trained']:,} of {sizes['base']:,} parameters; adapter {sizes['adapter_bytes'] / 1024:,.0f} KiB"
    )
    lines.append(f"  written    {folder / 'adapter'}, {folder / 'curves'}, {folder / 'record.json'}")
    lines.append(f"  to see it  deltalab report {folder}")
    return "\n".join(lines)
