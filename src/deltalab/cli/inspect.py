"""`deltalab inspect ADAPTER|RUN|MODEL …`: the spectra and ranks inside changes of weights, and what several have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from deltalab.measure.inside import Found, Inside, OfParameter

SHOWN: dict[str, tuple[str, str]] = {
    "relative": ("‖ΔW‖ / ‖W‖", ".2%"), "effective": ("effective rank", ".1f"), "utilisation": ("of the rank", ".0%"),
    "stable": ("stable rank", ".1f"), "energy": ("rank of 90 %", ".1f"), "intruders": ("intruders", ".1f"),
}  # fmt: skip


COLOURS = ("blue", "orange", "green", "purple", "grey")


def command(
    what: Annotated[
        list[Path], typer.Argument(help="folders of adapters or runs; of a tuned model with --base its base")
    ],
    base: Annotated[
        str | None, typer.Option(help="the model that they belong to; what their files name if not given")
    ] = None,
    directions: Annotated[
        int, typer.Option(min=0, help="look for intruders among so many leading directions of W + ΔW; 0: not at all")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="a folder for inspect.json and the figures")] = None,
) -> None:
    """How large each change is, how many of its directions matter, which are new, and how alike several changes are."""
    from deltalab.core.errors import UserError

    named = base or _base_of(what[0])
    if named is None:
        raise UserError(f"'{what[0]}' does not name the model that it belongs to.", next="--base MODEL")
    bases: dict[str, nn.Module] = {}
    found = {str(place): _inside(named, bases, place, directions) for place in what}
    for place, inside in found.items():
        tables = [*([table(inside.lines)] if inside.lines else []), *([parameters(inside.parameters)] if inside.parameters else [])]  # fmt: skip
        print(f"{place}, on {named}\n" + "\n".join(tables) + f"\n{_parts(inside)}")
    common = _common(found)
    if common:
        print(f"shared directions, those of 90 % of each change (1: all; by chance in brackets)\n{common}\n")
    if out is not None:
        for path in _write(out, named, found):
            print(f"written: {path}")


def table(lines: Sequence["Inside"]) -> str:
    """A line a kind of module, means over its layers; the last one over all."""
    kinds = list(dict.fromkeys(line.module for line in lines))
    keys = [key for key in SHOWN if key != "intruders" or any(line.intruders is not None for line in lines)]
    rows = [["module", "weights", *(SHOWN[key][0] for key in keys)]]
    for kind in [*kinds, "all"] if len(kinds) > 1 else kinds:
        some = [line for line in lines if kind in (line.module, "all")]
        means = [sum(float(getattr(line, key)) for line in some) / len(some) for key in keys]
        rows.append(
            [kind, str(len(some)), *(format(mean, SHOWN[key][1]) for key, mean in zip(keys, means, strict=True))]
        )
    errors = [line.error / line.norm for line in lines if line.error and line.norm]
    note = (
        f"\n  of large changes without factors the first singular values alone; what they leave out is at most {max(errors):.0%} of a norm"
        if errors
        else ""
    )
    return _columns(rows) + note


def parameters(lines: Sequence["OfParameter"]) -> str:
    """Of deltas without a change of the weight, a line a parameter, means over its layers."""
    rows = [["parameter", "of", "shape", "norm", "mean", "deviation", "largest"]]
    for kind, name in dict.fromkeys((line.module, line.name) for line in lines):
        some = [line for line in lines if (line.module, line.name) == (kind, name)]
        means = [
            sum(getattr(line, key) for line in some) / len(some) for key in ("norm", "mean", "deviation", "largest")
        ]
        shapes = dict.fromkeys(" × ".join(map(str, line.shape)) for line in some)
        rows.append([f"{kind}.{name}", str(len(some)), " or ".join(shapes), *(f"{mean:.3g}" for mean in means)])
    return f"{_columns(rows)}\n  what these do depends on the input, so there is no ΔW to look into"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """The first one flush left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )  # fmt: skip


def _base_of(place: Path) -> str | None:
    """The model that an adapter's or run's files name."""
    from deltalab.core.files import read_json

    if (place / "record.json").is_file():
        return str(read_json(place / "record.json", "record")["spec"].get("model"))
    if (place / "adapter_config.json").is_file():
        return read_json(place / "adapter_config.json", "adapter config").get("base_model_name_or_path")  # type: ignore[no-any-return]
    return None


def _inside(named: str, bases: "dict[str, nn.Module]", place: Path, directions: int) -> "Found":
    """bases: the base as it has been loaded, by the head that an adapter asks for."""
    from deltalab.deltas.peft_format import load_adapter
    from deltalab.deltas.switch import unload
    from deltalab.measure.inside import inside_adapted, inside_pair
    from deltalab.models.heads import head_for
    from deltalab.models.load import load

    adapter = place / "adapter" if (place / "adapter" / "adapter_config.json").is_file() else place
    head = head_for(adapter)
    base = bases[str(head)] if str(head) in bases else bases.setdefault(str(head), load(named, **head)[0])
    if not (adapter / "adapter_config.json").is_file() and (place / "config.json").is_file():
        return inside_pair(base, load(place)[0], directions=directions)
    body = f"{base.base_model_prefix}." if head else ""
    new = [name for name, _ in base.named_parameters() if not name.startswith(body)]  # of a head there is no base
    load_adapter(base, adapter)
    try:
        return inside_adapted(base, directions=directions, but=new)
    finally:
        unload(base)


def _parts(found: "Found") -> str:
    """What the experts of a mixture have in common, a line; nothing of other changes."""
    from deltalab.measure.inside import shared_by_parts

    parts = len({line.part for line in found.lines} - {""})
    if not parts:
        return ""
    text = f"  {parts} experts on each module, counted one by one, each as if its gate were 1"
    if (common := shared_by_parts(found)) is not None:
        text += f"; they share {common[0]:.3f} of their directions, by chance {common[1]:.3f}"
    return f"{text}\n"


def _common(found: "dict[str, Found]") -> str:
    """A line a pair, the mean over the weights that both change."""
    from deltalab.measure.inside import shared

    names, lines = list(found), []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if not (found[a].spectra and found[b].spectra):
                continue
            if both := list(shared(found[a].spectra, found[b].spectra).values()):
                means = [sum(pair[k] for pair in both) / len(both) for k in (0, 1)]
                lines.append(f"  {means[0]:.3f} ({means[1]:.3f})  {a}  ·  {b}, {len(both)} weights")
            else:
                lines.append(f"  no weight is changed by both  {a}  ·  {b}")
    return "\n".join(lines)


def _write(out: Path, base: str, found: "dict[str, Found]") -> list[Path]:
    """inspect.json, and of each change its heat maps and spectra."""
    from dataclasses import asdict

    from deltalab.core.files import write_json
    from deltalab.deltas.select import in_attention
    from deltalab.report.figures import save
    from deltalab.report.inside import heat_map
    from deltalab.report.panels import Plot

    out.mkdir(parents=True, exist_ok=True)
    written = [out / "inspect.json"]
    changes = {place: [asdict(line) for line in inside.lines] for place, inside in found.items()}
    others = {place: [asdict(line) for line in inside.parameters] for place, inside in found.items()}
    write_json(written[0], {"base": base, "changes": changes, "parameters": others})
    for number, (place, (lines, *_)) in enumerate(found.items(), 1):
        panels: list[Any] = []
        for name, title, value in (("relative", "‖ΔW‖ / ‖W‖, per cent", lambda x: x.relative), ("utilisation", "effective rank, per cent of the rank", lambda x: x.utilisation)):  # fmt: skip
            cells: dict[tuple[int, str], list[float]] = {}
            for line in lines:
                if line.layer is not None:
                    cells.setdefault((line.layer, line.module), []).append(value(line))
            at = {cell: sum(values) / len(values) for cell, values in cells.items()}  # of experts the mean
            if (grid := heat_map(name, title, at)) is not None:
                panels.append(grid)
        panels += [panel for words, within in (("attention", True), ("elsewhere", False))
                   if (panel := _spectra([x for x in lines if in_attention(x.path) is within], words)) is not None]  # fmt: skip
        if panels:
            written += save(Plot(f"inspect-{number}", place, "", panels, 1), out)
    return written


def _spectra(lines: Sequence["Inside"], where: str) -> Any:
    """A panel of the singular values of each kind of module; None without lines."""
    from deltalab.report.inside import trimmed
    from deltalab.report.panels import Line, Lines

    if not lines:
        return None
    kinds = dict.fromkeys(line.module for line in lines)
    means = {kind: trimmed([line.S for line in lines if line.module == kind]) for kind in kinds}
    curves = [
        Line(kind, mean, COLOURS[number % len(COLOURS)], x=list(range(1, len(mean) + 1)))
        for number, (kind, mean) in enumerate(means.items())
    ]
    return Lines(
        f"spectra-{where}",
        f"Singular values of ΔW, {where}, means over layers",
        list(range(1, max(map(len, means.values())) + 1)),
        "number",
        "σ",
        curves,
        zero=False,
        logy=True,
        keyed=True,
    )
