"""`deltalab combine BASE ADAPTER ADAPTER … --out FOLDER`: several adapters made into one."""

from pathlib import Path
from typing import Annotated

import typer

RECORD = "combine.json"


def command(
    base: Annotated[str, typer.Argument(help="the model: a folder, a hub name, organism")],
    adapters: Annotated[list[str], typer.Argument(help="folders of its adapters, or name=folder")],
    out: Annotated[Path, typer.Option(help="a new folder for the adapter that they make")],
    how: Annotated[str, typer.Option(help="linear, svd, ties, dare or dare-ties")] = "linear",
    weights: Annotated[str | None, typer.Option(help="one for each adapter: 0.7,0.3; 1 if not given")] = None,
    r: Annotated[int | None, typer.Option("--r", help="rank of the result, but for linear; else the largest")] = None,
    density: Annotated[float | None, typer.Option(help="share of each change that ties and dare keep")] = None,
    seed: Annotated[int, typer.Option(help="of what dare draws")] = 0,
    quantize: Annotated[
        str | None, typer.Option(help="quantise the base first, as the adapters' was: nf4, int8, int4-group")
    ] = None,
) -> None:
    """Make several adapters of one base into one, and say what that lost.

    linear: their weighted sum, exact, its rank the sum of theirs. svd: the nearest to it of rank r. ties, dare,
    dare-ties: sparse parts of each, then the nearest of rank r. What was done and lost stays beside the adapter as JSON.
    """
    from deltalab.core.errors import UserError
    from deltalab.core.files import write_json
    from deltalab.core.records import environment
    from deltalab.deltas.combine import combine, require_options
    from deltalab.deltas.peft_format import save_adapter
    from deltalab.models.export import require_empty
    from deltalab.models.load import load
    from deltalab.models.named import named

    require_options(how, r, density)  # before a large model is loaded
    require_empty(out)
    folders = {name: folder for name, folder in named(adapters).items() if folder is not None}
    if len(folders) < len(adapters):
        raise UserError("'base' is the model without an adapter, and adds nothing.", next="leave it out")
    model, _ = load(base, quantize=quantize)
    made, report = combine(model, folders, _numbers(weights), how=how, r=r, density=density, seed=seed)
    save_adapter(made, out)
    given = {name: str(folder) for name, folder in folders.items()}
    asked = {"base": base, "quantize": quantize, "folders": given}
    write_json(out / RECORD, {**asked, **report.plain(), "environment": environment()})
    print(f"{report}\nwritten: {out} ({RECORD} beside it says what was lost where)")


def _numbers(text: str | None) -> list[float] | None:
    """Raises: UserError if they are no numbers."""
    from deltalab.core.errors import UserError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"the weights '{text}' are no numbers.", next="--weights 0.7,0.3") from None
