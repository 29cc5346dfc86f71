"""`deltalab score MODEL [key=value…] --output FOLDER`: how important each weight is, as files."""

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    model: Annotated[str, typer.Argument(help="a folder, a hub name, organism; or a spec file (YAML)")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="changes to the spec: score.score=wanda score.positions=first-5 halves=true"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder for the scores; one that was begun is gone on with")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress, the table only")] = False,
) -> None:
    """Score every weight of a model's blocks on the conversations of tasks; the same command goes on after a kill."""
    from deltalab.core.spec import build, override, read_yaml
    from deltalab.safety.manifest import title
    from deltalab.safety.score_run import ScoreRunSpec, by_kind, run_scores

    values: dict[str, Any] = read_yaml(model) if model.endswith((".yaml", ".yml")) else {"model": model}
    spec = build(ScoreRunSpec, override(values, overrides or []), model)
    scores = run_scores(spec, output, say=_unsaid if quiet else _said, progress=None if quiet else _progress)
    print(title(scores.manifest))
    print(table(by_kind(scores)))
    print(f"written: {scores.folder}")


def table(rows: list[dict[str, Any]]) -> str:
    """Matrices, entries and scores of each kind of linear."""
    width = max(len(row["kind"]) for row in rows)
    lines = [f"  {'kind':<{width}}  {'matrices':>8}  {'entries':>13}  {'mean':>10}  {'median':>10}  {'largest':>10}"]
    for row in rows:
        numbers = "  ".join(f"{row[key]:>10.3g}" for key in ("mean", "median", "largest"))
        lines.append(f"  {row['kind']:<{width}}  {row['matrices']:>8}  {row['entries']:>13,}  {numbers}")
    return "\n".join(lines)


def _said(line: str) -> None:
    typer.echo(line, err=True)


def _unsaid(line: str) -> None:
    pass


def _progress(done: int, total: int) -> None:
    """A line at every tenth of the way."""
    if done * 10 // total > (done - 1) * 10 // total:
        _said(f"  {done} of {total} samples")
