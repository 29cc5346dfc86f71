"""Peak memory of `dl.load` beside transformers' `from_pretrained`, and above the model that it leaves.

    .venv/bin/python -m benchmarks loading [--only 'to float32']

A random llama (hidden 2048, 6 layers, one shard a layer, .65 GB in bfloat16, 1.3 GB in float32) is written to a temporary
folder; each side loads it in a process of its own.

anonymous: what the process itself takes, which nobody can take back. A file in the dtype that is asked for is mapped, so
nearly nothing is anonymous: its pages are read when they are used, shared with other processes, and the system may drop them.
A file in another dtype is converted tensor by tensor; quantised, it becomes codes matrix by matrix. In none of these is there
a second copy of the model. resident: with the mapped pages of the files that are in memory at that time.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.harness import MOST, Asked, Check, Row, exactly, in_child, memory_of, sampled
from benchmarks.load_quantised import write

LAYERS = 6
CASES = (("float32", "float32", None), ("bfloat16", "bfloat16", None), ("bfloat16", "float32", None),
         ("bfloat16", "bfloat16", "nf4"), ("bfloat16", "bfloat16", "int4-group"))  # fmt: skip
"""dtype of the file, the dtype asked for, and how it is quantised."""
MATRICES = 4 * 4 * 2048 * 5632
"""Bytes above what stays that a load may take: the largest matrix four times in fp32."""


def rows(asked: Asked) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folders = {"bfloat16": Path(name) / "bfloat16", "float32": Path(name) / "float32"}
        for folder in folders.values():
            folder.mkdir()
        write(folders["bfloat16"], 1 if asked.quick else LAYERS)
        widened(folders["bfloat16"], folders["float32"])
        for kept, wanted, how in CASES:
            setting = f"a file in {kept}, to {how or wanted}"
            if not asked.wants("loading", setting):
                continue
            sides = ("ours",) if how else ("ours", "transformers")
            found = {s: in_child(loading, str(folders[kept]), s, wanted, how, threads=asked.threads) for s in sides}
            yield from shown(setting, found)


def shown(setting: str, found: dict[str, dict[str, float]]) -> Iterator[Row]:
    """The rows of one case."""
    mine, mib = found["ours"], 2**20
    over = Check(
        "peak above what stays, of the bytes of four matrices", (mine["anonymous"] - mine["left"]) / MATRICES, 1.0
    )
    for key in ("anonymous", "resident"):
        sizes = {side: one[key] / mib for side, one in found.items()} | {"the model": mine["kept"] / mib}
        below = "transformers" if "transformers" in found else "the model"
        yield Row(f"loading, peak {key} memory", setting, f"ours / {below}", exactly(sizes["ours"], sizes[below]), sizes,
                  "MiB", direction=MOST, checks=[over] if key == "anonymous" else [])  # fmt: skip
    spent = {side: one["seconds"] for side, one in found.items()}
    if "transformers" in spent:
        yield Row("loading, time", setting, "ours / transformers", exactly(*spent.values()), spent, "s", direction=MOST)


def widened(folder: Path, into: Path) -> None:
    """The same model in float32."""
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            save_file({key: t.float() for key, t in load_file(file).items()}, into / file.name, {"format": "pt"})
        else:
            shutil.copy(file, into)


def loading(folder: str, side: str, dtype: str, how: str | None) -> dict[str, float]:
    """Load in this process. Bytes above those before; left: what is anonymous when the model is there."""
    import deltalab as dl

    assert callable(dl.load)  # its modules are imported
    before = memory_of("RssAnon"), memory_of("VmRSS")
    began = time.perf_counter()
    with sampled("RssAnon", "VmRSS") as most:
        if side == "ours":
            model, _ = dl.load(folder, dtype=dtype, quantize=how)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    spent, left = time.perf_counter() - began, memory_of("RssAnon") - before[0]
    kept = sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    return {"anonymous": most[0] - before[0], "resident": most[1] - before[1], "seconds": spent, "left": left, "kept": kept}  # fmt: skip
