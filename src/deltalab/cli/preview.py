"""`deltalab preview SPEC`: what the model will read and what it will learn, token by token."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from deltalab.data.chat import Encoded, Encodings
    from deltalab.train.spec import TrainSpec


def command(
    spec: Annotated[Path, typer.Argument(help="spec of a training run or a study (YAML)")],
    overrides: Annotated[list[str] | None, typer.Argument(help="changes to the spec: data.0.limit=20")] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="samples to show")] = 3,
    start: Annotated[int, typer.Option("--start", min=1, help="number of the first one")] = 1,
) -> None:
    """Show training samples token by token, with what is learnt from."""
    from rich.console import Console

    from deltalab.core.errors import UserError
    from deltalab.core.spec import override, read_yaml
    from deltalab.models.load import load_tokenizer
    from deltalab.train.parts import context_of, read_parts
    from deltalab.train.run import as_encodings, head_of, hold_out

    plan = training_part(override(read_yaml(spec), overrides or []), str(spec))
    config, tokenizer = load_tokenizer(plan.model)
    context = context_of(config, plan)
    parts = read_parts(plan)
    conversations, tests = [c for part in parts for c in part.train], [c for part in parts for c in part.test]
    samples = as_encodings(tokenizer, conversations, context, plan, head_of(plan)[1] is not None)
    if start > len(samples):
        raise UserError(
            f"there is no sample {start}.", found=f"{len(samples)} samples", next=f"--start 1 to {len(samples)}"
        )
    console = Console(highlight=False, soft_wrap=True)
    held_out = f"{len(tests)} more of the tasks' own" if tests else str(len(hold_out(samples, plan)[1]))
    console.print(
        f"{len(samples)} samples; held out to evaluate on: {held_out}\n"
        + overview(samples, context, plan.run.too_long),
        markup=False,
    )
    for number in range(start, min(start + n, len(samples) + 1)):
        console.print(f"\nsample {number}: {measures(samples[number - 1])}", style="bold", markup=False)
        console.print(tokens_text(samples[number - 1], tokenizer))


def training_part(values: dict[str, Any], origin: str) -> "TrainSpec":
    """The training run that the spec describes: its own, or the tuning of a study."""
    from deltalab.core.spec import build
    from deltalab.train.spec import TrainSpec

    if "data" in values or not values.keys() & {"study", "tune"}:
        return build(TrainSpec, values, origin)
    from deltalab.studies.drift import DriftStudySpec

    study = build(DriftStudySpec, values, origin)
    tune = study.tune
    return TrainSpec(
        model=study.model,
        adapt=tune.adapt,
        data=tune.data,
        optim=tune.optim,
        run=tune.run,
        eval=tune.eval,
        seed=study.seeds[0],
    )


def overview(samples: "Encodings", context: int, too_long: str) -> str:
    """Counts and lengths of the whole data set, and how to read what follows."""
    import numpy as np

    lengths = [len(sample.input_ids) for sample in samples]
    counted = [sample.counted for sample in samples]

    def spread(values: list[int]) -> str:
        low, middle, high, top = (int(v) for v in np.quantile(values, [0, 0.5, 0.9, 1]))
        return f"shortest {low}, median {middle}, 90 % up to {high}, longest {top}"

    return "\n".join([
        f"  context     {context} tokens; a longer sample is {'cut' if too_long == 'cut' else 'skipped'}: {samples.cut} cut, {samples.skipped} skipped",
        f"  unlabelled  {samples.unlabelled} left out, because no token of theirs counts",
        f"  tokens      {spread(lengths)}; {sum(lengths):,} in all",
        f"  counted     {spread(counted)}; {sum(counted):,} in all, {100 * sum(counted) / sum(lengths):.0f} %",
        "\nTokens are parted by │; what is learnt stands in «…»; ⏎ is a line break.",
    ])  # fmt: skip


def measures(sample: "Encoded") -> str:
    """One sample's lengths, or its class."""
    if sample.choice is not None:
        return f"{len(sample.input_ids)} tokens, class {sample.choice}{', cut to the context' if sample.cut else ''}"
    return f"{len(sample.input_ids)} tokens, {sample.counted} counted{', cut to the context' if sample.cut else ''}"


def tokens_text(sample: "Encoded", tokenizer: "PreTrainedTokenizerBase") -> "Text":
    """Every token, parted by │, with the counted ones in «…» and in colour."""
    from rich.text import Text

    text, inside = Text(), False
    for number, (token, label) in enumerate(zip(sample.input_ids, sample.labels, strict=True)):
        counted = label != -100 and sample.choice is None
        if counted != inside:
            text.append("«" if counted else "»", "bold green")
        elif number:
            text.append("│", "dim")
        text.append(token_text(token, tokenizer), "green" if counted else "")
        inside = counted
    if inside:
        text.append("»", "bold green")
    return text


def token_text(token: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A token as readable text; a part of a character as the tokenizer calls it."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    shown = name.replace("▁", " ") if "▁" in name else str(tokenizer.decode([token]))
    return (name if "\ufffd" in shown or not shown else shown).replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
