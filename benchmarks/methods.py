"""What a training step of each method costs: time as a ratio to LoRA's, and the memory that it holds.

    .venv/bin/python benchmarks/methods.py runs/methods        # writes costs.json there, prints a table

All methods are in one process, each on its own copy of a random Llama (hidden 512, 4 layers, 12.6 M weights in the
blocks), and take turns: one step each a round, forward, backward, AdamW and the method's own schedule on 4 × 256 tokens.
A ratio is the median over rounds of (this method's step / the step of LoRA r 8 in the same round), with the quartiles.
One thread. Memory is counted, not sampled: what trains, its gradients and AdamW's two moments, and every tensor that autograd keeps
from the forward to the backward and that is no parameter, each storage once.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import deltalab as dl
from deltalab.deltas.adapt import param_groups

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from methods import REFERENCE, ROWS, Row

ROUNDS, WARM_UP, TOKENS = 15, 2, (4, 256)


def base() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1376,
        vocab_size=2048, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


class Stepper:
    """One method's model and optimizer."""

    def __init__(self, row: Row, folder: Path) -> None:
        if row.base:
            self.model, _ = dl.load(folder, adapt=row.specs(), **row.base)
            self.model.train()
        else:
            options: dict[str, Any] = {"calibration": [{"input_ids": tokens()}]} if row.calibrated else {}
            self.model = dl.adapt(base(), row.specs(), **options)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, 1e-4))
        self.count = 0

    def step(self) -> None:
        self.count += 1
        ids = tokens()
        loss = self.model(input_ids=ids, labels=ids).loss
        penalty = dl.penalty(self.model)
        (loss if penalty is None else loss + penalty).backward()
        self.optimizer.step()
        dl.step(self.model, self.count, 1000)
        self.optimizer.zero_grad()

    def memory(self) -> int:
        """Bytes that a step holds beyond the base model."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        own |= {b.untyped_storage().data_ptr() for b in self.model.buffers()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = tokens()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.model(input_ids=ids, labels=ids).loss
        activations = sum(kept.values())  # the graph is still alive, so no address was used twice
        del loss
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        return activations + 4 * trained


def tokens() -> Tensor:
    return torch.randint(5, 2048, TOKENS, generator=torch.Generator().manual_seed(0))


def measure(folder: Path) -> dict[str, dict[str, str]]:
    """Method -> {step, memory} as they are printed."""
    place = folder / "random-llama"
    base().save_pretrained(place)
    dl.load("organism")[1].save_pretrained(place)
    steppers = {name: Stepper(row, place) for name, row in ROWS.items()}
    memory = {name: stepper.memory() for name, stepper in steppers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(ROUNDS + WARM_UP):
        for name, stepper in steppers.items():
            began = time.perf_counter()
            stepper.step()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    costs = {}
    for name, times in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(times, seconds[REFERENCE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        costs[name] = {"step": f"{middle:.2f} [{low:.2f}, {high:.2f}]", "memory": f"{memory[name] / 2**20:.0f}"}
    return costs


if __name__ == "__main__":
    torch.set_num_threads(1)
    home = Path(sys.argv[1])
    home.mkdir(parents=True, exist_ok=True)
    found = measure(home)
    (home / "costs.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    for name, cost in found.items():
        print(f"{name:<24} {cost['step']:>20}  {cost['memory']:>6} MiB")
