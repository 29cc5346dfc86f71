"""Memory of this process that nothing uses any more."""

import contextlib
import ctypes
import os

KERNELS = 64
"""Kernels that oneDNN may keep; a step of the bundled model takes 19 for each shape of its input."""


def keep_few_kernels() -> None:
    """Keep oneDNN, which computes bfloat16 on a CPU, from holding a kernel for every shape that it ever met.

    Its own bound is 1024: hundreds of MB for a small model (docs/training.md). Making those anew that were dropped took no time
    that could be measured. Does nothing in a process that has computed in bfloat16
    already, and leaves what the user has set.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and PyTorch's above it
        os.environ.setdefault(name, str(KERNELS))


def give_back() -> None:
    """Hand what was freed back to the system, where the C library would keep it (glibc): it keeps much after large
    temporaries between small tensors that stay, as quantising leaves them. Takes about a millisecond."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
