"""An adapter attached, loaded, saved, merged, taken off and changed for another, beside peft; how that grows with the linears.

    .venv/bin/python -m benchmarks adapters [--only 'hidden 256']

Llama shapes with random weights in fp32, LoRA r 8 on every linear of the blocks. Both sides get the same base and the same
adapter's file and take turns in one process. Before the first round they are compared: the logits under the loaded
adapter, every merged weight, the files that they write (bit for bit), and what `unload` leaves (bit for bit the base).

attach: a new adapter, its start drawn. load: from a file onto a plain model, to be trained on; peft's also with
`low_cpu_mem_usage=True`, which draws nothing that the file then replaces, as ours draws nothing.
save: ours is on the disk when the call ends, peft's in the system's buffers; `peft, on disk` has the same fsync after it.
merge: to a plain model. Ours is a second one that shares what no delta touched, and the adapted one stays as it is; peft's
`merge_and_unload` writes over the base. `peft, base kept` takes the copy that is needed for that.
The growth is the exponent p of time ~ linears^p, by least squares on logarithms of the medians over 77, 154, 301 and 602
linears.
"""

import copy
import gc
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import deltalab as dl
from benchmarks.harness import MOST, Asked, Check, Row, Seconds, apart, compared, exactly

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPEC = dl.LoRA(r=8, targets="all-linear")
WANTED = {"attach": 10.0, "load": 20.0, "save": 3.0, "merge": 2.0, "unload": None, "set_active": None}
VARIANTS = {"load": "peft, no draw", "save": "peft, on disk", "merge": "peft, base kept"}
SHAPES = ((256, 43), (1024, 12))
"""Hidden, blocks of 7 linears. 43 blocks of hidden 1024 would be 2 GB, and there are several copies."""
GROWTH = (11, 22, 43, 86)
SAME = 1e-5


def rows(asked: Asked) -> Iterator[Row]:
    shapes = [(64, 3)] if asked.quick else SHAPES
    for hidden, blocks in shapes:
        setting = f"hidden {hidden}, {7 * blocks} linears"
        if asked.wants(setting):
            seconds, checks = measured(hidden, blocks, asked, asked.turns(9))
            for what, target in WANTED.items():
                for peft_side in ["peft", *([VARIANTS[what]] if what in VARIANTS else [])]:
                    goal = target if peft_side == "peft" else None
                    yield compared(what, setting, seconds[what], peft_side, "ours", target=goal, checks=checks)
    if asked.wants("growth"):
        yield from growth(asked)


def growth(asked: Asked) -> Iterator[Row]:
    """The exponents of both sides."""
    found = {blocks: measured(64 if asked.quick else 256, blocks, asked, asked.turns(5))[0]
             for blocks in (GROWTH[:2] if asked.quick else GROWTH)}  # fmt: skip
    for what in WANTED:
        powers = {}
        for side in ("ours", "peft"):
            taken = {7 * blocks: statistics.median(seconds[what][side]) for blocks, seconds in found.items()}
            xs, ys = [math.log(n) for n in taken], [math.log(t) for t in taken.values()]
            powers[side] = statistics.linear_regression(xs, ys).slope
        yield Row(f"{what}: growth", "hidden 256, time ~ linears^p", "p of ours", exactly(powers["ours"], 1.0), powers,
                  unit="", target=1.1, direction=MOST)  # fmt: skip


def measured(hidden: int, blocks: int, asked: Asked, rounds: int) -> tuple[dict[str, Seconds], list[Check]]:
    """What -> seconds of each side in each round; how far the sides are apart."""
    asked.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        model = base(hidden, blocks)
        file = written(model, folder / "adapter")
        checks = compare(model, file, folder)
        seconds: dict[str, Seconds] = {}
        for turn in range(rounds + 1):  # the first one warms up
            for side in (ours, theirs) if turn % 2 else (theirs, ours):
                shutil.rmtree(folder / "out", ignore_errors=True)
                for (what, who), spent in side(model, file, folder / "out").items():
                    if turn:
                        seconds.setdefault(what, {}).setdefault(who, []).append(spent)
    return seconds, checks


def base(hidden: int, blocks: int) -> transformers.PreTrainedModel:
    """The same each time."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=blocks, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=hidden * 11 // 4, vocab_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def config() -> peft.LoraConfig:
    return peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)


def written(model: nn.Module, folder: Path) -> Path:
    """An adapter that does something."""
    dl.adapt(model, SPEC)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    dl.save_adapter(model, folder)
    dl.unload(model)
    return folder


def compare(model: nn.Module, file: Path, folder: Path) -> list[Check]:
    """Both sides of the same file."""
    ids = torch.arange(24).reshape(2, 12)
    before = copy.deepcopy(model).state_dict()
    other = peft.PeftModel.from_pretrained(copy.deepcopy(model), file, is_trainable=True)
    dl.load_adapter(model, file)
    with torch.no_grad():
        checks = [Check("logits", apart(model(ids).logits, other(ids).logits), SAME)]
    dl.save_adapter(model, folder / "ours")
    other.save_pretrained(folder / "theirs")
    mine, its = (load_file(folder / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    checks.append(Check("files", differing(mine, its), 0))
    merged, want = dl.merged(model).state_dict(), other.merge_and_unload().state_dict()
    checks.append(Check("merged weights", max(apart(merged[key], want[key]) for key in want), SAME))
    dl.unload(model)
    return [*checks, Check("unloaded", differing(model.state_dict(), before), 0)]


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """How many tensors are not bitwise the same in both."""
    return float(len(a.keys() ^ b.keys()) + sum(not torch.equal(a[key], b[key]) for key in a.keys() & b.keys()))


def clock(times: dict[tuple[str, str], float], what: str, side: str, call: Callable[[], Any]) -> Any:
    """What the call gives; its seconds go to `times`. Garbage of what was before is collected first."""
    gc.collect()
    began = time.perf_counter()
    result = call()
    times[what, side] = time.perf_counter() - began
    return result


def ours(model: nn.Module, file: Path, out: Path) -> dict[tuple[str, str], float]:
    """One round; the model is as it was afterwards."""
    times: dict[tuple[str, str], float] = {}
    clock(times, "attach", "ours", lambda: dl.adapt(model, SPEC))
    clock(times, "unload", "ours", lambda: dl.unload(model))
    clock(times, "load", "ours", lambda: dl.load_adapter(model, file))
    clock(times, "save", "ours", lambda: dl.save_adapter(model, out))
    clock(times, "merge", "ours", lambda: dl.merged(model))
    dl.adapt(model, SPEC, adapter="second")
    clock(times, "set_active", "ours", lambda: dl.set_active(model, "default"))
    dl.unload(model)
    return times


def theirs(model: nn.Module, file: Path, out: Path) -> dict[tuple[str, str], float]:
    """One round on a copy: merging writes over the base."""
    times: dict[tuple[str, str], float] = {}
    plain = copy.deepcopy(model)
    adapted: Any = clock(times, "attach", "peft", lambda: peft.get_peft_model(plain, config()))
    plain = clock(times, "unload", "peft", adapted.unload)
    adapted = clock(times, "load", "peft", lambda: peft.PeftModel.from_pretrained(plain, file, is_trainable=True))
    clock(times, "save", "peft", lambda: adapted.save_pretrained(out))
    times["save", "peft, on disk"] = times["save", "peft"] + synced(out)
    adapted.add_adapter("second", config())
    adapted.set_adapter("second")
    clock(times, "set_active", "peft", lambda: adapted.set_adapter("default"))
    adapted.delete_adapter("second")
    kept = clock(times, "merge", "peft, base kept", lambda: copy.deepcopy(adapted))
    clock(times, "merge", "peft", adapted.merge_and_unload)
    times["merge", "peft, base kept"] += times["merge", "peft"]
    plain, fast = kept.unload(), {"is_trainable": True, "low_cpu_mem_usage": True}
    clock(times, "load", "peft, no draw", lambda: peft.PeftModel.from_pretrained(plain, file, **fast))
    return times


def synced(folder: Path) -> float:
    """Seconds until what was written is on the disk."""
    began = time.perf_counter()
    for file in folder.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    return time.perf_counter() - began
