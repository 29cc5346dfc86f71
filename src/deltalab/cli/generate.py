"""`deltalab generate MODEL`: replies to prompts, of the model and of adapters beside each other."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from deltalab.models.generate import Generation, Prompt


def command(
    model: Annotated[str, typer.Argument(help="a folder, a hub name, organism")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="a prompt; may be given again")] = None,
    file: Annotated[
        Path | None, typer.Option(help="prompts: lines of a .txt, or rows of a .jsonl, .json, .csv or .tsv")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="name=folder; may be given again; base for the model without one")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens of a reply at most")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="sample from the tokens that make up this probability")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the samples")] = 0,
    batch_size: Annotated[int, typer.Option(help="prompts at a time")] = 16,
    system: Annotated[str | None, typer.Option(help="a system prompt before each")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="continue each prompt as it is, without the chat template")
    ] = False,
    quantize: Annotated[str | None, typer.Option(help="nf4, int8 or int4-group")] = None,
    group_size: Annotated[int | None, typer.Option(help="of --quantize, where not the default")] = None,
    dtype: Annotated[str, typer.Option(help="of the model: float32, bfloat16, float16, auto")] = "auto",
    out: Annotated[Path | None, typer.Option(help="a .jsonl for the replies: one line a prompt")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Reply to prompts: of --prompt, of a file, or of the lines of the standard input.

    With several adapters each prompt gets a reply of each, side by side.
    """
    from rich.console import Console

    from deltalab.core.files import write_text
    from deltalab.models.device import nearby
    from deltalab.models.generate import generate, require_settings
    from deltalab.models.heads import require_writer
    from deltalab.models.load import load
    from deltalab.models.named import named, put_on, speaking

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "batch_size": batch_size, "temperature": temperature, "top_p": top_p,
    }  # fmt: skip
    require_settings(**settings)
    folders = named(adapter or [])
    prompts = gathered(prompt or [], file)
    loaded, tokenizer = load(model, dtype=dtype, device_map=nearby(), quantize=quantize, group_size=group_size)
    require_writer(loaded)
    replies: dict[str, list[Generation]] = {}
    for name in put_on(loaded, folders):
        tell = None if quiet or len(prompts) < 2 else _Progress(name)
        with speaking(loaded, name):
            replies[name] = generate(
                loaded, tokenizer, prompts, system=system, template=not raw, seed=seed, on_progress=tell, **settings
            )
    if out is not None:
        write_text(out, as_jsonl(prompts, replies))
        print(f"{len(prompts)} prompts, {', '.join(replies)}: {out}")
    else:
        show(replies, Console(highlight=False))


def gathered(given: Sequence[str], file: Path | None) -> "list[Prompt]":
    """The prompts of the options, or of the standard input. Raises: UserError if there is none, or one is blank."""
    from deltalab.core.errors import UserError
    from deltalab.data.prompts import lines, read_prompts

    prompts: list[Prompt] = [*given, *(read_prompts(file) if file is not None else [])]
    if not prompts:
        if sys.stdin.isatty():
            raise UserError("there is no prompt.", next="--prompt TEXT, --file FILE, or pipe lines into the command")
        prompts = [*lines(sys.stdin.read())]
    blank = [number for number, text in enumerate(prompts, 1) if isinstance(text, str) and not text.strip()]
    if blank or not prompts:
        raise UserError(
            f"prompt {blank[0]} is blank." if blank else "there is no prompt in the standard input.",
            next="leave it out, or give it some text" if blank else "--prompt TEXT, or --file FILE",
        )
    return prompts


def as_jsonl(prompts: "Sequence[Prompt]", replies: "dict[str, list[Generation]]") -> str:
    """A line for each prompt: the prompt as it was given, and the reply of each adapter by its name."""
    import json

    rows = []
    for number, given in enumerate(prompts):
        row: dict[str, Any] = {"prompt": given} if isinstance(given, str) else {"messages": list(given)}
        row["replies"] = {
            name: {"text": r[number].text, "tokens": r[number].tokens, "finished": r[number].finished}
            for name, r in replies.items()
        }
        rows.append(json.dumps(row, ensure_ascii=False))
    return "\n".join(rows) + "\n"


def show(replies: "dict[str, list[Generation]]", console: "Console") -> None:
    """The replies: a single one as it is, else each under its prompt, those of several adapters side by side."""
    from deltalab.cli.columns import fit, side_by_side

    first = next(iter(replies.values()))
    for number, reply in enumerate(first):
        if len(first) > 1 or len(replies) > 1:
            console.print(
                fit("\n" * (number > 0) + f"> {reply.prompt}", console), style="bold", markup=False, soft_wrap=True
            )
        if len(replies) == 1:
            console.print(fit(reply.text, console), markup=False, soft_wrap=True)
        else:
            side_by_side({name: r[number].text for name, r in replies.items()}, console)


class _Progress:
    """A line on the standard error, written over again; nothing where that is no terminal."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r  {self.name}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
