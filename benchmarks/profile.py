"""Where the time of one side of a training step goes: torch.profiler's table."""

import importlib
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from deltalab.core.errors import UserError

STEPS, LINES = 5, 40


def table(benchmark: str, only: str, side: str, threads: int) -> str:
    """Operations by their own time, over some steps after two that warm up.

    Raises: UserError if the benchmark has no `side(name, only)`.
    """
    module: Any = importlib.import_module(f"benchmarks.{benchmark}")
    if not hasattr(module, "side"):
        raise UserError(f"benchmark '{benchmark}' has no sides to profile.", next="python -m benchmarks profile step")
    torch.set_num_threads(threads)
    made = module.side(side, only)
    for _ in range(2):
        made.step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(STEPS):
            made.step()
    return seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=LINES, max_name_column_width=60)
