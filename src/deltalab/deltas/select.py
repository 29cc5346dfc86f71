"""Which weights a delta goes to. A selection is a value that prints; what matches nothing is an error, never skipped.

A target is a preset (`q`, `q,k`, `q,v`, `q,k,v`, `q,k,v,o`, `k,v,down`, `attention`, `mlp`, `all-linear`), the name of
a linear (`q_proj`, `self_attn.q_proj`, or the whole path), a shell pattern (`layers.0.*`) or `re:` and a regular expression for the whole path. Presets go by the
structure of the blocks, so they never take embeddings or the output layer; experts held as 3-D parameters belong to
`mlp` and `all-linear`. An embedding is taken by a target that matches no linear.
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from deltalab.core.errors import UserError, nearest
from deltalab.deltas.sites import Place, base_modules, endings, linears, places, stacked_parameters

T = TypeVar("T")

PRESETS = ("q", "q,k", "q,v", "q,k,v", "q,k,v,o", "k,v,down", "attention", "mlp", "all-linear")
QUERY = {"q_proj", "query", "q_lin", "wq", "q"}
KEY = {"k_proj", "key", "k_lin", "wk", "k"}
VALUE = {"v_proj", "value", "v_lin", "wv", "v"}
FUSED = {"qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "in_proj", "wqkv"}
DOWN = ("down_proj", "fc2", "c_proj", "wo", "Wo", "w2", "dense_4h_to_h", "fc_out", "output.dense", "lin2", "ff_out",
        "ffn_output")  # fmt: skip
"""The last linear of an MLP, by the names and ends of paths that models give it."""


@dataclass(frozen=True)
class Selection:
    """The chosen weights, in model order. names: their paths. model, linears: what they were chosen from.

    kinds: of each, see `deltalab.deltas.spec.Kind`.
    """

    names: list[str]
    model: str
    linears: int
    kinds: dict[str, str]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __str__(self) -> str:
        leaves = Counter((leaf(name), self.kinds[name]) for name in self.names)
        other = [kind for kind in ("embedding", "experts") if kind in self.kinds.values()]
        what = "linears" if not other else f"weights ({', '.join(['linears', *other])})"
        lines = [f"{len(self.names)} of {self.linears} {what} of {self.model}"]
        return "\n".join(lines + [f"  {count:4d} × {name}" for (name, _), count in leaves.items()])


def select(model: nn.Module, targets: str | Sequence[str], layers: Sequence[int] | None = None) -> Selection:
    """The weights of `model` that `targets` name, in model order.

    targets: a preset, a name or pattern, several joined by commas, or a list of them. layers: block indices to stay
    in, negative from the end.
    Raises: UserError for a target that matches nothing, matches only what no delta can sit on, or a layer not there.
    """
    there = places(model)
    blocks = layer_numbers(model, layers)
    lists = list(stacks(model)) if blocks is not None else []
    chosen: set[str] = set()
    wanted = split(targets)
    ends = {} if set(wanted) <= set(PRESETS) - {"q"} else endings(there)
    for target in wanted:
        named = target == "q" and target in ends  # a linear's own name, as T5 has it, comes before a preset
        preset = target in PRESETS and not named
        found = _preset(model, target, there) if preset else _match(model, target, there, ends)
        if blocks is not None:
            inside = {name for name in found if _index(lists, name) in blocks}
            if found and not inside:
                raise UserError(f"target '{target}' matches no linear in layers {sorted(blocks)} of {called(model)}.",
                                found=f"it matches {len(found)} elsewhere: {', '.join(sorted(found)[:3])}")  # fmt: skip
            found = inside
        chosen |= found
    refuse_tied(there, chosen)
    kinds = {name: str(there[name].kind) for name in there if name in chosen}
    count = sum(place.kind == "linear" or place.kind in kinds.values() for place in there.values())
    return Selection(list(kinds), model_name(model), count, kinds)


def scored_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of the decoder blocks: what is scored, grouped and pruned; no embeddings, no output layer.

    The module's own weight, `weight_of(module)`, (out, in), is the base weight, adapted or not.
    Raises: UserError if a block holds experts as 3-D parameters.
    """
    return block_linears(model, "scored linears")


def block_linears(model: nn.Module, what: str) -> dict[str, nn.Module]:
    """Every linear of the blocks, for `what`. Raises: UserError, naming `what`, if a block holds experts as 3-D parameters."""
    blocks = stacks(model)
    _refuse_experts(model, what, blocks, set())
    return _inside(blocks, linears(model))


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of blocks, path -> blocks, the largest first: one, or both of an encoder–decoder.

    Raises: UserError if the model has none.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in base_modules(model):
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer in lists):
            lists[name] = module
    if not lists:
        raise UserError(
            f"{called(model)} has no list of decoder blocks.", next="name the modules in full, without layers"
        )
    if len(lists) == 1:
        return lists
    sizes = {name: sum(t.numel() for t in [*blocks.parameters(), *blocks.buffers()]) for name, blocks in lists.items()}
    order = sorted(lists, key=lambda name: sizes[name], reverse=True)
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {name: lists[name] for name in order[: 2 if both else 1]}


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The largest list of blocks and its path; of an encoder–decoder the decoder's, where it is the larger.

    Raises: UserError if the model has none.
    """
    return next(iter(stacks(model).items()))


def layers_of(model: nn.Module, names: Iterable[str]) -> dict[str, int | None]:
    """Of each path the index of the block that it lies in, in its own stack, or None outside the blocks."""
    lists = list(stacks(model))
    return {name: _index(lists, name) for name in names}


def layer_numbers(model: nn.Module, layers: Sequence[int] | None) -> set[int] | None:
    """`layers` as indices from 0, in each stack of blocks; None stays None.

    Raises: UserError for an index outside the model, none at all, or one from the end where stacks differ in length.
    """
    if layers is None:
        return None
    lengths = {len(blocks) for blocks in stacks(model).values()}
    count = max(lengths)
    wrong = [i for i in layers if not -count <= i < count]
    if wrong or not layers:
        raise UserError(f"layers {wrong or '[]'} are not in {called(model)}.", found=f"{count} layers, 0 to {count - 1}, or -1 to -{count} from the end")  # fmt: skip
    if len(lengths) > 1 and any(i < 0 for i in layers):
        raise UserError(
            f"layers counted from the end mean two things in {called(model)}.",
            found=f"stacks of {' and '.join(map(str, sorted(lengths)))} blocks",
            next="count from 0",
        )
    return {i % count for i in layers}


def model_name(model: nn.Module) -> str:
    """What the model is called: the last part of where it was loaded from, else its class."""
    path = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return path.rstrip("/").split("/")[-1]


def leaf(name: str) -> str:
    """The last part of a module path."""
    return name.rsplit(".", 1)[-1]


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a name, shell pattern or `re:` pattern matches a dotted path; all but `re:` may leave out its start.

    Raises: UserError for a faulty regular expression.
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise UserError(f"'{pattern}' is no regular expression.", found=str(error)) from None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, "*." + pattern)


def meant(pattern: str, paths: Sequence[str]) -> list[str]:
    """The paths that a pattern matches; one that is a whole path means it alone, whatever else ends like it."""
    return [pattern] if pattern in paths else [path for path in paths if pattern_matches(pattern, path)]


def split(targets: str | Sequence[str]) -> list[str]:
    """The single targets. Raises: UserError if there is none."""
    if isinstance(targets, str):
        single = targets in PRESETS or targets.startswith("re:")
        targets = [targets] if single else [t.strip() for t in targets.split(",") if t.strip()]
    if not targets:
        raise UserError("no targets are named.", nearest=PRESETS, next="for example targets: attention")
    return list(targets)


def called(model: nn.Module) -> str:
    """Name and size, for messages: 'stories260K (5 layers, 35 linears)'."""
    inside = [m for _, m in base_modules(model) if isinstance(m, nn.ModuleList)]
    layers = f"{len(decoder_blocks(model)[1])} layers, " if inside else ""
    return f"{model_name(model)} ({layers}{len(linears(model))} linears)"


def _index(stacks: Iterable[str], name: str) -> int | None:
    """The index of the block that a path lies in, in the one of these lists that it lies in."""
    for stack in stacks:
        if name.startswith(stack + "."):
            return int(name[len(stack) + 1 :].split(".")[0])
    return None


def _inside(blocks: Iterable[str], found: Mapping[str, T]) -> dict[str, T]:
    """What of all that was found lies in these lists of blocks."""
    inside = tuple(f"{stack}." for stack in blocks)
    return {name: what for name, what in found.items() if name.startswith(inside)}


def in_attention(name: str) -> bool:
    """Whether a linear of this path is a part of an attention."""
    *parents, last = name.split(".")
    return (
        any("attn" in part.lower() or "attention" in part.lower() for part in parents) or last in QUERY | VALUE | FUSED
    )


PARTS: dict[str, Callable[[str], bool]] = {
    "q": lambda name: leaf(name) in QUERY, "k": lambda name: leaf(name) in KEY, "v": lambda name: leaf(name) in VALUE,
    "o": lambda name: in_attention(name) and leaf(name) not in QUERY | KEY | VALUE | FUSED,
}  # fmt: skip
"""The linears of an attention by their part in it; the output is what is no other."""


def ends_mlp(name: str) -> bool:
    """Whether a weight of this path is the last linear of an MLP."""
    return not in_attention(name) and any(name == end or name.endswith("." + end) for end in DOWN)


def _preset(model: nn.Module, preset: str, there: dict[str, Place]) -> set[str]:
    """The weights of a preset.

    Raises: UserError, naming the modules, where the model keeps them in a form that the preset would have to skip.
    """
    blocks = stacks(model)
    inside = _inside(blocks, {name: place for name, place in there.items() if place.kind == "linear"})
    experts: set[str] = set()
    if preset in ("k,v,down", "mlp", "all-linear"):
        experts = {name for name, place in there.items() if place.kind == "experts"}
        _refuse_experts(model, f"preset '{preset}'", blocks, experts)
    if set(parts := preset.split(",")) <= PARTS.keys():
        of = {part: {name for name in inside if PARTS[part](name)} for part in parts}
        found = set().union(*of.values())
        fused = sorted({leaf(name) for name in inside if leaf(name) in FUSED})
        if fused and not all(of.values()):
            raise UserError(f"preset '{preset}' matches nothing in {called(model)}: query, key and value are one fused linear there.",
                            found=f"fused: {', '.join(fused)}", next=f"targets={fused!r}, or the preset 'attention'")  # fmt: skip
    elif preset == "k,v,down":
        found = _keys_values_down(model, inside, experts)
    else:
        keep: dict[str, Callable[[str], bool]] = {
            "attention": in_attention,
            "mlp": lambda n: not in_attention(n),
            "all-linear": lambda n: True,
        }
        found = {name for name in inside if keep[preset](name)} | experts
    if not found:
        raise UserError(
            f"preset '{preset}' matches no linear of {called(model)}.", found=_names(inside), next=_see(model)
        )
    return found


def _keys_values_down(model: nn.Module, inside: Iterable[str], experts: set[str]) -> set[str]:
    """Keys and values, whole fused linears where they are a part of one, and the last linears of the MLPs.

    Raises: UserError where there is nothing of the one or of the other.
    """
    keys_values = {name for name in inside if leaf(name) in KEY | VALUE} or {n for n in inside if leaf(n) in FUSED}
    down = {name for name in {*inside, *experts} if ends_mlp(name)}
    for found, what in ((keys_values, "no keys and values"), (down, "no last linear of an MLP")):
        if not found:
            raise UserError(f"preset 'k,v,down' finds {what} in {called(model)} by their usual names.",
                            found=", ".join(sorted({leaf(name) for name in inside})), next=f"name the targets\n  {_see(model)}")  # fmt: skip
    return keys_values | down


def _match(model: nn.Module, target: str, there: dict[str, Place], ends: Mapping[str, Sequence[str]]) -> set[str]:
    """The weights that a target matches. ends: `endings` of their paths, where a plain name is looked up."""
    plain = not target.startswith("re:") and not set(target) & set("*?[")
    names = ends.get(target, []) if plain else [name for name in there if pattern_matches(target, name)]
    matched = {name: there[name].kind for name in names}
    found = {name for name, kind in matched.items() if kind != "embedding"} or set(matched)
    if found:
        return found
    other = [(name, type(m).__name__) for name, m in base_modules(model) if name and pattern_matches(target, name)]
    other += [
        (name, f"a parameter of shape {tuple(p.shape)}")
        for name, p in model.named_parameters()
        if pattern_matches(target, name)
    ]
    if other:
        raise UserError(f"target '{target}' matches no linear of {called(model)}.", found=f"it matches {other[0][0]}, {_article(other[0][1])}: a delta sits on linears",
                        nearest=PRESETS, next=_see(model))  # fmt: skip
    counts = Counter(leaf(name) for name in linears(model))
    near = nearest(leaf(target), counts) or list(counts)[:3]
    raise UserError(f"target '{target}' matches no module of {called(model)}.", nearest=[f"{name} ({counts[name]})" for name in near],
                    next=f"one of the presets: {'  '.join(PRESETS)}\n  {_see(model)}")  # fmt: skip


def tied(there: dict[str, Place]) -> dict[str, list[str]]:
    """Path of every weight that others share -> the others' paths."""
    owners: dict[int, list[str]] = {}
    for name, place in there.items():
        owners.setdefault(id(place.parameter), []).append(name)
    return {name: [o for o in same if o != name] for same in owners.values() if len(same) > 1 for name in same}


def refuse_tied(there: dict[str, Place], chosen: set[str]) -> None:
    """A delta on a tied weight would change one user of it and not the other, and the tie would break on merging."""
    shared = tied(there)
    for name in sorted(chosen & shared.keys()):
        raise UserError(f"target '{name}' shares its weight with {', '.join(shared[name])} (tied), so no delta goes there.",
                        next="leave it out, or load the model with tie_word_embeddings=False")  # fmt: skip


def _refuse_experts(model: nn.Module, what: str, blocks: Iterable[str], covered: set[str]) -> None:
    """Raises: UserError if the blocks hold 3-D parameters other than `covered`."""
    rest = {n: shape for n, shape in _inside(blocks, stacked_parameters(model)).items() if n not in covered}
    if rest:
        name, shape = next(iter(rest.items()))
        raise UserError(f"{what}: {called(model)} holds experts as 3-D parameters, which it does not cover.",
                        found=f"{len(rest)}, the first is {name} {tuple(shape)}", next="name the linears that you want, or the preset 'attention'")  # fmt: skip


def _names(found: Iterable[str]) -> str:
    return (
        ", ".join(f"{name} ({count})" for name, count in Counter(leaf(n) for n in found).items())
        or "no linear in the blocks"
    )


def _see(model: nn.Module) -> str:
    return f"see every name: deltalab targets {getattr(getattr(model, 'config', None), '_name_or_path', '') or model_name(model)}"


def _article(kind: str) -> str:
    return kind if kind.startswith("a ") else f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"
