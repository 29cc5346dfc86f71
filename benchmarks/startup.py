"""Seconds until the command line answers, each call in a new process, warm; and what importing torch and peft alone takes.

    .venv/bin/python -m benchmarks startup

`--help`, `--version` and `import deltalab` import no torch. The table of methods needs the methods, and so torch; what
lists a model's targets or replies has to import what transformers imports for a model, and to load it.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import MOST, ROOT, Asked, Ratio, Row

PYTHON, OURS = sys.executable, str(Path(sys.executable).with_name("deltalab"))
CALLS: dict[str, tuple[list[str], float | None]] = {
    "import deltalab": ([PYTHON, "-c", "import deltalab"], 0.3),
    "deltalab --help": ([OURS, "--help"], 0.3),
    "deltalab train --help": ([OURS, "train", "--help"], None),
    "deltalab methods": ([OURS, "methods"], None),
    "deltalab targets organism": ([OURS, "targets", "organism"], None),
    "deltalab generate organism": ([OURS, "generate", "organism", "--max-new-tokens", "1"], None),
}
ALONE = {
    "python": [PYTHON, "-c", "pass"],
    "import torch": [PYTHON, "-c", "import torch"],
    "import peft": [PYTHON, "-c", "import peft"],
}
"""What it is measured beside."""


def rows(asked: Asked) -> Iterator[Row]:
    rounds = asked.turns(7, quick=1)
    calls = {name: (call, target) for name, (call, target) in CALLS.items() if asked.wants(name)}
    seconds: dict[str, list[float]] = {}
    for turn in range(rounds + 1):  # the first one warms the disk's cache
        for name, call in {**ALONE, **{name: call for name, (call, _) in calls.items()}}.items():
            spent = took(call)
            if turn:
                seconds.setdefault(name, []).append(spent)
    beside = {name: statistics.median(seconds[name]) for name in ALONE}
    for name, (_, target) in calls.items():
        low, middle, high = (
            statistics.quantiles(seconds[name], n=4, method="inclusive") if rounds > 1 else 3 * seconds[name]
        )
        yield Row("start-up", name, "seconds", Ratio(middle, low, high), {name: middle, **beside}, "s",
                  target=target, direction=MOST)  # fmt: skip


def took(call: list[str]) -> float:
    """Seconds of a process, from nothing to its end."""
    began = time.perf_counter()
    subprocess.run(call, check=True, capture_output=True, input=b"hello\n", cwd=ROOT)
    return time.perf_counter() - began
