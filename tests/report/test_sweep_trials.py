"""The trials of a sweep's report: what was tuned, what failed, what they prove."""

import math

from deltalab.report.sweeps import sweep_contents
from deltalab.report.text import text
from tests.report.made_up import sweep_of, table, told


def test_a_choice_at_the_end_of_what_was_tried_is_named(tmp_path):
    """r=2 does best at the highest rate, r=4 between two others, r=8 at the lowest."""
    best = {2: 0.1, 4: 0.01, 8: 0.001}
    plan = {"product": {"adapt.r": [2, 4, 8]}, "tune": {"values": {"optim.lr": [0.001, 0.01, 0.1]}}}
    contents = sweep_contents(
        sweep_of(tmp_path / "s", lambda t: 5 + (t.spec.optim.lr == best[t.spec.adapt[0].r]), **plan).folder
    )
    rows = next(t for section in contents.sections for t in section.tables if t.name == "tuning").rows
    assert [row[1:] for row in rows] == [
        ("lr=0.001", "0.5", ""), ("lr=0.01", "0.5", ""), ("lr=0.1", "0.6", "chosen, the highest"),
        ("lr=0.001", "0.5", ""), ("lr=0.01", "0.6", "chosen"), ("lr=0.1", "0.5", ""),
        ("lr=0.001", "0.6", "chosen, the lowest"), ("lr=0.01", "0.5", ""), ("lr=0.1", "0.5", ""),
    ]  # fmt: skip
    assert "a wider range may do better: r=2; r=8." in told(contents, "trials").sentence


def test_failed_and_waiting_trials_are_told(tmp_path):
    def right(trial):
        if trial.spec.adapt[0].r == 8:
            return "out of memory\nby 3 GB" if trial.spec.seed == 1 else None
        return 5

    found = sweep_contents(sweep_of(tmp_path / "s", right).folder)
    assert found.subtitle.startswith("unfinished: 2 trials to go")
    first = found.verdicts[0]
    assert (first.name, first.outcome, first.tone) == ("trials", "unfinished", "open")
    assert "3 of 6 trials are finished, 1 failed." in first.sentence
    assert "1 of 2 groups have no finished trial: r=8." in first.sentence
    failed = table(found, "failed")
    assert failed["r=8, seed=1"]["error"] == "out of memory by 3 GB"
    assert "There is no other group to compare it with." in told(found, "best accuracy on own").sentence
    assert "out of memory by 3 GB" in text(found)


def test_proofs_that_do_not_hold_are_named(tmp_path):
    def fields(trial):
        held = trial.label != "r=8, seed=2"
        proofs = {"gradient_only_delta": True, "base_untouched": trial.spec.seed != 3}
        return {"cost": {"merge": {"holds": held}}, "proofs": proofs}

    found = sweep_contents(sweep_of(tmp_path / "s", lambda _: 5, fields=fields).folder)
    proofs = told(found, "proofs")
    assert (proofs.outcome, proofs.tone, found.verdicts[0]) == ("3 broken", "bad", proofs)
    assert "merging is within its tolerance: 5 of 6 (not: r=8, seed=2)" in proofs.sentence
    rows = table(found, "proofs")
    assert rows["base untouched, by its digest"]["exceptions"] == "r=2, seed=3; r=8, seed=3"
    assert rows["gradients in the delta alone"] == {"holds": "6", "does not": "0", "not recorded": "0", "exceptions": "—"}  # fmt: skip


def test_tasks_that_share_no_score_are_reported_one_by_one(tmp_path):
    """Neither scores nor losses of two tasks are compared; a part's baseline is the one that is like the sweep's."""
    data = [[{"task": "skills"}], [{"task": "refusals"}]]

    def fields(trial):
        other = trial.spec.data[0].task == "refusals"
        after = {"new": {"bleu4": 0.1 * trial.spec.seed + 0.01 * trial.spec.adapt[0].r}}
        return {"scores": {"after": after, "before": after}} if other else {}

    sweep = sweep_of(
        tmp_path / "s",
        lambda t: 4 + (t.spec.adapt[0].r > 2),
        fields=fields,
        product={"data": data, "adapt.r": [2, 4, 8]},
    )
    built = sweep_contents(sweep.folder)
    assert [section.name for section in built.sections if section.plots] == [
        "Which is better: own", "What it costs: own", "How they trained: own", "What changed inside: own",
        "Which is better: new", "What it costs: new", "How they trained: new", "What changed inside: new",
    ]  # fmt: skip
    lines = {
        t.name: {row[0]: dict(zip(t.head[1:], row[1:], strict=True)) for row in t.rows}
        for section in built.sections
        for t in section.tables
    }
    own, new = lines["score.own.accuracy-own"], lines["score.new.bleu4-new"]
    assert list(own) == ["r=2", "r=4", "r=8"]
    assert {name: row["verdict"] for name, row in new.items()} == {
        "r=2": "baseline", "r=4": "better", "r=8": "better",
    }  # fmt: skip
    assert list(lines["held_out-new"]) == list(new)
    assert "over the 4 tests of the scores" in next(
        t.note for s in built.sections for t in s.tables if t.name == "score.new.bleu4-new"
    )
    assert told(built, "best bleu4 on new").sentence.startswith("Best by bleu4 on new: r=8, 0.280")
    assert "Beside the baseline r=2, by bleu4 on new, 2 are better" in told(built, "against the baseline, new").sentence
    assert len([plot for plot in built.plots() if plot.name.startswith("axis-")]) == 2
    names = [panel.name for plot in built.plots() for panel in plot.panels]
    assert len(set(names)) == len(names)
    assert "What it costs: new\n------------------" in text(built)


def test_a_task_of_which_nothing_is_a_number_is_left_to_the_trials(tmp_path):
    data = [[{"task": "skills"}], [{"task": "refusals"}]]
    nan = {
        "scores": {"before": {"new": {"bleu4": 0.1}}, "after": {"new": {"bleu4": math.nan}}},
        "result": {"loss": [3.0, math.nan], "held_out": [3.0, math.nan]},
    }
    built = sweep_contents(
        sweep_of(
            tmp_path / "s",
            lambda _: 5,
            fields=lambda t: nan if t.spec.data[0].task == "refusals" else {},
            product={"data": data},
        ).folder
    )
    assert {section.name.partition(": ")[2] for section in built.sections} == {"own", ""}
    assert "6 of 6 trials are finished" in told(built, "trials").sentence


def test_equal_means_have_no_best(tmp_path):
    built = sweep_contents(sweep_of(tmp_path / "s", lambda _: 5).folder)
    assert told(built, "best accuracy on own").sentence == "All 2 groups have the same accuracy on own: 0.500."
