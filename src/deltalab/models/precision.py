"""Whether 16-bit computation works here, found out before it ends the process.

On some virtual machines the processor announces matrix instructions that the system does not let through, and the
first bfloat16 product ends Python with 'Illegal instruction'. A child process tries one.
"""

import faulthandler
import functools
import os
import signal
import time

import torch

from deltalab.core.errors import UserError

BROKEN = "its first product ends the process"
REMEDY = "set the environment variable ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"


def require_bfloat16(device: torch.device, instead: str = "run.dtype=float32") -> None:
    """Raises: UserError if a bfloat16 product on the CPU ends the process that computes it. instead: what else helps."""
    if device.type == "cpu" and not cpu_multiplies_bfloat16():
        raise UserError(
            f"bfloat16 does not work on this CPU: {BROKEN}.",
            found="matrix instructions (AMX) that the processor announces and the system blocks",
            next=f"{REMEDY}, or {instead}",
        )


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Multiplies in a forked child and says whether it came back; a child that hangs counts as one that did."""
    if not hasattr(os, "fork"):
        return True
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # a fault is an answer here, not news
        try:
            torch.set_num_threads(1)
            matrix = torch.ones(64, 64, dtype=torch.bfloat16)
            torch.mm(matrix, matrix)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return not os.WIFSIGNALED(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True
