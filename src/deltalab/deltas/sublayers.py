"""Which sub-layers of the blocks a delta goes to: the attentions, the MLPs, or both.

Where a model has such a sub-layer as a module of its own, that module is the place. Where it has not (BERT's and BLOOM's
add the residual themselves, OPT's MLP is two linears of the block), the place is the linear that ends it: what the linear
gives is what the block adds to the hidden states.
"""

from collections.abc import Sequence

from torch import nn

from deltalab.core.errors import UserError, nearest
from deltalab.deltas.select import (
    called,
    ends_mlp,
    layer_numbers,
    layers_of,
    leaf,
    pattern_matches,
    select,
    split,
    stacks,
)
from deltalab.deltas.sites import SUBLAYERS, adds_residual, base_modules, linears, sublayer_kind, sublayers


def select_sublayers(model: nn.Module, targets: str | Sequence[str], layers: Sequence[int] | None = None) -> list[str]:
    """Paths of the sub-layers of `model` that `targets` name, in model order.

    targets: `attention`, `mlp`, names or patterns of sub-layers (`self_attn`, `layers.0.*`), several joined by commas, or a
    list of them. What matches no sub-layer is taken for linears, as `select` does. layers: block indices to stay in.
    Raises: UserError for a target that matches nothing, or a layer that is not there.
    """
    there = _there(model)
    blocks = layer_numbers(model, layers)
    lies = layers_of(model, [*there, *linears(model)]) if blocks is not None else {}
    chosen: set[str] = set()
    for target in split(targets):
        if target in SUBLAYERS:
            found = [path for path, kind in there.items() if kind == target]
        else:
            found = [path for path in there if pattern_matches(target, path)] or _linears(model, target, list(there))
        if not found:
            raise UserError(f"target '{target}' matches no sub-layer of {called(model)}.",
                            found=", ".join(dict.fromkeys(map(leaf, there))) or "none that is known by its usual name",
                            next="name the linears that end them")  # fmt: skip
        inside = found if blocks is None else [path for path in found if lies[path] in blocks]
        if not inside:
            raise UserError(f"target '{target}' matches no sub-layer in layers {sorted(blocks or [])} of {called(model)}.",
                            found=f"it matches {len(found)} elsewhere: {', '.join(found[:3])}")  # fmt: skip
        chosen.update(inside)
    order = {path: i for i, (path, _) in enumerate(base_modules(model))}
    return sorted(chosen, key=lambda path: (order.get(path, order.get(path.rpartition(".")[0], 0)), path))


def _there(model: nn.Module) -> dict[str, str]:
    """Every sub-layer of the blocks, path of the place -> attention or mlp."""
    own = sublayers(model)
    inside = tuple(f"{stack}." for stack in stacks(model))
    there = {path: str(place.kind) for path, place in own.items() if path.startswith(inside)}
    names = [path for path in linears(model) if path.startswith(inside)]
    for path, module in base_modules(model):
        kind = sublayer_kind(path, module) if path.startswith(inside) and path not in own else None
        if kind is not None and adds_residual(module):
            last = [name for name in names if name.startswith(path + ".")][-1:]
            there |= dict.fromkeys(last, str(kind))
    blocks = [f"{stack}.{i}." for stack, blocks in stacks(model).items() for i in range(len(blocks))]
    for block in blocks:
        if not any(kind == "mlp" and path.startswith(block) for path, kind in there.items()):
            ends = [name for name in names if name.startswith(block) and ends_mlp(name)]
            there |= dict.fromkeys(ends, "mlp")
    return there


def _linears(model: nn.Module, target: str, there: Sequence[str]) -> list[str]:
    """The linears that a target names which is no sub-layer's."""
    try:
        return select(model, [target]).names
    except UserError as error:
        near = [*nearest(leaf(target), dict.fromkeys(map(leaf, there))), *error.nearest]
        raise UserError(f"target '{target}' matches no sub-layer and no linear of {called(model)}.", found=error.found,
                        nearest=list(dict.fromkeys(near)), next=f"attention  mlp, for both: attention,mlp\n  {error.next}") from None  # fmt: skip
