"""What every test runs under: no network, one thread, fixed seeds, and shapes checked at every call.

This file must not import deltalab or torch before the hook is in place: a module that was imported earlier stays
unchecked.
"""

import os
import random
import signal
import sys

# No test may reach for the network, and two test processes on two cores are slower with more than a thread each.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "COLUMNS": "120",  # rich and typer wrap at the width of the terminal, which differs between machines
        "NO_COLOR": "1",
        "TERM": "dumb",
    }
)
if not os.path.exists("/dev/nvidia0"):
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's own functions read it when Triton is first imported

# Float[Tensor, "out in"] and every other annotation of the package is checked when the function is called.
# DELTALAB_UNCHECKED=1 turns it off, to tell a failed check from a failed test.
if "DELTALAB_UNCHECKED" not in os.environ:
    assert "deltalab" not in sys.modules, "deltalab was imported before its shapes could be checked"
    import jaxtyping

    import tests.checking  # noqa: F401 - the hook names it, and does not import it

    jaxtyping.install_import_hook("deltalab", "tests.checking.check")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
