"""What a mixed batch costs: decoding one token a row, as a ratio to the base model's and to peft's.

    .venv/bin/python -m benchmarks bank

A random Llama (hidden 1024, 4 layers), LoRA r 8 on every linear of its blocks, one model a side: the base, a bank, peft's
mixed batch (`adapter_names=`). They take turns, one forward each a round. The rows are mixed; the bank opens its block in
every forward, as a server would that asks for each token. `anew`: another assignment of rows each time, so the bank
stacks its adapters every time too. `general`: every adapter by its own forward, as those go that have no low rank.
"""

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor

import deltalab as dl
from benchmarks.harness import LEAST, MOST, Asked, Check, Row, Seconds, apart, compared, timed
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
def measure(folders: dict[str, Path], rows: int, rounds: int) -> tuple[Seconds, Check]:
    """Seconds of the sides, of one case; and how far the bank's logits are from peft's."""
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
    check = Check("logits", apart(sides["ours"](), sides["peft"]()), 1e-5)
    return timed(sides, rounds, WARM_UP), check


TARGETS = {("64 adapters, 64 rows", "peft / ours"): 3.0, ("64 adapters, 64 rows", "ours / base"): 1.6}


def rows(asked: Asked) -> Iterator[Row]:
    cases = {case: size for case, size in CASES.items() if asked.wants("mixed batch decode", case)}
    cases = {"8 adapters, 8 rows": (8, 8)} if asked.quick else cases
    with tempfile.TemporaryDirectory() as folder:
        every = adapters(Path(folder), max((count for count, _ in cases.values()), default=0))
        for case, (count, size) in cases.items():
            seconds, check = measure(dict(list(every.items())[:count]), size, asked.turns(ROUNDS))
            pairs = [("peft", "ours"), *((side, "base") for side in list(seconds)[1:])]
            for above, below in pairs:
                of = f"{above} / {below}"
                yield compared("mixed batch decode", case, seconds, above, below, checks=[check],
                               target=TARGETS.get((case, of)), direction=MOST if below == "base" else LEAST)  # fmt: skip
