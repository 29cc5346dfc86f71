"""`deltalab methods [NAME]`: what there is to adapt a model with.

Nothing is kept here of any method: a row is read from its module's docstring (the first line, the equation, the papers),
its spec (fields, where it sits, its file) and the class of its delta (what trains, whether it merges).
"""

import inspect
import re
import sys
import typing
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from deltalab.core.spec import Spec

OUT, IN, HIDDEN = 3 << 10, 5 << 10, 7 << 10
"""Sizes of what a method is built for to see what trains: told apart from each other and from a rank."""
WHERE = ("targets", "layers")
WIDE = 100
"""Columns of a terminal from which each fact has a column of its own."""


class Row(NamedTuple):
    """What is known of one method, in words."""

    name: str
    summary: str
    equation: str
    trains: str
    merges: str
    goes_on: str
    file: str
    defaults: str
    papers: str


def command(
    name: Annotated[str | None, typer.Argument(help="one method, with its fields: lora, or LoRA")] = None,
) -> None:
    """Print the methods that change a model: formula, what trains, where each goes, its file, defaults, paper."""
    from rich.console import Console

    from deltalab.deltas import specs

    if name is not None:
        print(described(*_named(name)))
        return
    rows = [row_of(known, spec) for known, spec in specs().items()]
    if sys.stdout.isatty():
        show(rows, Console())
    else:
        print("\n".join("\t".join(row) for row in [_heads(), *rows]))


def row_of(name: str, spec: type["Spec"]) -> Row:
    """The facts of one method."""
    from deltalab.deltas.spec import DeltaSpec

    doc = sys.modules[spec.__module__].__doc__ or ""
    summary = " ".join(doc.split("\n\n")[0].split()).partition(": ")[2].partition(". ")[0].rstrip(".")
    papers = dict.fromkeys(re.findall(r"arXiv:\d{4}\.\d{4,5}", f"{doc} {spec.__doc__}"))
    usual = {key: DeltaSpec.model_fields[key].default for key in WHERE}
    defaults = [f"{key} {_short(value)}" for key, value in _defaults(spec).items() if value and value != usual.get(key)]
    trains, merges, goes_on, file = "the model's own parameters", "is the weight", "parameters", "own"
    if issubclass(spec, DeltaSpec):
        trains, merges = _built(spec)
        goes_on, file = ", ".join(sorted(spec.sits_on)), spec.peft_type or "own"
    return Row(
        name, summary, equation_of(doc), trains, merges, goes_on, file, ", ".join(defaults), ", ".join(papers) or "–"
    )


def equation_of(doc: str) -> str:
    """The first indented block of a docstring, without the source in brackets at a line's end."""
    block = re.search(r"^ {4}\S.*(?:\n {4}.*)*", doc, re.M)
    lines = block[0].splitlines() if block else []
    bare = [re.sub(r"(^|\s{2,})\([^()]*\d{4}.*\)$", "", line.strip()) for line in lines]
    return re.sub(r"\s{2,}", "  ", "; ".join(filter(None, bare)))


def show(rows: list[Row], console: "Console") -> None:
    """The table, in as many columns as there is room for."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.HORIZONTALS, show_lines=True, pad_edge=False)
    wide = console.width >= WIDE
    for head in ("method", "change", "merges", "goes on", "file", "paper") if wide else ("method", "change", "facts"):
        table.add_column(
            head, overflow="fold", ratio=1 if head == "change" else None, style="bold" if head == "method" else ""
        )
    for row in rows:
        change = "\n".join(filter(None, [row.summary, row.equation, f"trains {row.trains}", row.defaults]))
        places, papers = row.goes_on.replace(", ", "\n"), row.papers.replace("arXiv:", "").replace(", ", "\n")
        if wide:
            table.add_row(row.name, change, row.merges, places, row.file, papers)
        else:
            facts = [f"merges: {row.merges}", f"on: {row.goes_on}", f"file: {row.file}", row.papers.split(", ")[0]]
            table.add_row(row.name, change, "\n".join(facts))
    console.print(table, markup=False, highlight=False)
    console.print("one of them with its fields: deltalab methods NAME", highlight=False)


def described(name: str, spec: type["Spec"]) -> str:
    """All about one method: its docstring, its facts, its fields with types, defaults and meaning."""
    row, defaults = row_of(name, spec), _defaults(spec)
    facts = {"trains": row.trains, "merges": row.merges, "goes on": row.goes_on, "file": row.file, "papers": row.papers}
    types = {key: _type(spec.model_fields[key].annotation) for key in defaults}
    widths = max(map(len, types)), max(map(len, types.values()))
    fields = [f"  {key:<{widths[0]}}  {types[key]:<{widths[1]}}  {_short(value)}" for key, value in defaults.items()]
    about = [inspect.getdoc(spec) or "", *_of_fields(spec)]
    return "\n".join(
        [
            (sys.modules[spec.__module__].__doc__ or name).strip(),
            "",
            *(f"{key:<8}  {value}" for key, value in facts.items()),
            "",
            "field, type, default:",
            *fields,
            "",
            "\n\n".join(about),
            "",
            f"in a spec: adapt: [{{method: {spec.model_fields['method'].default}}}]",
        ]
    )


def _of_fields(spec: type["Spec"]) -> list[str]:
    """What the classes that a spec is built on say of the fields that it has from them."""
    paragraphs = [part for cls in spec.__mro__[1:] for part in inspect.cleandoc(cls.__doc__ or "").split("\n\n")]
    return [part for part in paragraphs if part.partition(":")[0].split(",")[0] in spec.model_fields]


def _named(name: str) -> tuple[str, type["Spec"]]:
    from deltalab.core.errors import UserError, nearest
    from deltalab.deltas import specs

    known = specs()
    tags = {spec.model_fields["method"].default: key for key, spec in known.items()}
    found = {key.lower(): key for key in known} | tags
    if name.lower() not in found:
        near = [found[key] for key in nearest(name.lower(), found)]
        raise UserError(f"'{name}' is no method.", found=", ".join(known), nearest=list(dict.fromkeys(near)))
    return found[name.lower()], known[found[name.lower()]]


def _built(spec: Any) -> tuple[str, str]:
    """What trains in the method's delta, with shapes, and whether the delta is a change of the weight."""
    import torch

    from deltalab.deltas.base import WeightDelta
    from deltalab.deltas.site import HEADS, Kind, Site

    kind: Kind = next(kind for kind in ("mlp", "attention", "linear", "embedding", "experts") if kind in spec.sits_on)
    shapes = {"mlp": (HIDDEN, HIDDEN), "attention": (HIDDEN, HIDDEN), "experts": (1, OUT, IN)}
    delta = spec().build(Site(kind, shapes.get(kind, (OUT, IN)), kind, torch.float32, torch.device("meta")))
    sizes = {OUT: "out", IN: "in", HIDDEN: "hidden", HEADS: "heads"}
    for key, value in _defaults(spec).items():
        if isinstance(value, int) and value > 1:
            sizes.setdefault(value, key)
    whole = HIDDEN if HIDDEN in shapes.get(kind, ()) else IN

    def said(n: int) -> str:
        return sizes.get(n, f"{sizes[whole]}/{whole // n}" if n > 1 and whole % n == 0 else str(n))

    trains = [f"{key} ({', '.join(map(said, p.shape))})" for key, p in delta.named_parameters()]
    return ", ".join(trains), "yes" if isinstance(delta, WeightDelta) else "no"


def _defaults(spec: type["Spec"]) -> dict[str, Any]:
    """Field -> default, without the tag of the method; where it goes stands last."""
    fields = {key: f.get_default(call_default_factory=True) for key, f in spec.model_fields.items() if key != "method"}
    return {key: fields[key] for key in sorted(fields, key=lambda key: key in WHERE)}


def _type(annotation: Any) -> str:
    """An annotation as one writes it."""
    args = [_type(arg) if not isinstance(arg, str) else arg for arg in typing.get_args(annotation)]
    if typing.get_origin(annotation) in (list, dict):
        return f"{typing.get_origin(annotation).__name__}[{', '.join(args)}]"
    if typing.get_origin(annotation) is Annotated:
        return args[0]
    if args:
        return " | ".join(args)
    return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _short(value: Any) -> str:
    """A default as YAML writes it, floats without a useless point."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _heads() -> list[str]:
    return [field.replace("_", " ") for field in Row._fields]
