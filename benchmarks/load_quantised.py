"""Peak memory and time of loading a model quantised as it is read, against loading it whole and quantising it then.

    .venv/bin/python -m benchmarks load_quantised [--only nf4]

A random llama (hidden 2048, 12 layers, 1.3 GB in bfloat16, one shard a layer) is written to a temporary folder; each
side loads it in a process of its own, to float32 and to bfloat16, once. anonymous: what the process itself took at most,
above what it had after importing. resident: with the pages of the weight files that the system keeps in memory for it,
which it takes back when it needs them.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from benchmarks.harness import MOST, Asked, Row, exactly, in_child, memory_of, sampled

HIDDEN, MLP, LAYERS, VOCAB = 2048, 5632, 12, 8000
HOW, SIDES = ("int4-group", "nf4"), ("streaming", "whole first")
CONFIG = transformers.LlamaConfig(
    hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=16,
    num_key_value_heads=16, vocab_size=VOCAB, architectures=["LlamaForCausalLM"], pad_token_id=0,
)  # fmt: skip


def write(folder: Path, layers: int) -> int:
    """The model, without ever holding it; returns its bytes."""
    config = CONFIG.to_dict() | {"num_hidden_layers": 1}
    with torch.device("meta"):
        one = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in one.state_dict().items()}
    layer = {name: shape for name, shape in shapes.items() if ".layers." in name}
    shards = [{name: shape for name, shape in shapes.items() if name not in layer}]
    shards += [{name.replace(".0.", f".{i}."): shape for name, shape in layer.items()} for i in range(layers)]
    where, size = {}, 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shard.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        size += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    transformers.LlamaConfig(**CONFIG.to_dict() | {"num_hidden_layers": layers}).save_pretrained(folder)
    plain = Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>").save_pretrained(folder)
    return size


def loading(folder: str, side: str, how: str, dtype: str) -> dict[str, float]:
    """Load in this process; the figures."""
    from deltalab.deltas.quantise import quantise
    from deltalab.models.load import load
    from deltalab.quant.linear import quantiser

    before, began = memory_of("RssAnon"), time.perf_counter()
    with sampled("RssAnon", "VmRSS") as most:
        if side == "streaming":
            model, _ = load(folder, dtype=dtype, quantize=how)
        else:
            model, _ = load(folder, dtype=dtype)
            quantise(model, quantiser(how))
        spent = time.perf_counter() - began
    kept = sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    return {"anonymous": most[0] - before, "resident": most[1], "seconds": spent, "kept": kept}


def rows(asked: Asked) -> Iterator[Row]:
    cases = [(how, dtype) for how in HOW for dtype in ("float32", "bfloat16") if asked.wants("loading quantised", how, dtype)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), 1 if asked.quick else LAYERS)
        for how, dtype in cases[-1:] if asked.quick else cases:
            found = {side: in_child(loading, folder, side, how, dtype, threads=asked.threads) for side in SIDES}
            setting = f"{how}, to {dtype}, a file of {size / 2**30:.2f} GiB"
            for key, what in (("anonymous", "peak anonymous memory"), ("resident", "peak resident memory")):
                gib = {side: one[key] / 2**30 for side, one in found.items()}
                note = f"the model {found[SIDES[0]]['kept'] / 2**30:.2f} GiB"
                yield Row(f"loading quantised, {what}", setting, " / ".join(SIDES), exactly(*gib.values()), gib, "GiB",
                          direction=MOST, note=note)  # fmt: skip
            spent = {side: one["seconds"] for side, one in found.items()}
            yield Row("loading quantised, time", setting, " / ".join(SIDES), exactly(*spent.values()), spent, "s", direction=MOST)  # fmt: skip
