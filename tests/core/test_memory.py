"""What is freed between things that stay goes back to the system."""

import gc
from pathlib import Path

from deltalab.core.memory import give_back


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def test_what_lies_between_blocks_that_stay_is_given_back():
    blocks = [bytes([1]) * 60_000 for _ in range(1000)]  # below what the library maps each for itself
    stay = blocks[::50]
    full = anonymous()
    del blocks
    gc.collect()
    give_back()
    assert full - anonymous() > 40_000_000
    assert len(stay) == 20
