"""`deltalab export BASE ADAPTER OUT --for vllm | peft | merged | gguf`: what other programs serve."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    base: Annotated[str | None, typer.Argument(help="the model: a folder, a hub name, organism")] = None,
    adapter: Annotated[Path | None, typer.Argument(help="the folder of its adapter")] = None,
    out: Annotated[Path | None, typer.Argument(help="a new folder for the export")] = None,
    to: Annotated[str, typer.Option("--for", help="vllm, peft, merged or gguf")] = "vllm",
    dtype: Annotated[
        str | None, typer.Option(help="of what is written; else float32 for vllm, the base's own if merged")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="quantise the base first, as the adapter's was: nf4, int8, int4-group")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="of --quantize, where it was not the default")] = None,
    check: Annotated[Path | None, typer.Option(help="only check an adapter folder by vLLM's rules")] = None,
) -> None:
    """Write an adapter, or the model that it merges to, for another program.

    vllm: pairs of one rank and scale, from any method whose change is a product B A. peft: its own file where peft has
    words for it. merged: one model, for transformers and vLLM. gguf: the same, with the way to llama.cpp.
    """
    from deltalab.core.errors import UserError

    if check is not None:
        if base is not None:
            raise UserError("--check looks at one folder and writes nothing.", next=f"deltalab export --check {check}")
        checked(check)
        return
    missing = [name for name, value in (("BASE", base), ("ADAPTER", adapter), ("OUT", out)) if value is None]
    if base is None or adapter is None or out is None:
        raise UserError(
            f"{' and '.join(missing)} is missing." if len(missing) == 1 else f"{', '.join(missing)} are missing.",
            next="deltalab export BASE ADAPTER OUT --for vllm, or deltalab export --check FOLDER",
        )
    import transformers

    from deltalab.deltas.peft_format import load_adapter
    from deltalab.models.export import dtype_of, export, require_empty, require_form
    from deltalab.models.heads import head_for
    from deltalab.models.load import load

    require_form(to)  # before a large model is loaded
    require_empty(out)
    wanted = None if dtype is None else dtype_of(dtype)
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(base, dtype=wanted or "auto", quantize=quantize, group_size=group_size, **head_for(adapter))
    load_adapter(model, adapter)
    print(export(model, out, to, dtype=wanted, tokenizer=tokenizer))


def checked(folder: Path) -> None:
    """Say what vLLM has against an adapter. Raises: UserError if there is something."""
    from deltalab.core.errors import UserError
    from deltalab.core.files import read_json
    from deltalab.models.vllm_check import check_vllm

    problems = check_vllm(folder)
    if problems:
        raise UserError(
            f"vLLM does not serve the adapter in '{folder}' as it is: {len(problems)} "
            f"{'fault' if len(problems) == 1 else 'faults'}.",
            found="\n         ".join(problems),
            next=f"deltalab export BASE {folder} OUT --for vllm, or --for merged where that has no such form",
        )
    rank = read_json(folder / "adapter_config.json", "adapter config")["r"]
    print(f"{folder}: nothing against it; serve it with --enable-lora --max-lora-rank {rank}")
