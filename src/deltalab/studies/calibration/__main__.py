"""python -m deltalab.studies.calibration FOLDER: the tables of docs/results/calibration.md."""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deltalab.core.files import write_json
from deltalab.studies.calibration import simulate as s
from deltalab.studies.calibration.geometry import Size, made
from deltalab.studies.calibration.tables import markdown

SEEDS = (1, 3, 5)
BORDERS, BEYOND = (-0.1, -0.05, 0.0, 0.05), (-0.2, -0.15, -0.075, 0.1)
TIMES = (1.01, 1.02, 1.05, 1.1, 1.2)
Rates = dict[str, list[s.Rate]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing in the folder, simulate, and write `calibration.json` and `calibration.md` there."""
    parser = argparse.ArgumentParser(prog="python -m deltalab.studies.calibration", description=__doc__)
    parser.add_argument("folder", type=Path, help="where tunings and sums are kept")
    parser.add_argument("--repeats", type=int, default=2000, help="studies for each claim")
    parser.add_argument("--seeds", type=int, default=Size().seeds, help="tunings")
    parser.add_argument("--groups", type=int, default=Size().groups, help="random groups")
    asked = parser.parse_args(arguments)
    asked.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.0f} s  {text}", file=sys.stderr, flush=True)

    data = made(asked.folder, Size(seeds=asked.seeds, groups=asked.groups), say)
    tables = drift_tables(data, asked.repeats, say) | score_tables(data, asked.repeats, say)
    found = s.trap(data["selection"]["chosen"], data["selection"]["every"])
    write_json(asked.folder / "calibration.json", {
        "repeats": asked.repeats, "tables": {name: [[*r, *r.interval] for r in rows] for name, rows in tables.items()}, "trap": found._asdict(),
    })  # fmt: skip
    (asked.folder / "calibration.md").write_text(markdown(tables, found))
    say(f"wrote {asked.folder / 'calibration.md'}")


def drift_tables(data: Mapping[str, s.Arrays], repeats: int, say: Callable[[str], None]) -> Rates:
    """False claims, power, families and coverage of the drift verdict, by kind of study."""
    drift, out = data["drift"], defaultdict[str, list[s.Rate]](list)
    for seeds in SEEDS:
        out["drift: random groups"] += s.drift_claims(drift, seeds, repeats)
        out["drift: random groups, ΔW × 1.1 (the margin)"] += s.drift_claims(drift, seeds, repeats, times=1.1)
        for times in TIMES:
            out[f"drift: random groups, ΔW × {times:g}, no margin"] += s.drift_claims(
                drift, seeds, repeats // 4, times=times, margin=None
            )
        out["drift: intervals"] += [s.drift_coverage(drift, seeds, repeats)]
        out["drift: eight random groups"] += s.families(drift, seeds, repeats)
        out["drift: eight random groups, ΔW × 1.1 (the margin)"] += s.families(drift, seeds, repeats, times=1.1)
        out["drift: shuffled copies"] += s.shuffled_claims(data["shuffled"], data["counted"], seeds, repeats // 2)
        say(f"drift verdicts over {seeds} seeds")
    return dict(out)


def score_tables(data: Mapping[str, s.Arrays], repeats: int, say: Callable[[str], None]) -> Rates:
    """False claims, power and coverage of the score verdict; shares; intervals of means."""
    scores, out = data["scores"]["scores"][:, 1:], defaultdict[str, list[s.Rate]](list)
    for seeds in SEEDS:
        kinds: list[tuple[str, int | None, bool]] = [("64 samples, given", 64, True)]
        kinds += [("all samples, not given", None, False), ("64 samples, not given", 64, False)] if seeds > 1 else []
        for label, samples, given in kinds:
            for truth in (*BORDERS, *BEYOND):
                times = repeats if truth in BORDERS else repeats // 4
                out[f"score: {label}, true change {truth:+.1%}"] += s.score_claims(
                    scores, seeds, times, truth, samples, given, draws=39
                )
        out["score: against random groups"] += s.score_claims(scores, seeds, repeats, None, 64, True)
        out["shares"] += s.share_claims(seeds, repeats)
        if seeds > 1:
            out["means"] += s.nested_coverage(seeds, repeats)
        say(f"score verdicts over {seeds} seeds")
    return dict(out)


if __name__ == "__main__":
    main()
