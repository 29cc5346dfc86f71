"""A model's backward, one group of decoder blocks at a time, from the last to the first.

With h_s the hidden states that block s gets, and blocks s to e − 1 a group:

    ∇_W L = ∇_W ⟨h_e, ∂L/∂h_e⟩  for every W of the group,  h_e as a function of h_s

So a group needs its own forward from h_s, kept from one forward without gradients, and ∂L/∂h_e, kept from the group above
it: every block runs twice forward and once backward, however many groups there are. Kept are the states of each batch at
the groups' starts, in main memory, until they have been used.

That holds where blocks pass nothing on but hidden states. `Relay.holds` tries it: states and gradients at every start
against a plain forward and backward.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.select import layers_of, stacks
from deltalab.safety.calibration import Batch

TOLERANCE = 1e-3
"""By norm, relative: how far states and gradients of the trial may be from those of a plain pass. On a CPU they are equal."""

Whole = Callable[[Batch], Tensor]
"""The loss of a batch by the model's whole forward, or as much of it as is not cut short."""

See = Callable[[Tensor], Tensor | None]
"""Is shown the hidden states that a block gets; what it returns takes their place."""


class Relay:
    """The passes over one set of batches. blocks: the decoder's. starts: the first block of each group, ascending. whole: the loss.

    per_token: bytes kept for a token, known from the trial.
    """

    def __init__(self, blocks: nn.ModuleList, starts: Sequence[int], whole: Whole) -> None:
        self.blocks, self.starts, self.whole = blocks, list(starts), whole
        self.states: dict[tuple[int, int], Tensor] = {}  # start, batch → hidden states
        self.gradients: dict[int, Tensor] = {}  # batch → the gradient in the states at the start of the group done last
        self.begun: tuple[int, Tensor] | None = None  # batch and states of what is being differentiated
        self.per_token = 0.0

    def fill(self, number: int, batch: Batch) -> None:
        """Keep the states of batch `number` at every start; nothing from the last one on is computed."""

        def keep(start: int) -> See:
            def see(h: Tensor) -> None:
                self.states[start, number] = h.detach().to("cpu", copy=True)

            return see

        with torch.no_grad():
            self._until(self.starts[-1], batch, {start: keep(start) for start in self.starts})

    def loss(self, start: int, number: int, batch: Batch, *, further: bool | None = None) -> Float[Tensor, ""]:
        """What the weights of the group that begins at `start` are differentiated of: L, below other groups ⟨h_e, ∂L/∂h_e⟩.

        further: whether the gradient in the states at `start` will be needed; of all but the lowest group, if not given.
        """
        further = start > self.starts[0] if further is None else further
        h = self.states.pop((start, number)).to(batch.ids.device).requires_grad_(further)
        self.begun = (number, h) if further else None
        with contextlib.ExitStack() as stack:
            for block in list(self.blocks)[:start]:
                stack.enter_context(_passing(block))
            stack.enter_context(self._seen({start: lambda _: h}))
            if start == self.starts[-1]:
                return self.whole(batch)
            end = self.starts[self.starts.index(start) + 1]
            found: list[Tensor] = []
            self._until(end, batch, {end: found.append})
        return (found[0] * self.gradients.pop(number).to(found[0].device)).sum()

    def done(self) -> None:
        """Keep the gradient that the group below goes on from; to be called after the backward of `loss`."""
        if self.begun is not None:
            number, h = self.begun
            assert h.grad is not None
            self.gradients[number], self.begun = h.grad.to("cpu"), None

    def holds(self, batch: Batch) -> bool:
        """Whether this model can be run so: tried on one batch, down to the states at the first start."""
        states: dict[int, Tensor] = {}

        def begin(start: int) -> See:
            def see(h: Tensor) -> Tensor:
                states[start] = h.detach().requires_grad_(True) if start == self.starts[0] else h
                return states[start]

            return see

        try:
            with self._seen({start: begin(start) for start in self.starts}):
                loss = self.whole(batch)
            want = torch.autograd.grad(loss, [states[start] for start in self.starts])
            self.fill(0, batch)
            kept = [*self.states.values(), *self.states.values()][: len(self.states) + 1]  # and one gradient
            self.per_token = sum(h.nbytes for h in kept) / batch.ids.numel()
            for start, gradient in reversed(list(zip(self.starts, want, strict=True))):
                if not _near(self.states[start, 0], states[start]):
                    return False
                self.loss(start, 0, batch, further=True).backward()
                self.done()
                if not _near(self.gradients[0], gradient):
                    return False
        except UserError:
            raise
        except Exception:  # whatever a model does that was not made to be called in parts
            return False
        finally:
            self.states.clear()
            self.gradients.clear()
            self.begun = None
        return True

    def _until(self, end: int, batch: Batch, take: Mapping[int, See]) -> None:
        """A forward as far as the states that block `end` gets; `take` sees these too."""

        def stop(h: Tensor) -> None:
            take[end](h)
            raise _Reached

        with contextlib.suppress(_Reached), self._seen({**take, end: stop}):
            self.whole(batch)

    @contextlib.contextmanager
    def _seen(self, take: Mapping[int, See]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for start, see in take.items():
                hook = self.blocks[start].register_forward_pre_hook(_shown_to(see), with_kwargs=True)
                stack.callback(hook.remove)
            yield


def relay_of(model: nn.Module, passes: Sequence[Sequence[str]], whole: Whole) -> Relay | None:
    """The relay through the groups that these paths lie in, or None where there are not several, in one list of blocks."""
    layers = [[layers_of(model, group)[path] for path in group] for group in passes]
    starts = [min((layer for layer in group if layer is not None), default=-1) for group in layers]
    lists = list(stacks(model).values())
    if len(passes) < 2 or len(lists) > 1 or any(None in group for group in layers) or starts != sorted(set(starts)):
        return None
    return Relay(lists[0], starts, whole)


class _Reached(BaseException):
    """The end of a group: nothing from there on is to be computed."""


def _shown_to(see: See) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A hook before a block: its hidden states are its first argument, or named so."""

    def hook(
        _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = args[0] if args else kwargs["hidden_states"]
        h = see(given)
        h = given if h is None else h
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    return hook


@contextlib.contextmanager
def _passing(block: nn.Module) -> Iterator[None]:
    """Inside, the block hands on what it is given."""
    before = block.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = before


def _near(got: Tensor, want: Tensor) -> bool:
    want = want.detach().to(got.device)
    return bool((got - want).norm() <= TOLERANCE * want.norm())
