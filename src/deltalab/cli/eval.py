"""`deltalab eval MODEL --tasks …`: tasks of lm-evaluation-harness on a model, with or without an adapter."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from deltalab.train.lm_eval import Asked, Judged


def command(
    model: Annotated[str, typer.Argument(help="a folder, a hub name, organism")],
    tasks: Annotated[str, typer.Option(help="lm-eval's names of tasks, groups or tags, by commas: hellaswag,arc_easy")],
    adapter: Annotated[str | None, typer.Option(help="folder of an adapter to put on")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="examples before a question, where not each task's own")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="the first so many examples of each task")] = None,
    include_path: Annotated[str | None, typer.Option(help="folder with task files of your own (YAML)")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="prompts as turns of a chat")
    ] = False,
    gen_kwargs: Annotated[str, typer.Option(help="of generated replies: max_gen_toks=64,temperature=0.5")] = "",
    max_length: Annotated[
        int | None, typer.Option(help="tokens of prompt and answer, where not the model's own")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="requests at a time")] = 8,
    bootstrap: Annotated[
        int, typer.Option(help="draws for lm-eval's own standard errors; its default is 100000, which may take long")
    ] = 0,
    quantize: Annotated[str | None, typer.Option(help="nf4, int8 or int4-group")] = None,
    dtype: Annotated[str, typer.Option(help="of the model: float32, bfloat16, float16, auto")] = "auto",
    json: Annotated[Path | None, typer.Option(help="a file for the measures and lm-eval's results")] = None,
    output: Annotated[Path | None, typer.Option(help="folder for a record of it all, and the samples")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress, the table only")] = False,
) -> None:
    """Score a model on tasks of EleutherAI's lm-evaluation-harness (`pip install 'deltalab[eval]'`)."""
    from deltalab.core.files import write_json
    from deltalab.core.spec import build, override
    from deltalab.models.device import nearby
    from deltalab.train.lm_eval import Asked, evaluate_asked

    values: dict[str, Any] = {
        "model": model, "adapter": adapter, "quantize": quantize, "dtype": dtype, "bootstrap": bootstrap,
        "ask": {"task": "lm-eval", "tasks": _parted(tasks), "num_fewshot": num_fewshot, "limit": limit, "include_path": include_path,
                "apply_chat_template": apply_chat_template, "max_length": max_length, "batch_size": batch_size},
    }  # fmt: skip
    spec = build(Asked, override(values, [f"ask.gen_kwargs.{part}" for part in _parted(gen_kwargs)]), "deltalab eval")
    found = evaluate_asked(spec, output, device_map=nearby(), progress=not quiet)
    if json is not None:
        write_json(json, {"measures": found.measures, **found.results})
    print(table(spec, found))
    written = [
        str(place) for place in (json, output and output / "record.json", output and output / "samples") if place
    ]
    if written:
        print(f"written: {', '.join(written)}")


def table(spec: "Asked", found: "Judged") -> str:
    """A line a measure, with its 95 % and its examples; a group's tasks behind it."""
    rows = [("task", "shots", "measure", "value", "95 %", "n")]
    for name, measures in found.measures.items():
        for number, (measure, of) in enumerate(measures.items()):
            wide = f"[{of['low']:.4g}, {of['high']:.4g}]" if "low" in of else ""
            shots = found.results.get("n-shot", {}).get(name, "")
            rows.append(("" if number else name, "" if number else str(shots), measure, f"{of['value']:.4g}", wide, str(of.get("n", ""))))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = [
        "  " + "  ".join(cell.ljust(w) if i in (0, 2, 4) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip
    on = f" with {spec.adapter}" if spec.adapter else ""
    return "\n".join([f"{spec.model}{on}, lm-eval {found.results.get('lm_eval_version', '')}", *lines])


def _parted(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
