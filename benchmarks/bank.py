"""What a mixed batch costs: decoding one token a row, as a ratio to the base model's and to peft's.

    .venv/bin/python -m benchmarks bank

A random Llama of 4 layers (S: hidden 512, L: hidden 1024), LoRA r 8 on every linear of its blocks, one model a side: the
base, a bank, peft's mixed batch (`adapter_names=`, evaluation, no gradients: as its guide has it). They take turns, one
forward each a round. The rows are mixed; the bank opens its block in every forward, as a server would that asks for each
token. `other rows`: the same adapters, given to the rows anew each time; `other adapters`: as many out of twice as many, drawn
anew each time. `general`: every adapter by its own forward, as those go that have no low rank.

peft / ours cannot be more than peft / base, which a bank without any cost would reach: see that row.
"""

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import peft
import torch
import transformers
from torch import Tensor

import deltalab as dl
from benchmarks.harness import LEAST, MOST, Asked, Check, Row, Seconds, apart, compared, timed
from deltalab.models import bank as banks

ROUNDS, WARM_UP, RANK = 21, 3, 8
SIZES = {"S": (512, 1376), "L": (1024, 2752)}
MANY = "64 adapters, 64 rows"
CASES = {MANY: (64, 64), "8 adapters, 8 rows": (8, 8), "8 adapters, 64 rows": (8, 64)}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far the bank's logits may be from peft's; in bf16 it is as far as either is from fp32."""


def base(size: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """The same each time."""
    hidden, mlp = SIZES[size]
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=4, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
        intermediate_size=mlp, vocab_size=2048, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def adapters(folder: Path, count: int, size: str) -> dict[str, Path]:
    """Folders of adapters that do something."""
    found = {f"a{i}": folder / size / f"a{i}" for i in range(count)}
    model = base(size)
    for i, place in enumerate(found.values()):
        dl.adapt(model, dl.LoRA(r=RANK, targets="all-linear"), seed=i)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.01 * torch.randn_like(parameter)
        dl.save_adapter(model, place)
        dl.unload(model)
    return found


def in_peft(model: transformers.PreTrainedModel, folders: dict[str, Path]) -> peft.PeftModel:
    (first, place), *rest = folders.items()
    model = peft.PeftModel.from_pretrained(model, place, adapter_name=first)
    for name, folder in rest:
        model.load_adapter(folder, adapter_name=name)
    return model.eval()


@torch.no_grad()
def measure(
    size: str, dtype: torch.dtype, every: dict[str, Path], count: int, rows: int, rounds: int
) -> tuple[Seconds, Check]:
    """Seconds of the sides, of one case; and how far the bank's logits are from peft's. every: twice `count` of them."""
    draw = random.Random(0)
    mine = dict(list(every.items())[:count])
    names = [list(mine)[i % count] for i in range(rows)]
    draw.shuffle(names)
    ids = torch.randint(5, 2048, (rows, 1), generator=torch.Generator().manual_seed(0))
    plain, theirs, bank = base(size, dtype), in_peft(base(size, dtype), mine), dl.AdapterBank(base(size, dtype), every)

    def ours(which: dl.AdapterBank, names: list[str]) -> Tensor:
        with which.rows(names):
            return which.model(input_ids=ids).logits

    def others() -> list[str]:
        drawn = draw.sample(list(every), count)
        return draw.sample([drawn[i % count] for i in range(rows)], rows)

    sides: dict[str, Callable[[], Tensor]] = {
        "base": lambda: plain(input_ids=ids).logits,
        "peft": lambda: theirs(input_ids=ids, adapter_names=names).logits,
        "ours": lambda: ours(bank, names),
        "ours, other rows": lambda: ours(bank, draw.sample(names, rows)),
        "ours, other adapters": lambda: ours(bank, others()),
    }
    if dtype is torch.float32:
        general = in_general(base(size), mine)
        sides["ours, general"] = lambda: ours(general, names)
    check = Check("logits", apart(sides["ours"](), sides["peft"]()), BOUNDS[dtype])
    return timed(sides, rounds, WARM_UP), check


def in_general(model: transformers.PreTrainedModel, folders: dict[str, Path]) -> dl.AdapterBank:
    """A bank whose adapters all go by their own forwards."""
    with mock.patch.object(banks, "entry", lambda delta, where: delta):
        return dl.AdapterBank(model, folders)


def target(case: str, above: str, below: str) -> float | None:
    if case != MANY or "adapters" in above + below or "general" in above + below:
        return None
    if below == "base":
        return None if above == "peft" else 1.6
    return 3.0


def rows(asked: Asked) -> Iterator[Row]:
    what = "mixed batch decode"
    cases = [(size, dtype, case) for size in SIZES for case in CASES for dtype in BOUNDS if case == MANY or dtype is torch.float32]  # fmt: skip
    if asked.quick:
        cases = [("S", torch.float32, "8 adapters, 8 rows")]
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, dict[str, Path]] = {}
        for size, dtype, case in cases:
            setting = f"{size} {str(dtype)[6:]}, {case}"
            if not asked.wants(what, setting):
                continue
            count, width = CASES[case]
            if len(made.get(size, ())) < 2 * count:
                made[size] = adapters(Path(folder), 2 * count, size)
            every = dict(list(made[size].items())[: 2 * count])
            seconds, check = measure(size, dtype, every, count, width, asked.turns(ROUNDS))
            ways = list(seconds)[2:]
            for above, below in [("peft", "base"), *(("peft", way) for way in ways), *((way, "base") for way in ways)]:
                yield compared(what, setting, seconds, above, below, checks=[check], target=target(case, above, below),
                               direction=MOST if below == "base" else LEAST)  # fmt: skip
