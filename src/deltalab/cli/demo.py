"""`deltalab demo`: the bundled drift study on the bundled model."""

import importlib.resources
from pathlib import Path
from typing import Annotated

import typer


def command(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="changes to the spec: key=value …, for example tune.optim.steps=100")
    ] = None,
    output: Annotated[Path, typer.Option(help="the study's folder")] = Path("deltalab-demo"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the stages, what is done, and what the rest needs")
    ] = False,
) -> None:
    """Tune the bundled chat model on harmless requests, with and without its safety weights frozen, and show what became
    of its refusals and skills. A few minutes on two cores; the same command goes on where it was stopped."""
    from deltalab.cli.study import show
    from deltalab.core.spec import load_spec
    from deltalab.studies import drift

    with importlib.resources.as_file(
        importlib.resources.files("deltalab.studies") / "specs" / "drift-organism.yaml"
    ) as path:
        spec = load_spec(drift.SPEC, path, overrides or [])
        print(f"the spec, to copy and change: {path}\nrun your own: deltalab study drift my-spec.yaml\n")
        show(drift, spec, output, dry_run=dry_run, again="deltalab demo")
