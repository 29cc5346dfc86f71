"""Groups of weights chosen by score, and the set algebra of groups.

Counts are exact: the share asked for, rounded to whole entries per row, per matrix or over all matrices, or to whole
units per family or over all of them, with ties going to the lower index (and, over several, to the earlier one).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from deltalab.core.errors import UserError
from deltalab.safety.group import Group
from deltalab.safety.nulls import matched_random, random_like
from deltalab.safety.overlap import jaccard
from deltalab.safety.topk import rounded, top_of_all, top_of_rows
from deltalab.safety.units import Units

__all__ = [
    "Group",
    "Per",
    "complement",
    "difference",
    "intersection",
    "jaccard",
    "matched_random",
    "minus",
    "random_like",
    "top",
    "union",
]

Per = Literal["row", "matrix", "global"]


def top(
    scores: Mapping[str, Tensor], q: float, per: Per | None = None, name: str = "top", units: Units | None = None
) -> Group:
    """The entries with the largest scores: the share `q` of each row, of each matrix, or of all matrices together.

    scores: path → (out, in), read once (per row, per matrix) or a few times (global), one matrix at a time. units: of
    what the group is made; a unit's score is the mean over its entries, and `q` the share of the units within each
    family (`matrix`) or of all (`global`). per: `row` if not given, for units `matrix`.
    Raises: UserError unless 0 < q ≤ 1, if q is less than half an entry or unit, if a score is not finite, or for units
    per row.
    """
    if not 0 < q <= 1:
        raise UserError(f"a share of {q} cannot be chosen.", next="give a fraction: 0.01 is one per cent")
    whole = units is None or units.kind == "entry"
    per = per or ("row" if whole else "matrix")
    info = {"kind": "top", "unit": "entry", "per": per, "q": q}
    checked = _Checked(scores)
    if units is None or whole:
        group = Group.of_masks(name, dict(_largest(checked, q, per)), info)
    else:
        if per == "row":
            raise UserError(
                f"{units.kind} units do not lie in one row.", nearest=("matrix", "global"), next="per matrix"
            )
        means = {family: mean.view(1, -1) for family, mean in units.means(checked).items()}
        chosen = {family: mask.flatten().nonzero()[:, 0] for family, mask in _largest(means, q, per)}
        group = units.group(name, chosen, info)
    unit = "entry" if whole else f"{group.unit} unit"
    return _some(group, f"the top {100 * q:g} % per {per} is less than one {unit}", "a larger share, or per matrix")


def difference(
    safety: Mapping[str, Tensor],
    utility: Mapping[str, Tensor],
    p: float,
    q: float,
    per: Per | None = None,
    name: str = "set difference",
    units: Units | None = None,
) -> Group:
    """S(p, q): the top `q` of the safety score without the top `p` of the utility score (Wei et al. 2024, §3.2).

    Raises: UserError if the two cover different matrices, or nothing is left.
    """
    if list(safety) != list(utility):
        raise UserError(
            "the two scores cover different matrices.",
            found=f"{len(safety)} and {len(utility)}",
            next="score both on one model",
        )
    safe, useful = top(safety, q, per, units=units), top(utility, p, per, units=units)
    group = minus(safe, useful, name)
    group.info = {"kind": "difference", "unit": safe.unit, "per": safe.info["per"], "q": q, "p": p}
    return _some(
        group,
        f"the top {100 * q:g} % for safety lies within the top {100 * p:g} % for utility",
        "a larger q or a smaller p",
    )


def union(groups: Iterable[Group], name: str = "union") -> Group:
    """Entries that are in any of the groups.

    Raises: UserError if the groups cover different matrices; so do the others below.
    """
    return _combined("union", list(groups), torch.logical_or, name)


def intersection(groups: Iterable[Group], name: str = "intersection") -> Group:
    """Entries that are in all of the groups."""
    return _combined("intersection", list(groups), torch.logical_and, name)


def minus(group: Group, without: Group, name: str = "difference") -> Group:
    """Entries of the first that are not in the second."""
    return _combined("minus", [group, without], lambda mask, other: mask & ~other, name)


def complement(group: Group, name: str = "complement") -> Group:
    """Entries of the matrices looked at that are not in the group."""
    masks = {path: ~group.mask(path) for path in group}
    return Group.of_masks(name, masks, {"kind": "complement", "unit": group.unit, "of": [group.name]})


def _combined(kind: str, groups: Sequence[Group], both: Callable[[Tensor, Tensor], Tensor], name: str) -> Group:
    first, *rest = groups
    for other in rest:
        if other.shapes != first.shapes:
            raise UserError(
                f"groups '{first.name}' and '{other.name}' cover different matrices.",
                found=f"{len(first)} and {len(other)}",
                next="make both on one model",
            )
    masks = first.masks()
    for other in rest:
        masks = {path: both(mask, other.mask(path)) for path, mask in masks.items()}
    kinds = {group.unit for group in groups}
    unit = kinds.pop() if len(kinds) == 1 else "entry"
    return Group.of_masks(name, masks, {"kind": kind, "unit": unit, "of": [group.name for group in groups]})


def _largest(scores: Mapping[str, Tensor], q: float, per: Per) -> Iterator[tuple[str, Tensor]]:
    """Path and mask of the share `q` with the largest scores in each row, each matrix, or all."""
    if per == "global":
        yield from top_of_all(scores, q)
        return
    for path in scores:
        score = scores[path]
        if per == "row":
            yield path, top_of_rows(score, rounded(q * score.shape[1]))
        else:
            yield from top_of_all({path: score}, q)


class _Checked(Mapping[str, Tensor]):
    """Scores that are read one at a time, and refused if one is not finite."""

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self.scores = scores

    def __getitem__(self, path: str) -> Tensor:
        score = self.scores[path]
        if score.numel() and not torch.stack(torch.aminmax(score)).isfinite().all():  # NaN is both of them
            raise UserError(
                f"the score of '{path}' holds values that are not finite.",
                next="compute the scores again in a wider dtype",
            )
        return score

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


def _some(group: Group, why: str, then: str) -> Group:
    if group.count == 0:
        raise UserError(f"group '{group.name}' is empty: {why}.", next=f"choose {then}")
    return group
