"""Less memory for the activations of a training pass: kept in the CPU's memory, or not kept and computed again.

What autograd saves in the forward is of no use until the backward comes to it, last saved first. `Offload` copies it to
pinned CPU memory on a stream of its own while the forward goes on, and brings it back a few tensors before its turn.
"""

import contextlib
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from deltalab.core.errors import UserError

LEAST = 1 << 20
"""Bytes from which a tensor is moved: a smaller one costs more calls than it frees memory."""
IN_FLIGHT = 256 << 20
"""Bytes on their way out that may still take device memory; beyond them the forward waits for the copies."""
AHEAD = 3
"""Tensors brought back before the backward asks for them."""


class Moved:
    """A saved tensor that is in CPU memory. uses: how often the backward will still ask for it."""

    def __init__(self, host: Tensor, before: "Moved | None") -> None:
        self.host, self.uses = host, 1
        self.before = None if before is None else weakref.ref(before)
        self.back: Tensor | None = None
        self.arrived: Any = None


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """`with offload:` round a forward pass: what autograd saves in it goes to CPU memory until the backward.

    The backward may run outside. Values are moved and never changed, so gradients are bitwise the same. What stays where
    it is: parameters and buffers of `model` and views of them, tensors of less than `least` bytes or on another device,
    and expanded ones, which are smaller than they look. A tensor that is saved several times moves once.

    moved: bytes that the last pass sent. On another device than CUDA copies are plain.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, *, least: int = LEAST, in_flight: int = IN_FLIGHT
    ) -> None:
        super().__init__(self._pack, self._unpack)
        self.model, self.device, self.least, self.in_flight = model, device, least, in_flight
        self.moved = 0
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._stay: set[int] = set()
        self._known: dict[Any, tuple[StorageWeakRef, weakref.ref[Moved]]] = {}
        self._leaving: deque[tuple[Any, Tensor]] = deque()
        self._last: weakref.ref[Moved] | None = None

    def __enter__(self) -> None:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self._stay = {t.untyped_storage().data_ptr() for t in tensors if t.device.type == self.device.type}
        self._last, self.moved = None, 0
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._wait(0)
        self._known.clear()

    def _pack(self, tensor: Tensor) -> Tensor | Moved:
        size, storage = tensor.numel() * tensor.element_size(), tensor.untyped_storage()
        stays = storage.data_ptr() in self._stay or size < self.least or size > storage.nbytes()
        if stays or tensor.device.type != self.device.type:
            return tensor
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version)
        alive, known = self._known.get(key, (None, None))
        found = known() if known is not None and alive is not None and not alive.expired() else None
        if found is not None:
            found.uses += 1
            return found
        moved = Moved(self._out(tensor), None if self._last is None else self._last())
        self._known[key], self._last = (StorageWeakRef(storage), weakref.ref(moved)), weakref.ref(moved)
        self.moved += size
        self._wait(self.in_flight)
        return moved

    def _unpack(self, packed: Tensor | Moved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._bring(packed)
        back, packed.uses = packed.back, packed.uses - 1
        assert back is not None
        if self._stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(packed.arrived)
            back.record_stream(now)
        if packed.uses <= 0:
            packed.back = None
        before = packed.before
        for _ in range(AHEAD):
            earlier = None if before is None else before()
            if earlier is None:
                break
            if earlier.uses > 0:
                self._bring(earlier)
            before = earlier.before
        return back

    def _out(self, tensor: Tensor) -> Tensor:
        """The tensor in CPU memory, of the same layout; on CUDA once the copy has run."""
        if self._stream is None:
            return tensor.detach().to("cpu", copy=True)
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
            self._leaving.append((self._stream.record_event(), tensor))
        return host

    def _bring(self, moved: Moved) -> None:
        """Start the way back, if it was not started."""
        if moved.back is not None:
            return
        if self._stream is None:
            moved.back = moved.host.to(self.device, copy=True)
            return
        with torch.cuda.stream(self._stream):
            moved.back = torch.empty_like(moved.host, device=self.device)
            moved.back.copy_(moved.host, non_blocking=True)
            moved.arrived = self._stream.record_event()

    def _wait(self, most: int) -> None:
        """Let go of tensors on their way out, oldest first, until at most so many bytes are left."""
        left = sum(tensor.numel() * tensor.element_size() for _, tensor in self._leaving)
        while self._leaving and left > most:
            event, tensor = self._leaving.popleft()
            event.synchronize()
            left -= tensor.numel() * tensor.element_size()


def offload(model: nn.Module, device: torch.device) -> Offload:
    """An `Offload` of what `model` saves on `device`.

    Raises: UserError unless that is a CUDA device.
    """
    if device.type != "cuda":
        raise UserError(
            "run.offload moves activations from a CUDA device to CPU memory, and this run has no such device.",
            found=f"device {device}: its activations are in the computer's own memory already",
            next="run.checkpointing=true needs less memory on any device; optim.accumulate too, and takes no longer",
        )
    return Offload(model, device)


@contextlib.contextmanager
def checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Training passes keep only what goes into each layer and compute the rest again in the backward; then as before.

    Raises: UserError if the model cannot.
    """
    if not wanted or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise UserError(
            f"run.checkpointing computes layers again in the backward, and {type(model).__name__} has no way to.",
            found="transformers' gradient checkpointing is not supported by this class",
            next="leave run.checkpointing out, or raise optim.accumulate to need less memory",
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()  # type: ignore[operator]
