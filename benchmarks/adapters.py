"""What it takes to put an adapter on a model, to read, write, merge and change it, beside peft.

    .venv/bin/python -m benchmarks.adapters                      # 301 linears, hidden 256 and 1024; some minutes
    .venv/bin/python -m benchmarks.adapters --growth             # hidden 256, 77 to 602 linears, with the fitted exponent
    .venv/bin/python -m benchmarks.adapters --folder DIR         # where adapters are written: a disk, or /dev/shm

Llama shapes with random weights in fp32, LoRA r 8 on every linear of the blocks. Both sides get the same base and the same
adapter file, take turns in one process, and a ratio is the median over rounds of two calls of the same round. Before the
first round the sides are compared: logits of the loaded adapter, every merged weight, and the file that each writes.

attach    a new adapter, drawn          load      an adapter's file onto a plain model, trainable
save      the adapter to a folder; ours is on disk when the call ends, peft's is in the system's buffers. `save, on disk`
          has peft's file followed by the same fsync
merge     to a plain model: ours is a second model that shares what no delta touched, and the adapted one stays as it is;
          `merge_and_unload` writes over the base. `merge, base kept` gives peft the copy that this takes
unload    the adapter off again         set_active    another of two adapters
`load, no draw` is peft's with low_cpu_mem_usage=True, which draws nothing that the file then replaces, as ours.
"""

import argparse
import copy
import gc
import json
import math
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import deltalab as dl

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPEC = dl.LoRA(r=8, targets="all-linear")
SHAPES = {"256": (256, 43), "1024": (1024, 12)}
"""Name -> hidden, blocks of 7 linears. 43 blocks of hidden 1024 in fp32 are 2 GB, which is what several copies would be of."""
GROWTH = (11, 22, 43, 86)
ROUNDS, WARM_UP = 7, 1
SAME = 1e-5

Times = dict[str, float]


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


def require_same(model: nn.Module, file: Path, folder: Path) -> dict[str, float]:
    """Both sides of the same file: relative distance by norm of logits and merged weights; the files bit for bit."""
    ids = torch.arange(24).reshape(2, 12)
    plain = copy.deepcopy(model)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), file, is_trainable=True)
    dl.load_adapter(model, file)
    with torch.no_grad():
        far = {"logits": distance(model(ids).logits, theirs(ids).logits)}
    dl.save_adapter(model, folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    ours, other = (load_file(folder / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    if ours.keys() != other.keys() or not all(torch.equal(ours[key], other[key]) for key in ours):
        raise SystemExit("the two sides wrote different adapters")
    merged, other = dl.merged(model).state_dict(), theirs.merge_and_unload().state_dict()
    far["merged weights"] = max(distance(merged[key], other[key]) for key in other)
    dl.unload(model)
    base = plain.state_dict()
    if not all(torch.equal(base[key], value) for key, value in model.state_dict().items()):
        raise SystemExit("unload did not give back the base")
    if max(far.values()) > SAME:
        raise SystemExit(f"the two sides are different models: {far}")
    return far


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def timed(times: Times, name: str, call: Callable[[], Any]) -> Any:
    """What the call gives; its seconds go to `times`. Garbage of others is collected before."""
    gc.collect()
    began = time.perf_counter()
    result = call()
    times[name] = time.perf_counter() - began
    return result


def ours(model: nn.Module, file: Path, out: Path) -> Times:
    """One round; the model is as it was afterwards."""
    times: Times = {}
    timed(times, "attach", lambda: dl.adapt(model, SPEC))
    timed(times, "unload", lambda: dl.unload(model))
    timed(times, "load", lambda: dl.load_adapter(model, file))
    timed(times, "save", lambda: dl.save_adapter(model, out))
    timed(times, "merge", lambda: dl.merged(model))
    dl.adapt(model, SPEC, adapter="second")
    timed(times, "set_active", lambda: dl.set_active(model, "default"))
    dl.unload(model)
    return times | {"save, on disk": times["save"], "merge, base kept": times["merge"], "load, no draw": times["load"]}


def theirs(model: nn.Module, file: Path, out: Path) -> Times:
    """One round on copies: merging writes over the base."""
    times: Times = {}
    plain = copy.deepcopy(model)
    adapted: Any = timed(times, "attach", lambda: peft.get_peft_model(plain, config()))
    plain = timed(times, "unload", adapted.unload)
    adapted = timed(times, "load", lambda: peft.PeftModel.from_pretrained(plain, file, is_trainable=True))
    timed(times, "save", lambda: adapted.save_pretrained(out))
    times["save, on disk"] = times["save"] + synced(out)
    adapted.add_adapter("second", config())
    adapted.set_adapter("second")
    timed(times, "set_active", lambda: adapted.set_adapter("default"))
    adapted.delete_adapter("second")
    kept = timed(times, "copy", lambda: copy.deepcopy(adapted))
    timed(times, "merge", adapted.merge_and_unload)
    times["merge, base kept"] = times["merge"] + times.pop("copy")
    plain = kept.unload()
    fast = {"is_trainable": True, "low_cpu_mem_usage": True}
    timed(times, "load, no draw", lambda: peft.PeftModel.from_pretrained(plain, file, **fast))
    return times


def synced(folder: Path) -> float:
    """Seconds until what was written is on the disk."""
    began = time.perf_counter()
    for file in folder.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    return time.perf_counter() - began


def measured(hidden: int, blocks: int, folder: Path, rounds: int) -> dict[str, Any]:
    """Medians of both sides in milliseconds, and of the ratios of each round with their quartiles."""
    model = base(hidden, blocks)
    file = written(model, folder / "adapter")
    far = require_same(model, file, folder)
    sides: list[list[Times]] = [[], []]
    for i in range(rounds + WARM_UP):
        order = (ours, theirs) if i % 2 else (theirs, ours)
        for side in order:
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            found = side(model, file, out)
            if i >= WARM_UP:
                sides[side is theirs].append(found)
    rows = {}
    for name in sides[0][0]:
        a, b = ([times[name] for times in side] for side in sides)
        ratios = sorted(y / x for x, y in zip(a, b, strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "ours ms": 1e3 * statistics.median(a), "peft ms": 1e3 * statistics.median(b),
            "peft / ours": statistics.median(ratios), "quartiles": [low, high],
        }  # fmt: skip
    return {"hidden": hidden, "linears": 7 * blocks, "rows": rows, "same": far}


def exponent(points: list[tuple[int, float]]) -> float:
    """Of time ~ linears^p, by least squares on logarithms."""
    xs, ys = [math.log(n) for n, _ in points], [math.log(t) for _, t in points]
    return statistics.linear_regression(xs, ys).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="adapters are written here, in a folder of their own")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    shapes = [(256, blocks) for blocks in GROWTH] if given.growth else [SHAPES[name] for name in given.shapes]
    results = []
    for hidden, blocks in shapes:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            found = measured(hidden, blocks, Path(folder), given.rounds)
        results.append(found)
        print(f"hidden {hidden}, {found['linears']} linears, {given.threads} thread(s); apart by norm: {found['same']}")
        for name, row in found["rows"].items():
            low, high = row["quartiles"]
            print(f"  {name:16} ours {row['ours ms']:8.1f} ms   peft {row['peft ms']:8.1f} ms   "
                  f"peft / ours {row['peft / ours']:5.2f} ({low:.2f} to {high:.2f})")  # fmt: skip
    if given.growth:
        for name in results[0]["rows"]:
            grows = {
                s: exponent([(f["linears"], f["rows"][name][f"{s} ms"]) for f in results]) for s in ("ours", "peft")
            }
            print(f"  {name:16} grows with linears^{grows['ours']:.2f}, peft's with ^{grows['peft']:.2f}")
    if given.json:
        given.json.write_text(json.dumps({"threads": given.threads, "results": results}, indent=1))


if __name__ == "__main__":
    main()
