"""What a training step of each method costs: time as a ratio to LoRA's, and the memory that it holds.

    .venv/bin/python -m benchmarks methods --threads 1 --out runs/methods      # writes costs.json there, for tools/methods.py

All methods are in one process, each on its own copy of a random Llama (hidden 512, 4 layers, 12.6 M weights in the
blocks), and take turns: one step each a round, forward, backward, AdamW and the method's own schedule on 4 × 256 tokens.
Ratios are to the step of LoRA r 8. Memory is counted, not sampled: what trains, its gradients and AdamW's two moments, and every tensor that autograd keeps
from the forward to the backward and that is no parameter, each storage once.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import deltalab as dl
from benchmarks.harness import Asked, Row, compared, exactly, ratio, timed
from deltalab.core.files import write_json
from deltalab.deltas.adapt import param_groups

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from methods import REFERENCE, ROWS
from methods import Row as Method

from deltalab.measure.activations import saved_bytes

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

    def __init__(self, row: Method, folder: Path) -> None:
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
        ids = tokens()
        activations = saved_bytes(self.model, lambda: self.model(input_ids=ids, labels=ids).loss)
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        return activations + 4 * trained


def tokens() -> Tensor:
    return torch.randint(5, 2048, TOKENS, generator=torch.Generator().manual_seed(0))


def rows(asked: Asked) -> Iterator[Row]:
    chosen = {name: row for name, row in ROWS.items() if name == REFERENCE or asked.wants(name)}
    if asked.quick:
        chosen = dict(list(chosen.items())[:2]) | {REFERENCE: ROWS[REFERENCE]}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        base().save_pretrained(place)
        dl.load("organism")[1].save_pretrained(place)
        steppers = {name: Stepper(row, place) for name, row in chosen.items()}
    memory = {name: stepper.memory() for name, stepper in steppers.items()}
    seconds = timed({name: stepper.step for name, stepper in steppers.items()}, asked.turns(ROUNDS), WARM_UP)
    costs = {name: {"step": str(ratio(taken, seconds[REFERENCE])), "memory": f"{memory[name] / 2**20:.0f}"}
             for name, taken in seconds.items()}  # fmt: skip
    if not (asked.quick or asked.only):
        write_json(asked.folder / "costs.json", costs)
    for name in seconds:
        yield compared("a step of a method", name, seconds, name, REFERENCE, direction="at most")
        held = {name: memory[name] / 2**20, REFERENCE: memory[REFERENCE] / 2**20}
        yield Row("memory of a step", name, f"{name} / {REFERENCE}", exactly(*held.values()) if name != REFERENCE else exactly(1, 1),
                  held, "MiB", direction="at most")  # fmt: skip
