"""What this machine has for processes side by side: processors, memory, and the threads that a model is computed with."""

import contextlib
import gc
import os
from pathlib import Path

from deltalab.core.memory import give_back

SMALL = 50_000_000
"""Parameters below which one thread a process is the fastest, and a process a core."""


def settle_threads(parameters: int) -> None:
    """Compute with the threads that a model of this size always gets: results depend on their number, bit by bit."""
    import torch

    torch.set_num_threads(1 if parameters < SMALL else cores())


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jobs_for(threads: int, memory: float | None, lanes: int) -> int:
    """How many lanes fit side by side: by cores, by free memory (`memory`: bytes of one), and by how many there are."""
    fitting = lanes if not memory else int(0.8 * available_memory() / (memory + INTERPRETER))
    return max(1, min(cores() // threads, fitting, lanes))


INTERPRETER = 600 * 2**20
"""Bytes that Python with torch and transformers takes before any model."""


def available_memory() -> int:
    """Free bytes of main memory, as the system counts them; all of it where it does not say."""
    return _told("/proc/meminfo", "MemAvailable") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Memory:
    """Bytes that this process, or its GPU, has in use: `before`, when this is made, and at most since then; 0 where the system does
    not tell. There is one such count in a process: a second one begins the first anew."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        gc.collect()
        give_back()  # or what follows would take what lies free, and seem to need nothing
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the most so far begins anew
        self.before = _told("/proc/self/status", "VmRSS")

    def above(self) -> int:
        """How far it went above `before`, up to now."""
        if self.device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_allocated(self.device)) - self.before
        return max(_told("/proc/self/status", "VmHWM") - self.before, 0)


def _told(file: str, name: str) -> int:
    """Bytes by a line of one of the system's files, in KiB there; 0 where it has none."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path(file).read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name + ":")).split()[1]) * 1024
    return 0
