"""Ctrl-C in the middle of a step: the step ends whole."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interrupts(
    say: str = "stopping after this step, with a checkpoint; Ctrl-C again stops at once",
) -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that the step under way ends whole; the second one stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if say:
            print(f"\n{say}", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
