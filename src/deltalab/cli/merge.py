"""`deltalab merge BASE ADAPTER OUT`: one model in place of a base and an adapter, with what that costs and a check of it."""

import datetime
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import transformers
    from torch import Tensor, nn

    from deltalab.measure.merging import MergePrice

TOLERANCE = 1e-3
PROMPTS, ROWS, BATCH = 16, 256, 8
"""Bundled conversations, and rows of --data, that the models are compared on; and how many at a time."""
RECORD, CORRECTION = "merge.json", "adapter"


def command(
    base: Annotated[str, typer.Argument(help="the model: a folder, a hub name, organism")],
    adapter: Annotated[Path, typer.Argument(help="the folder of its adapter")],
    out: Annotated[Path, typer.Argument(help="a new folder for the merged model")],
    quantize: Annotated[
        str | None, typer.Option(help="quantise the base first, as the adapter's was: nf4, int8, int4-group")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="of --quantize, where it was not the default")] = None,
    into: Annotated[
        str, typer.Option(help="what quantised linears become: dequantise, requantise, or correct")
    ] = "dequantise",
    rank: Annotated[int | None, typer.Option(help="of a correction, 8 if not given")] = None,
    steps: Annotated[int | None, typer.Option(help="of a correction, 1 if not given")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="to load and write in: float32, bfloat16, …; else the base's own")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="read what was written again, and keep it only if it is near enough")
    ] = False,
    tol: Annotated[
        float | None, typer.Option(help="of --verify: the most relative error of the logits, 1e-3 if not given")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="a file of conversations (.jsonl, .json, .csv, .tsv) or a text to compare on")
    ] = None,
) -> None:
    """Merge an adapter into its base, as a folder of transformers; say what that costs and keep it in merge.json.

    dequantise: a plain model, exact apart from rounding. requantise: the codes of the merged weights, small and not exact.
    correct: the same, and an adapter of --rank beside it for the best part of what the codes lose.
    """
    import transformers

    from deltalab.core.errors import UserError
    from deltalab.core.files import replacing
    from deltalab.deltas.merge import require_way
    from deltalab.deltas.peft_format import load_adapter
    from deltalab.models.export import require_empty
    from deltalab.models.heads import head_for
    from deltalab.models.load import load

    require_way(into, rank, steps)  # before a large model is loaded
    require_empty(out)
    if tol is not None and not (verify and math.isfinite(tol) and tol > 0):
        raise UserError(f"--tol {tol:g} holds nothing to anything.", next="--verify --tol with a number above 0")
    conversations = _conversations(data)
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(base, quantize=quantize, group_size=group_size, dtype=dtype or "auto", **head_for(adapter))
    load_adapter(model, adapter)
    batches = _batches(model, tokenizer, conversations)
    with replacing(out) as tmp:
        tmp.mkdir()
        written = _write(model, tokenizer, tmp, into, rank, steps)
        if verify:
            del written
            written = _read(tmp, model)
        price = _price(model, written, batches, data)
        print(f"{base} + {adapter}, {_way(model, written, into)}; the merged model against the adapted one:\n{price}")
        if verify:
            _require_near(price, tol or TOLERANCE, model, out, into)
        asked = {"base": base, "adapter": str(adapter), "quantize": quantize, "group_size": group_size, "into": into,
                 "rank": rank, "steps": steps, "verify": verify, "tol": (tol or TOLERANCE) if verify else None,
                 "data": None if data is None else str(data)}  # fmt: skip
        _record(tmp, asked, model, adapter, price)
    print(_told(out, into, verify))


def _write(
    model: "nn.Module", tokenizer: "transformers.PreTrainedTokenizerBase", folder: Path, into: str,
    rank: int | None, steps: int | None,
) -> "nn.Module":  # fmt: skip
    """Merge, and write the model, its tokenizer, and the correction if there is one."""
    from deltalab.deltas.merge import dequantised, merged
    from deltalab.deltas.peft_format import save_adapter
    from deltalab.deltas.weights import is_adapted

    made: Any = merged(model, into, rank=rank, steps=steps)
    if into == "dequantise":
        dequantised(made)  # the rest of it too: others' loaders do not read these codes
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if is_adapted(made):
        save_adapter(made, folder / CORRECTION)
    return made


def _read(folder: Path, like: "nn.Module") -> "nn.Module":
    """The model that the folder holds, with its correction, as someone else would load it."""
    from deltalab.deltas.peft_format import load_adapter
    from deltalab.models.load import load

    model, _ = load(folder, dtype=like.dtype)  # type: ignore[arg-type]
    return load_adapter(model, folder / CORRECTION) if (folder / CORRECTION).is_dir() else model


def _conversations(data: Path | None) -> list[Any]:
    """What the models are compared on. Raises: UserError if the file is missing, empty, or malformed."""
    from deltalab.data.tasks import BenignTask, InstructTask, TextTask

    if data is None:
        return BenignTask(n=PROMPTS).train()
    task = TextTask if data.suffix == ".txt" else InstructTask
    return task(path=str(data), limit=ROWS).train()


def _batches(
    model: "nn.Module", tokenizer: "transformers.PreTrainedTokenizerBase", conversations: list[Any]
) -> list[dict[str, "Tensor"]]:
    from deltalab.data.chat import encode_all
    from deltalab.data.collate import collate

    config: Any = model.config
    context = min(getattr(config, "max_position_embeddings", None) or 512, 512)
    samples = encode_all(tokenizer, conversations, context, "cut")
    parts = [samples[i : i + BATCH] for i in range(0, len(samples), BATCH)]
    batches = [collate(part, tokenizer.pad_token_id or 0) for part in parts]
    if getattr(config, "is_encoder_decoder", False):
        batches = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in batches]
    return batches


def _price(
    model: "nn.Module", merged: "nn.Module", batches: list[dict[str, "Tensor"]], data: Path | None
) -> "MergePrice":
    """With the loss on the replies of --data, where the model is a language model."""
    from deltalab.measure.merging import mean_loss, merge_price

    speaks = data is not None and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return merge_price(model, merged, batches, mean_loss(batches) if speaks else None)


def _require_near(price: "MergePrice", tol: float, model: "nn.Module", out: Path, into: str) -> None:
    """Raises: UserError if the logits are further off than `tol`."""
    import torch

    from deltalab.core.errors import UserError

    error = price.logits.error
    if error <= tol:  # not so for a NaN either
        return
    if into != "dequantise":
        least = (
            "--into dequantise, which loses nothing; --into correct with a higher --rank; the adapter beside its base"
        )
    elif model.dtype in (torch.bfloat16, torch.float16):
        least = f"--dtype float32: {str(model.dtype).removeprefix('torch.')} rounds the merged weights"
    else:
        least = "merge in Python and compare the weights: deltalab.merge_price"
    raise UserError(
        f"the merged model is off by {error:.2e}, more than the {tol:.2e} that --tol allows.",
        found=f"relative error of the logits over {price.logits.tokens:,} tokens; '{out}' was not made",
        next=f"{least}; or --tol {_above(error)}" if math.isfinite(error) else least,
    )


def _above(error: float) -> str:
    """The next number of one digit."""
    power = math.floor(math.log10(error))
    return f"{math.floor(error / 10**power) + 1}e{power}"


def _record(folder: Path, asked: dict[str, Any], model: "nn.Module", adapter: Path, price: "MergePrice") -> None:
    """`merge.json`: what was merged, how, what it costs, and with which versions."""
    from deltalab.core.files import file_digest, write_json
    from deltalab.core.records import FORMAT, environment
    from deltalab.deltas.peft_format import WEIGHTS
    from deltalab.deltas.weights import adaptation

    deltas = sorted({type(group.spec).__name__ for group in adaptation(model).groups})
    write_json(folder / RECORD, {
        "format": FORMAT, "kind": "merge",
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **asked, "dtype": str(model.dtype).removeprefix("torch."), "deltas": deltas,
        "adapter_digest": file_digest(adapter / WEIGHTS), "price": price.plain(), **environment(),
    })  # fmt: skip


def _way(model: "nn.Module", merged: "nn.Module", into: str) -> str:
    from deltalab.deltas.sites import is_quantised, linears
    from deltalab.deltas.weights import attached, is_adapted

    if not any(is_quantised(linear) for linear in linears(model).values()):
        return "merged"
    if is_adapted(merged):
        ranks = {pair.A.shape[0] for d in attached(merged).values() if (pair := d.factors())}  # type: ignore[operator]
        return f"{into}, an adapter of rank {max(ranks)} stays"
    return into


def _told(out: Path, into: str, verify: bool) -> str:
    checked = ", read again and compared" if verify else ""
    lines = [f"  written    {out}{checked}; what it cost: {out / RECORD}"]
    if (out / CORRECTION).is_dir():
        lines.append(
            f"  to load    model, tokenizer = deltalab.load('{out}'); deltalab.load_adapter(model, '{out / CORRECTION}')"
        )
    else:
        lines.append(f"  to load    deltalab.load('{out}')" + (", or transformers" if into == "dequantise" else ""))
    return "\n".join(lines)
