"""The trials one by one: how far each is, what failed, and what each proves of itself."""

from collections.abc import Sequence

from deltalab.report.sweeps.gather import Gathered, measure_name
from deltalab.report.values import LONG, Section, Table, Tile, number
from deltalab.report.verdicts import Told

PROOFS = {
    "base_untouched": "base untouched, by its digest",
    "gradient_only_delta": "gradients in the delta alone",
    "merge.holds": "merging is within its tolerance",
    "reloaded": "the adapter read back is the one that was trained",
}
"""Columns that say whether something holds."""
NAMED = 3
"""Exceptions that a sentence names."""


def section(found: Gathered) -> Section:
    """Proofs, failures and all trials."""
    return Section("trials", "Trials", [], [*_tuned(found), *_proofs(found), *_failed(found), _all(found)])


def _tuned(found: Gathered) -> list[Table]:
    """What was tried for each group, and what was chosen."""
    if found.tuning is None:
        return []
    note = "On a part of the training data that was held out; the trials that are reported ran with what was chosen."
    by = list(dict.fromkeys(measure_name(row[2]) for row in found.tuning.rows))
    rows: list[tuple[str, ...]] = [(group, tried, measure_name(measure), number(value), said) for group, tried, measure, value, said in found.tuning.rows]  # fmt: skip
    head: tuple[str, ...] = ("", "tried", "by", "mean", "")
    if len(by) == 1:
        head, rows = ("", "tried", by[0], ""), [(*row[:2], *row[3:]) for row in rows]
    return [Table("tuning", "What was tuned, on validation data", head, rows, note, folded=len(rows) > LONG)]


def verdict(found: Gathered) -> Told:
    """How many trials are finished, failed, and to go."""
    counts, whole = found.counts, len(found.trials)
    sentence = f"{counts['finished']} of {whole} trials are finished" + (f", {counts['failed']} failed" if counts["failed"] else "") + "."  # fmt: skip
    left = [f"{counts[state]} {state}" for state in ("running", "begun", "waiting") if counts[state]]
    if found.tuning and found.tuning.waiting:
        left.append(f"{len(found.tuning.waiting)} group{'s' * (len(found.tuning.waiting) > 1)} still tuned")
    if left:
        sentence += f" The sweep is unfinished ({', '.join(left)}): what stands here is of the finished trials, and may change."  # fmt: skip
    groups = {trial.group for trial in found.trials}
    missing = [name for name in dict.fromkeys(trial.group for trial in found.trials) if name not in found.groups]
    if missing:
        sentence += f" {len(missing)} of {len(groups)} groups have no finished trial: {_few(missing)}."
    if edge := found.tuning.edge if found.tuning else []:
        sentence += (
            f" Tuned to the lowest or highest value that was tried, so that a wider range may do better: {_few(edge)}."
        )
    if found.note:
        sentence += f" {found.note}"
    outcome = "unfinished" if left else "finished" if not counts["failed"] else f"{counts['failed']} failed"
    tone = "open" if left else "bad" if counts["failed"] else "good"
    return Told("trials", "", outcome, sentence, {"kind": "trials", "tone": tone, "counts": dict(counts)})


def _few(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return "; ".join(names[:NAMED]) + (f"; and {len(names) - NAMED} more" if len(names) > NAMED else "")


def proofs(found: Gathered) -> Told:
    """Whether what has to hold does, in all trials that say so."""
    sentence, broken, known = [], 0, 0
    for column, words in PROOFS.items():
        holds, fails = _by_proof(found, column)
        if holds + len(fails):
            known += 1
            sentence.append(f"{words}: {holds} of {holds + len(fails)}")
            broken += len(fails)
            if fails:
                sentence[-1] += f" (not: {_few(fails)})"
    if not known:
        return Told("proofs", "", "not recorded", "The records say nothing of whether the base was left untouched.", {"kind": "trials", "tone": "open"})  # fmt: skip
    outcome = "all hold" if not broken else f"{broken} broken"
    return Told("proofs", "", outcome, f"Of the finished trials, {'; '.join(sentence)}.", {"kind": "trials", "tone": "bad" if broken else "good"})  # fmt: skip


def tiles(found: Gathered) -> list[Tile]:
    """How many trials, and their time."""
    counts = found.counts
    told = [f"{counts[state]} {state}" for state in ("failed", "running", "begun", "waiting") if counts[state]]
    seconds = sum(float(one.run.values["seconds"]) for one in found.done)
    time = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"  # fmt: skip
    return [
        Tile("Trials finished", f"{counts['finished']} of {len(found.trials)}", ", ".join(told) or "none failed"),
        Tile("Time of all trials", time, "the sum; they may have run side by side"),
    ]


def _by_proof(found: Gathered, column: str) -> tuple[int, list[str]]:
    """In how many trials it holds, and the labels of those in which it does not."""
    said = [(one.trial.label, one.run.values.get(column)) for one in found.done]
    return sum(value is not None and bool(value) for _, value in said), [label for label, value in said if value is not None and not value]  # fmt: skip


def _proofs(found: Gathered) -> list[Table]:
    rows = []
    for column, words in PROOFS.items():
        holds, fails = _by_proof(found, column)
        silent = len(found.done) - holds - len(fails)
        if holds + len(fails):
            rows.append((words, str(holds), str(len(fails)), str(silent), "; ".join(fails) or "—"))
    if not rows:
        return []
    return [Table("proofs", "What each trial proves of itself", ("", "holds", "does not", "not recorded", "exceptions"), rows)]  # fmt: skip


def _failed(found: Gathered) -> list[Table]:
    rows = [(trial.label, " ".join(found.failures[trial.id].split()), trial.id) for trial in found.trials if trial.id in found.failures]  # fmt: skip
    note = "The traceback lies in failed.json of the trial's folder."
    return [Table("failed", f"Failed trials ({len(rows)})", ("", "error", "trial"), rows, note, folded=True)] if rows else []  # fmt: skip


def _all(found: Gathered) -> Table:
    """A row a trial, with every measure."""
    of = {one.trial.id: one.run.values for one in found.done}
    measures = [*found.lines, *(["loss"] if "loss" not in found.lines else [])]
    costs = (("trained", "trained"), ("training_seconds", "training, s"))
    rows = []
    for trial in found.trials:
        values = of.get(trial.id, {})
        cells = [number(values.get(name)) for name in measures]
        cells += [f"{values[name]:,.0f}" if name in values else "—" for name, _ in costs]
        rows.append((trial.group, str(trial.spec.seed), found.states[trial.id], *cells, trial.id))
    head = ("", "seed", "state", *map(measure_name, measures), *(words for _, words in costs), "trial")
    return Table("trials", f"All trials, seed by seed ({len(rows)})", head, rows, "The last column is the trial's folder in trials/.", folded=True)  # fmt: skip
