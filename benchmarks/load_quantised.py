"""Peak memory and time of loading a model quantised as it is read, against loading it whole and quantising it then.

    .venv/bin/python benchmarks/load_quantised.py [int4-group]

A random llama (hidden 2048, 12 layers, 1.3 GB in bfloat16, one shard a layer) is written to a temporary folder; each
side loads it in a process of its own, to float32 and to bfloat16. anonymous: what the process itself took at most,
above what it had after importing. resident: with the pages of the weight files that the system keeps in memory for it,
which it takes back when it needs them.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

HIDDEN, MLP, LAYERS, VOCAB = 2048, 5632, 12, 8000
CONFIG = transformers.LlamaConfig(
    hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=16,
    num_key_value_heads=16, vocab_size=VOCAB, architectures=["LlamaForCausalLM"], pad_token_id=0,
)  # fmt: skip


def write(folder: Path) -> int:
    """The model, without ever holding it; returns its bytes."""
    config = CONFIG.to_dict() | {"num_hidden_layers": 1}
    with torch.device("meta"):
        one = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in one.state_dict().items()}
    layer = {name: shape for name, shape in shapes.items() if ".layers." in name}
    shards = [{name: shape for name, shape in shapes.items() if name not in layer}]
    shards += [{name.replace(".0.", f".{i}."): shape for name, shape in layer.items()} for i in range(LAYERS)]
    where, size = {}, 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shard.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        size += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    CONFIG.save_pretrained(folder)
    plain = Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>").save_pretrained(folder)
    return size


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what + ":")) * 1024


def child(folder: str, side: str, how: str, dtype: str) -> None:
    """Load, and print the figures."""
    from deltalab.deltas.quantise import quantise
    from deltalab.models.load import load
    from deltalab.quant.linear import quantiser

    torch.set_num_threads(1)
    before, most, done = resident("RssAnon"), [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[:] = max(most[0], resident("RssAnon")), max(most[1], resident("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    if side == "streaming":
        model, _ = load(folder, dtype=dtype, quantize=how)
    else:
        model, _ = load(folder, dtype=dtype)
        quantise(model, quantiser(how))
    spent = time.perf_counter() - began
    done.set()
    watcher.join()
    kept = sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    print(json.dumps({"anonymous": most[0] - before, "resident": most[1], "seconds": spent, "kept": kept}))


def main(how: str = "int4-group") -> None:
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder))
        print(f"file {size / 2**30:.2f} GiB in bfloat16, {how}")
        for dtype in ("float32", "bfloat16"):
            for side in ("streaming", "whole first"):
                command = [sys.executable, __file__, "child", folder, side, how, dtype]
                ran = subprocess.run(command, capture_output=True, text=True, check=True)
                made = json.loads(ran.stdout.splitlines()[-1])
                gib = {key: f"{made[key] / 2**30:.2f} GiB" for key in ("anonymous", "resident", "kept")}
                print(
                    f"{dtype:9} {side:12} peak anonymous {gib['anonymous']}, resident {gib['resident']}; "
                    f"the model {gib['kept']}; {made['seconds']:.0f} s"
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
