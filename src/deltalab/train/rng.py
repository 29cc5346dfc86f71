"""The state of every random generator that training draws from, as tensors and JSON."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything needed to draw the same numbers again: uint8 tensors, and the few values that are no bytes."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    tensors = {
        "torch": torch.get_rng_state(),
        "python": _bytes(np.array(words, np.uint32)),
        "numpy": _bytes(np.asarray(keys, np.uint32)),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"python": gauss, "numpy": [int(position), int(has_gauss), float(cached)]}


def restore(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put back what `capture` returned."""
    words = tensors["python"].numpy().view(np.uint32)
    random.setstate((3, tuple(int(word) for word in words), plain["python"]))
    keys = tensors["numpy"].numpy().view(np.uint32)
    np.random.set_state(("MT19937", keys, *plain["numpy"]))  # noqa: NPY002
    torch.set_rng_state(tensors["torch"])
    states = [tensors[f"cuda.{i}"] for i in range(sum(name.startswith("cuda.") for name in tensors))]
    if torch.cuda.is_available() and len(states) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace: measuring a run does not change it."""
    state = capture()
    try:
        yield
    finally:
        restore(*state)


def _bytes(words: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.uint8).copy())
