"""The price of merging into a quantised base: the tables of docs/results/merging.md.

    .venv/bin/python tools/merging.py run runs/merging        # every tuning and merge, one JSON line each; goes on where it stopped
    .venv/bin/python tools/merging.py table runs/merging

The skill is the one of tools/methods.py: the past tense of regular verbs, which the bundled model was never trained on. A
LoRA on every linear of a quantised base learns it; then it is merged in each way, and what came out is set against the
adapted model: logits on the test split's questions with their answers, weights, bytes, and the answers that are right.
Every rank has the scale s = 2 √(8 / r), rsLoRA's with that of r 8 in docs/results/methods.md, so that a change has about
one size at every rank. peft's own merge into bitsandbytes' 4 bits takes the same adapter file.
"""

import copy
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from methods import NEW, TAUGHT, questions, right
from torch import nn

import deltalab as dl
from deltalab.data.chat import Conversation, encode_all
from deltalab.data.collate import collate
from deltalab.deltas.adapt import attached, base_weight
from deltalab.deltas.base import Factors
from deltalab.deltas.factored import put_factors
from deltalab.deltas.init import pissa
from deltalab.measure.merging import logits_gap, matrix_error, mean_loss, model_bytes
from deltalab.train.spec import LoopSpec, OptimSpec

STEPS, BATCH, RATE, SEEDS = 150, 16, 1e-3, (42, 1337, 2024)
RANKS = {"nf4": (4, 8, 16, 32, 64), "int4-group": (4, 16, 64), "int8": (4, 16, 64)}
WAYS: dict[str, dict[str, Any]] = {
    "dequantise": {"into": "dequantise"},
    "requantise": {"into": "requantise"},
    "correct r 8": {"into": "correct", "rank": 8},
    "correct r 8, 5 steps": {"into": "correct", "rank": 8, "steps": 5},
}
CUT = "codes kept, change cut to r 8"
PEFT = "peft, bitsandbytes"
ADAPTED = "not merged"


def trained(base: str, rank: int, seed: int, folder: Path) -> tuple[nn.Module, Any]:
    """The quantised bundled model with the adapter of this run, which is trained if it is not there."""
    place = folder / "adapters" / f"{base}-r{rank}-seed{seed}"
    model, tokenizer = dl.load("organism", quantize=base)
    if place.is_dir():
        return dl.load_adapter(model, place).eval(), tokenizer
    spec = dl.LoRA(r=rank, alpha=2 * 8**0.5, rank_stabilised=True, targets="all-linear")
    dl.adapt(model, spec, seed=seed)
    data = [Conversation.of(question, answer) for question, answer in questions("train", TAUGHT)]
    loop = LoopSpec(optim=OptimSpec(lr=RATE, steps=STEPS, batch=BATCH), eval={"fraction": 0.0}, seed=seed)
    dl.train(model, tokenizer, data, spec=loop, progress=False)
    dl.save_adapter(model, place)
    return model.eval(), tokenizer


def batches(tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """The test split's questions with their answers."""
    data = [Conversation.of(question, answer) for question, answer in questions("test")]
    samples = encode_all(tokenizer, data, 256)
    return [collate(samples[i : i + 35], tokenizer.pad_token_id) for i in range(0, len(samples), 35)]


def answers(model: nn.Module, tokenizer: Any) -> dict[str, list[bool]]:
    """Which are right, on new verbs and on the taught ones in a phrasing that was not."""
    return {"new verbs": right(model, tokenizer, questions("test")), "taught verbs": right(model, tokenizer, questions("train", (NEW,)))}  # fmt: skip


def measured(base: str, rank: int, seed: int, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(way, what came of it), the adapted model itself first."""
    model, tokenizer = trained(base, rank, seed, folder)
    asked = batches(tokenizer)
    loss = mean_loss(asked)
    paths = list(attached(model))
    sizes = [float(dl.delta_weight(model, p).norm() / base_weight(model, p).norm()) for p in paths]
    yield ADAPTED, {"bytes": model_bytes(model), "loss": loss(model), "change": sum(sizes) / len(sizes), **answers(model, tokenizer)}  # fmt: skip
    for way in (*WAYS, CUT):
        plain = cut(model, 8) if way == CUT else dl.merged(model, **WAYS[way])
        weights = [matrix_error(model, plain, path) for path in paths]
        yield (
            way,
            {
                "logits": vars(logits_gap(model, plain, asked)),
                "bytes": model_bytes(plain),
                "loss": loss(plain),
                "of weight": sum(w.of_weight for w in weights) / len(weights),
                "of change": sum(w.of_change or 0.0 for w in weights) / len(weights),
                **answers(plain, tokenizer),
            },
        )
    if base == "nf4":
        yield PEFT, by_peft(folder / "adapters" / f"{base}-r{rank}-seed{seed}", model, tokenizer, asked)


def cut(model: nn.Module, rank: int) -> nn.Module:
    """The base as it is under the best approximation of each change by `rank`: no merge, and nothing is quantised again."""
    base = dl.unload(copy.deepcopy(model))
    changes = {path: Factors(*pissa(dl.delta_weight(model, path), rank, 1.0), 1.0) for path in attached(model)}
    return put_factors(base, changes)


def by_peft(adapter: Path, ours: nn.Module, tokenizer: Any, asked: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The same adapter by peft on bitsandbytes' linears, merged there; the gap is to its own unmerged model."""
    import peft
    import transformers

    from deltalab.models.load import _bundled

    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                          bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_pretrained(
        _bundled("organism"), quantization_config=how, dtype=torch.float32
    )
    for (
        module
    ) in base.modules():  # its forward on the CPU packs the codes for bfloat16 products, and peft merges them as if not
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    start = logits_gap(ours, model, asked)
    logits = []
    with torch.no_grad():
        for batch in asked:
            logits.append(model(**{k: v for k, v in batch.items() if k != "labels"}).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that merging to 4 bits rounds
        merged = model.merge_and_unload()
    return {"logits": vars(logits_gap(_Kept(asked, logits), merged, asked)), "from ours": start.error, **answers(merged, tokenizer)}  # fmt: skip


class _Kept(nn.Module):
    """Gives logits that were computed before, batch by batch."""

    def __init__(self, asked: list[dict[str, torch.Tensor]], logits: list[torch.Tensor]) -> None:
        super().__init__()
        self.device_of = nn.Parameter(torch.zeros(1))
        self.of = {id(batch["input_ids"]): one for batch, one in zip(asked, logits, strict=True)}

    def forward(self, input_ids: torch.Tensor, **rest: Any) -> Any:
        import transformers

        return transformers.modeling_outputs.CausalLMOutput(logits=self.of[id(input_ids)])


class Results:
    """What is measured so far, in `merges.jsonl`, one line each."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "merges.jsonl"
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.done = {tuple(entry["key"]): entry for entry in map(json.loads, lines)}

    def add(self, base: str, rank: int, seed: int) -> None:
        """Train, merge and measure, unless all of it is there."""
        ways = [ADAPTED, *WAYS, CUT, *([PEFT] if base == "nf4" else [])]
        if all((base, rank, seed, way) in self.done for way in ways):
            return
        for way, entry in measured(base, rank, seed, self.folder):
            key = (base, rank, seed, way)
            if key in self.done:
                continue
            self.done[key] = {"key": key, **entry}
            with self.file.open("a") as file:
                file.write(json.dumps(self.done[key]) + "\n")
            shares = {k: round(sum(entry[k]) / len(entry[k]), 3) for k in ("new verbs", "taught verbs")}
            print(*key, f"{entry['logits']['error']:.2e}" if "logits" in entry else "", shares, flush=True)


def run(folder: Path, bases: list[str]) -> None:
    """Every tuning, NF4's first, seed by seed."""
    torch.set_num_threads(1)
    results = Results(folder)
    for base in bases:
        for seed in SEEDS:
            for rank in RANKS[base]:
                results.add(base, rank, seed)


if __name__ == "__main__":
    what, place, *chosen = sys.argv[1:]
    if what == "run":
        run(Path(place), chosen or list(RANKS))
