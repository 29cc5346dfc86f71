"""What drives methods that have a schedule or a penalty, in whatever loop trains the model.

    loss = model(**batch).loss
    extra = dl.penalty(model)
    (loss if extra is None else loss + extra).backward()
    optimizer.step()
    dl.step(model, total=steps)
    optimizer.zero_grad()

Both do nothing for methods that have neither, so a loop may call them always. `deltalab.train` does, and so does
`dl.TrainerCallback` in the loops of others.
"""

from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.base import Delta
from deltalab.deltas.spec import DeltaSpec
from deltalab.deltas.weights import Group, adaptation, grouped, is_adapted


def step(model: nn.Module, t: int | None = None, total: int | None = None) -> None:
    """Tell the adapter of `model` that an optimizer step is done, while the gradients are still there.

    t: number of the step, from 1; None for the one after the last that was told, which is kept with the adapter's state
    and so survives copies and checkpoints. total: all steps of the run, where the spec does not say it.
    Raises: UserError if the model has no adapter, a schedule needs `total`, or the gradients are gone.
    """
    for group, deltas in _with_hook(model, "after_step"):
        group.spec.after_step(deltas, t, total)


def penalty(model: nn.Module) -> Float[Tensor, ""] | None:
    """What the adapter of `model` adds to the loss of a step, differentiable; None if it adds nothing.

    Its gradient counts once a step, however many pieces the batch is cut into.
    Raises: UserError if the model has no adapter.
    """
    parts = [group.spec.penalty(deltas) for group, deltas in _with_hook(model, "penalty")]
    some = [part for part in parts if part is not None]
    return sum(some[1:], some[0]) if some else None


def require_ready(model: nn.Module) -> None:
    """Raises: UserError if a method's schedule has not run, so that what is there is not the method."""
    for group, deltas in grouped(model):
        group.spec.require_ready(deltas)


def is_ready(model: nn.Module) -> bool:
    """Whether `require_ready` passes."""
    try:
        require_ready(model)
    except UserError:
        return False
    return True


def adapted_in(model: nn.Module) -> nn.Module:
    """The adapted model in `model`, which a wrapper for several processes or a compiler may hold.

    Raises: UserError if there is none.
    """
    for module in model.modules():
        if is_adapted(module):
            return module
    raise UserError(
        f"{type(model).__name__} has no adapter.", next="deltalab.adapt(model, deltalab.LoRA()) before the training"
    )


def _with_hook(model: nn.Module, name: str) -> list[tuple[Group, dict[str, Delta]]]:
    """The groups whose method has the hook, with their deltas; most have none, and then no module is looked at."""
    adapted, plain = adapted_in(model), getattr(DeltaSpec, name)
    if all(getattr(type(group.spec), name) is plain for group in adaptation(adapted).groups):
        return []
    return [(group, deltas) for group, deltas in grouped(adapted) if getattr(type(group.spec), name) is not plain]
