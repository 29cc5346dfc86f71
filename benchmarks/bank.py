"""What a mixed batch costs: decoding one token a row, as a ratio to the base model's and to peft's.

    .venv/bin/python benchmarks/bank.py runs/bank        # writes bank.json there, prints a table

A random Llama (hidden 1024, 4 layers), LoRA r 8 on every linear of its blocks, one model a side: the base, a bank, peft's
mixed batch (`adapter_names=`). They take turns, one forward each a round, in one process and one thread; a ratio is the
median over rounds of two forwards of the same round, with the quartiles. The rows are mixed; the bank opens its block in
every forward, as a server would that asks for each token. `anew`: another assignment of rows each time, so the bank
stacks its adapters every time too. `general`: every adapter by its own forward, as those go that have no low rank.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import deltalab as dl
from deltalab.models import bank as banks

ROUNDS, WARM_UP, RANK = 21, 3, 8
CASES = {"64 adapters, 64 rows": (64, 64), "8 adapters, 8 rows": (8, 8), "8 adapters, 64 rows": (8, 64)}


def base() -> transformers.PreTrainedModel:
    """The same each time."""
    config = transformers.LlamaConfig(
        hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=16, intermediate_size=2752,
        vocab_size=2048, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def adapters(folder: Path, count: int) -> dict[str, Path]:
    """Folders of adapters that do something."""
    found = {f"a{i}": folder / f"a{i}" for i in range(count)}
    model = base()
    for i, place in enumerate(found.values()):
        dl.adapt(model, dl.LoRA(r=RANK, targets="all-linear"), seed=i)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.01 * torch.randn_like(parameter)
        dl.save_adapter(model, place)
        dl.unload(model)
    return found


def in_peft(folders: dict[str, Path]) -> peft.PeftModel:
    (first, place), *rest = folders.items()
    model = peft.PeftModel.from_pretrained(base(), place, adapter_name=first)
    for name, folder in rest:
        model.load_adapter(folder, adapter_name=name)
    return model.eval()


@torch.no_grad()
def measure(folders: dict[str, Path], rows: int) -> dict[str, Any]:
    """Ratios of the sides, of one case; and how far the bank's logits are from peft's."""
    names = [list(folders)[i % len(folders)] for i in range(rows)]
    random.Random(0).shuffle(names)
    ids = torch.randint(5, 2048, (rows, 1), generator=torch.Generator().manual_seed(0))
    plain, theirs = base(), in_peft(folders)
    bank = dl.AdapterBank(base(), folders)
    general = dl.AdapterBank(base())
    as_it_is = banks.entry
    banks.entry = lambda delta, where: delta  # type: ignore[assignment]
    for name, folder in folders.items():
        general.add(name, folder)
    banks.entry = as_it_is

    def ours(which: dl.AdapterBank, anew: bool = False) -> Tensor:
        if anew:
            which._runs.clear()
        with which.rows(names):
            return which.model(input_ids=ids).logits

    sides: dict[str, Callable[[], Tensor]] = {
        "base": lambda: plain(input_ids=ids).logits,
        "peft": lambda: theirs(input_ids=ids, adapter_names=names).logits,
        "ours": lambda: ours(bank),
        "ours, anew": lambda: ours(bank, anew=True),
        "ours, general": lambda: ours(general),
    }
    error = float((sides["ours"]() - sides["peft"]()).norm() / sides["peft"]().norm())
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(ROUNDS + WARM_UP):
        for side, run in sides.items():
            began = time.perf_counter()
            run()
            if turn >= WARM_UP:
                seconds[side].append(time.perf_counter() - began)
    result: dict[str, Any] = {f"{side} / base": ratio(seconds[side], seconds["base"]) for side in list(sides)[1:]}
    result["peft / ours"] = ratio(seconds["peft"], seconds["ours"])
    milliseconds = {side: round(1e3 * statistics.median(taken), 2) for side, taken in seconds.items()}
    return {**result, "milliseconds": milliseconds, "bytes": bank.nbytes, "error against peft": error}


def ratio(above: list[float], below: list[float]) -> str:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    torch.set_num_threads(1)
    home = Path(sys.argv[1])
    home.mkdir(parents=True, exist_ok=True)
    every = adapters(home, max(count for count, _ in CASES.values()))
    found = {case: measure(dict(list(every.items())[:count]), rows) for case, (count, rows) in CASES.items()}
    (home / "bank.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    for case, values in found.items():
        print(f"{case}, {values['bytes']:,} bytes of adapters; {values['error against peft']:.1e} from peft")
        for name, value in values.items():
            if "/" in name:
                print(f"  {name:<22} {value}")
