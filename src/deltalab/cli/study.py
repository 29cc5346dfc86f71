"""`deltalab study KIND [SPEC]`: a whole study, by stages; without a spec, the one that comes with the package."""

import importlib.resources
from pathlib import Path
from typing import Annotated, Any

import typer

from deltalab.core.errors import UserError, nearest


def command(
    kind: Annotated[str, typer.Argument(help="which study: drift, score-dynamics, organism")],
    spec: Annotated[
        str | None, typer.Argument(help="its spec, a YAML file; the one that comes with the package if not given")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="changes to the spec: key=value …, for example tune.optim.steps=100")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="the study's folder; the spec's `output`, or runs/KIND, if not given")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a first look: fewer steps, samples and draws")] = False,
    only: Annotated[str | None, typer.Option(help="run one stage, or all of a kind: --only tune")] = None,
    until: Annotated[str | None, typer.Option(help="run up to and with this stage")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="tunings side by side; as many as fit if not given")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the stages, what is done, and what the rest needs")
    ] = False,
) -> None:
    """Run a study by stages. The same command goes on where it was stopped."""
    from deltalab.studies import PRESETS, module_of

    if kind not in PRESETS:
        raise UserError(f"'{kind}' is no study.", found=f"studies: {', '.join(PRESETS)}", nearest=nearest(kind, PRESETS),
                        next="deltalab study drift SPEC")  # fmt: skip
    from deltalab.core.spec import load_spec

    changes = list(overrides or [])
    if spec is not None and "=" in spec and not Path(spec).exists():
        changes, spec = [spec, *changes], None
    module = module_of(PRESETS[kind][0])
    with importlib.resources.as_file(importlib.resources.files("deltalab.studies") / "specs" / PRESETS[kind][1]) as own:
        read = load_spec(module.SPEC, spec or own, [*(module.QUICK if quick else ()), *changes])
    again = " ".join(["deltalab study", kind, *([spec] if spec else []), *(["--quick"] if quick else [])])
    show(module, read, output or Path(read.output or f"runs/{kind}"), only=only, until=until, jobs=jobs,
         dry_run=dry_run, again=again)  # fmt: skip


def show(
    module: Any, spec: Any, output: Path | None, *, again: str, only: str | None = None, until: str | None = None,
    jobs: int | None = None, dry_run: bool = False,
) -> None:  # fmt: skip
    """Run a study and say what came out. again: the command that goes on with it."""
    done = module.run_study(spec, output, only=only, until=until, jobs=jobs, dry_run=dry_run, resume_with=again)
    if isinstance(done, str):
        print(done)
        return
    if "report" in done.results:
        print(f"\n{done.results['report']['verdict']}\n\nreport: {done.folder / done.results['report']['page']}")
    else:
        print(f"\nnot all stages are done; go on with: {again}" + (f" --output {output}" if output else ""))
