"""The tables of docs/results/freezing.md, from the records of the two studies that it names.

.venv/bin/python tools/freezing.py runs/freezing-full runs/freezing-lora
"""

import sys
from pathlib import Path
from typing import Any

from deltalab.core.records import read_record

Record = dict[str, Any]


def table(record: Record) -> str:
    """One row an arm, one column a number of tuning examples: refused on AdvBench with its interval, and the proof."""
    cells = list(dict.fromkeys(arm["cell"] for arm in record["arms"].values() if arm["cell"]))
    names = list(dict.fromkeys(label(arm) for arm in record["arms"].values() if arm["cell"]))
    before = record["arms"]["before"]["safety"]["advbench"]["refusal"]
    lines = [
        f"Before tuning {share(before)} refused. {len(record['seeds'])} seeds.",
        "",
        "| frozen, how | "
        + " | ".join(f"{cell.removeprefix('n ')} examples" for cell in cells)
        + " | skills | largest change of a frozen entry |",
        "|---|" + "---|" * (len(cells) + 2),
    ]
    for name in names:
        arms = [next(a for a in record["arms"].values() if label(a) == name and a["cell"] == cell) for cell in cells]
        refused = [share(arm["safety"]["advbench"]["refusal"]) for arm in arms]
        skills = " / ".join(f"{100 * arm['skills']['value']:.0f}" for arm in arms)
        lines.append(f"| {name} | {' | '.join(refused)} | {skills} | {proof([arm['freeze'] for arm in arms])} |")
    return "\n".join(lines)


def label(arm: Record) -> str:
    """An arm without its cell."""
    return str(arm["label"].removesuffix(f", {arm['cell']}"))


def share(rate: Record) -> str:
    """Per cent with limits."""
    return f"{100 * rate['value']:.0f} [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def proof(freezes: list[Record]) -> str:
    """The largest over all cells; for a rewind also what it was before."""
    if freezes[0]["variant"] == "none":
        return ""
    largest = max(f["max_change"] for f in freezes)
    earlier = [f["max_change_before_rewind"] for f in freezes if f.get("max_change_before_rewind") is not None]
    shown = "0" if largest == 0 else f"{largest:.2g}"
    return shown + (f" (before the rewind {max(earlier):.2g})" if earlier else "")


def same(record: Record, one: str, other: str) -> str:
    """Whether two kinds of arm of all cells and seeds ended alike, reply by reply."""
    pairs = [
        (a, b) for a in record["arms"].values() for b in record["arms"].values()
        if a["cell"] and a["cell"] == b["cell"] and label(a) == one and label(b) == other
    ]  # fmt: skip
    equal = sum(
        x["safety"] == y["safety"] and x["loss"] == y["loss"]
        for a, b in pairs
        for x, y in zip(a["runs"], b["runs"], strict=True)
    )
    return f"'{one}' and '{other}' ended with the same loss and the same rates in {equal} of {sum(len(a['runs']) for a, _ in pairs)} runs."


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        found = read_record(Path(folder))
        print(
            f"\n### {folder}\n\n{table(found)}\n\n{same(found, 'nothing frozen', 'safety-only frozen (gradient hook)')}"
        )
