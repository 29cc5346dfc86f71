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
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from methods import NEW, TAUGHT, difference, percent, questions, right
from torch import nn
from tunings import Lines

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
    for module in base.modules():  # on the CPU its forward packs the codes for bfloat16, and peft merges them as if not
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


class Results(Lines):
    """What is measured so far, in `merges.jsonl`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "merges.jsonl")
        self.folder = folder

    def measure(self, base: str, rank: int, seed: int) -> None:
        """Train, merge and measure, unless all of it is there."""
        ways = [ADAPTED, *WAYS, CUT, *([PEFT] if base == "nf4" else [])]
        if all((base, rank, seed, way) in self.done for way in ways):
            return
        for way, entry in measured(base, rank, seed, self.folder):
            key = (base, rank, seed, way)
            if key in self.done:
                continue
            self.add(key, entry)
            shares = {k: round(sum(entry[k]) / len(entry[k]), 3) for k in ("new verbs", "taught verbs")}
            print(*key, f"{entry['logits']['error']:.2e}" if "logits" in entry else "", shares, flush=True)


def run(folder: Path, bases: list[str]) -> None:
    """Every tuning, NF4's first, seed by seed."""
    torch.set_num_threads(1)
    results = Results(folder)
    for base in bases:
        for seed in SEEDS:
            for rank in RANKS[base]:
                results.measure(base, rank, seed)


def table(folder: Path, base: str) -> str:
    """One line a rank and way; the numbers are means over the seeds, errors with the lowest and the highest."""
    done = Results(folder).done
    lines = [
        "| r | way | logits, error % | KL, 10⁻³ nats | same choice, % | error, % of weight | error, % of change | new verbs, % | against not merged | taught verbs, % | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rank in RANKS[base]:
        unmerged = [done[base, rank, seed, ADAPTED]["new verbs"] for seed in SEEDS]
        for way in (ADAPTED, *WAYS, CUT, *([PEFT] if base == "nf4" else [])):
            entries = [done[base, rank, seed, way] for seed in SEEDS]
            new = [entry["new verbs"] for entry in entries]
            cells = [str(rank), way, *gap(entries), *(spread(entries, of) for of in ("of weight", "of change"))]
            cells += [percent(new), "" if way == ADAPTED else difference(new, unmerged), percent([e["taught verbs"] for e in entries])]  # fmt: skip
            cells.append(f"{entries[0]['bytes'] / 2**20:.1f}" if "bytes" in entries[0] else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gap(entries: list[dict[str, Any]]) -> list[str]:
    """Of the logits: their error, KL and agreement."""
    if "logits" not in entries[0]:
        return ["", "", ""]
    found = [entry["logits"] for entry in entries]
    kl, same = (sum(one[key] for one in found) / len(found) for key in ("kl", "agreement"))
    return [spread(found, "error"), f"{1e3 * kl:.2g}", f"{100 * same:.1f}"]


def spread(entries: list[dict[str, Any]], key: str) -> str:
    """Mean, lowest and highest, in per cent."""
    if key not in entries[0]:
        return ""
    values = [100 * entry[key] for entry in entries]
    return f"{sum(values) / len(values):.2g} [{min(values):.2g}, {max(values):.2g}]"


def size_of_change(folder: Path, base: str) -> str:
    """‖ΔW‖ / ‖Ŵ‖ at each rank, mean over matrices and seeds: what the changes are that get lost."""
    done = Results(folder).done
    found = {r: sum(done[base, r, seed, ADAPTED]["change"] for seed in SEEDS) / len(SEEDS) for r in RANKS[base]}
    return f"‖ΔW‖ / ‖Ŵ‖ on {base}: " + ", ".join(f"r {r} {100 * value:.1f} %" for r, value in found.items())


if __name__ == "__main__":
    what, place, *chosen = sys.argv[1:]
    if what == "run":
        run(Path(place), chosen or list(RANKS))
    else:
        for base in chosen or list(RANKS):
            print(f"{base}\n\n{table(Path(place), base)}\n\n{size_of_change(Path(place), base)}\n")
