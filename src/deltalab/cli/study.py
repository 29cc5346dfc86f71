"""`deltalab study drift SPEC`: a whole study, by stages."""

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from deltalab.core.errors import UserError, nearest


def command(
    kind: Annotated[str, typer.Argument(help="which study: drift")],
    spec: Annotated[Path, typer.Argument(help="its spec, a YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="changes to the spec: key=value …, for example tune.optim.steps=100")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="the study's folder; the spec's `output`, or runs/drift, if not given")
    ] = None,
    only: Annotated[str | None, typer.Option(help="run one stage, or all of a kind: --only tune")] = None,
    until: Annotated[str | None, typer.Option(help="run up to and with this stage")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the stages, what is done, and what the rest needs")
    ] = False,
) -> None:
    """Run a study by stages. The same command goes on where it was stopped."""
    from deltalab.studies import STUDIES

    if kind not in STUDIES:
        raise UserError(f"'{kind}' is no study.", found=f"studies: {', '.join(STUDIES)}", nearest=nearest(kind, STUDIES),
                        next="deltalab study drift SPEC")  # fmt: skip
    from deltalab.core.spec import load_spec

    module = importlib.import_module(STUDIES[kind])
    read = load_spec(module.SPEC, spec, overrides or [])
    show(module, read, output, only=only, until=until, dry_run=dry_run, again=f"deltalab study {kind} {spec}")


def show(
    module: Any, spec: Any, output: Path | None, *, again: str,
    only: str | None = None, until: str | None = None, dry_run: bool = False,
) -> None:  # fmt: skip
    """Run a study and say what came out. again: the command that goes on with it."""
    done = module.run_study(spec, output, only=only, until=until, dry_run=dry_run, resume_with=again)
    if isinstance(done, str):
        print(done)
        return
    if "report" in done.results:
        print(f"\n{done.results['report']['verdict']}\n\nreport: {done.folder / done.results['report']['page']}")
    else:
        print(f"\nnot all stages are done; go on with: {again}" + (f" --output {output}" if output else ""))
