"""What the reports of studies show: every number is the record's, every verdict has its picture."""

import copy
import html
import itertools
import json
import math

import pytest

from deltalab.report import build_report, contents, figures, values
from deltalab.report.page import page
from deltalab.report.text import text
from tests.report.fixture import GROUPS, KINDS, SETS, STEPS, drift_record, score_record
from tests.report.reading import figures_of, panels_of, tables_of, verdict


def test_figures_hold_the_records_numbers(record):
    by_name = panels_of(record)
    for name in SETS:
        for row, arm in zip(by_name[f"refusal-{name}"].rows, record["arms"].values(), strict=True):
            rate = arm["safety"][name]["refusal"]
            assert (row.label, row.value, row.low, row.high) == (arm["label"], rate["value"], rate["low"], rate["high"])
            assert (row.n, row.seeds) == (SETS[name], ())
    assert [row.hollow for row in by_name["skills"].rows] == [True, False, False, False, False]
    replies = by_name["replies-advbench"]
    assert replies.rows[1][1] == [record["arms"]["free"]["safety"]["advbench"][part] for part in replies.parts]
    curves = record["arms"]["free"]["curves"]
    panel = by_name["drift-free-l2_per_sqrt"]
    assert list(panel.x) == list(STEPS)
    for line in panel.lines:
        assert line.values == [row["groups"][line.label]["l2_per_sqrt"] for row in curves]
    assert panel.band[0] == [row["nulls"]["magnitude"]["band"]["l2_per_sqrt"]["low"] for row in curves]
    assert [row.zeros for row in by_name["rows-frozen"].rows] == [0, 0, 900, 0, 0]
    assert by_name["rows-free"].rows[0].median == record["arms"]["free"]["distributions"]["safety"]["quantiles"]["0.5"]
    assert by_name["rows-free"].limits == by_name["rows-frozen"].limits
    grid = by_name["groups-kinds"]
    assert (list(grid.rows), len(grid.columns)) == ([name for name in GROUPS if name != "complement"], len(KINDS))
    assert [seconds for _, seconds in by_name["times"].rows] == list(record["stages"].values())


def test_panels_of_arms_share_their_axes(record):
    tops = {}
    for plot in figures_of(record).values():
        if plot.name.startswith("drift-"):
            for panel in plot.panels:
                tops.setdefault(panel.title, set()).add(panel.top)
    assert all(len(t) == 1 for t in tops.values())
    assert len(tops) == 3


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)], ids=str)
def test_every_verdict_has_its_picture(seeds):
    record = drift_record(seeds)
    by_name = panels_of(record)
    nulls, end = verdict(record, "drift")["nulls"], record["arms"]["free"]["final"]
    for mark, kind in zip(by_name["against-draws"].rows, ("magnitude", "utility"), strict=True):
        found = nulls[kind]["l2_per_sqrt"]
        assert (mark.value, mark.low, mark.high) == (found["ratio"], found["low"], found["high"])
        assert mark.draws == end[kind]["draws"]
        assert list(mark.seeds) == (found["per_seed"] if len(seeds) > 1 else [])
    assert by_name["against-draws"].zones == [(1 / 1.1, 1.1, "")]
    changed = [c for name in ("refusals", "false refusals", "skills") for c in verdict(record, name)["sets"].values()]
    gained = [
        c
        for name in ("freezing safety-only", "freezing safety-only (put back at the end)")
        for c in verdict(record, name)["sets"].values()
    ]
    for panel, changes in ((by_name["changes-0"], changed), (by_name["freezing-0"], gained)):
        for mark, c in zip(panel.rows, changes, strict=True):
            assert [mark.value, mark.low, mark.high] == pytest.approx(
                [100 * c[k] for k in ("difference", "low", "high")]
            )
            assert list(mark.seeds) == pytest.approx([100 * v for v in c["per_seed"]] if len(seeds) > 1 else [])
        assert panel.zones == [(-10, 10, "")]
    shares = record["ablation"]
    for mark, part in zip(by_name["ablation"].rows, ("refused", "complied", "broken", "skills"), strict=True):
        assert mark.value == 100 * shares["safety-only"][part]
        assert mark.draws == [100 * shares[f"random-{i}"][part] for i in range(20)]
        assert mark.start == 100 * verdict(record, "ablation")["before"][part]


def test_shares_of_single_seeds_stand_beside_their_mean():
    record = drift_record((0, 1, 2))
    arm = record["arms"]["free"]
    row = panels_of(record)["refusal-advbench"].rows[1]
    assert list(row.seeds) == [run["safety"]["advbench"]["refusal"] for run in arm["runs"]]
    assert row.value == pytest.approx(sum(row.seeds) / 3)
    assert "means over 3 seeds" in figures_of(record)["outcomes"].caption
    shares = panels_of(record)["frozen-shares"].rows[1]
    assert shares.value == pytest.approx(
        100 * (104 * row.value + 100 * arm["safety"]["jailbreakbench"]["refusal"]["value"]) / 204
    )
    assert shares.value == pytest.approx(sum(shares.seeds) / 3)


def test_replies_stand_above_the_drift_at_the_same_steps(record):
    stack = panels_of(record)["steps-free"]
    replies, others, drifted = stack.panels
    assert {lines.reach for lines in stack.panels} == {(0, 200)}
    rows = record["arms"]["free"]["asked"]
    for line in replies.lines:
        assert line.values == pytest.approx(
            [100 * sum(row["sets"][s][line.label] * 40 for s in ("advbench", "jailbreakbench")) / 80 for row in rows]
        )
    assert others.lines[1].values == [100 * row["skills"] for row in rows]
    assert drifted.lines[0].values == panels_of(record)["drift-free-l2_per_sqrt"].lines[2].values
    figure = figures.draw([stack], 1)
    boxes = [ax.get_position() for ax in figure.axes]
    assert len({(round(box.x0, 6), round(box.x1, 6)) for box in boxes}) == 1
    assert all(below.y1 < above.y0 for above, below in itertools.pairwise(boxes))
    silent = copy.deepcopy(record)
    for arm in silent["arms"].values():
        arm["asked"] = []
    assert "steps" not in {section.id for section in contents.contents(silent).sections}


def test_a_sweep_is_told_by_cell(undrawn):
    record = drift_record(sweep={"lr": [1e-4, 3e-4, 1e-3], "steps": [100, 200, 400]}, ablate=0)
    found = contents.contents(record)
    panel = panels_of(record)["refusal-advbench"]
    assert panel.arms == ["nothing frozen", "safety-only frozen", "matched random frozen"]
    assert [label for label, _ in panel.rows][:2] == ["lr 0.0001, steps 100", "lr 0.0001, steps 200"]
    arms = [arm for name, arm in record["arms"].items() if name != "before"]
    drawn = [rate.value for _, rates in panel.rows for rate in rates]
    assert drawn == [arm["safety"]["advbench"]["refusal"]["value"] for arm in arms]
    assert panel.start.value == record["arms"]["before"]["safety"]["advbench"]["refusal"]["value"]
    for name in ("changes", "against", "freezing"):
        axes = {p.reach for p in figures_of(record)[name].panels if not p.name.startswith("frozen")}
        assert len(axes) == 1, name
    source = page(found, "0")
    head = source[source.index('class="outcomes"') : source.index("</table>")]
    assert head.count("<tr>") == 10
    assert all(f">{v['outcome']}<" in head for v in record["verdicts"])
    assert source.index("These 45 verdicts in words") < source.index(
        html.escape(record["verdicts"][-1]["sentence"].split(" %")[0])
    )
    assert all(t.folded for t in tables_of(record).values() if len(t.rows) > 20)
    assert len(text(found)) > 5000


def test_overlaps_stand_between_floor_and_ceiling(record):
    rows = {row[0]: row[1:] for row in tables_of(record)["overlaps"].rows}
    assert rows["safety and utility"] == ("0.210", "0.026", "0.690", "0.210")
    assert rows["safety and safety-only"][3] == "—"
    parts = tables_of(record)["overlap-parts"]
    assert len(parts.rows) == 3 * (4 + len(KINDS))
    assert parts.rows[0] == ("safety and utility: layer 0", "5.00 %", "4.00 %", "0.210", "0.024", "0.690", "0.210")
    lines = panels_of(record)["overlap-layers"].lines
    assert [line.label for line in lines] == ["overlap", "independent", "halves, safety", "halves, utility"]
    assert lines[0].values == [21.0] * 4


def test_freezing_is_told_in_full(record):
    table_ = tables_of(record)["frozen"]
    rows = {row[0]: row[1:] for row in table_.rows}
    assert rows["safety-only frozen (put back at the end)"] == (
        "put back at the end",
        "safety-only",
        "121,000 (4.0 %)",
        "0",
        "0.0123",
        "yes",
    )
    assert rows["nothing frozen"][0] == "nothing"
    assert "Safety-only frozen (put back at the end): the others were trained beside entries that moved." in table_.note
    moving = next(line for line in panels_of(record)["drift-rewound-l2_per_sqrt"].lines if "put back" in line.label)
    assert moving.values[-1] > 0
    assert "put back after the last step" in figures_of(record)["drift-rewound"].caption
    sizes = {row[0]: row[1:] for row in tables_of(record)["groups"].rows}
    assert sizes["safety (top 5 %)"][:2] == ("5.00 %", "5.64 %")


@pytest.mark.parametrize("seeds", [(42,), (42, 43, 44)], ids=str)
def test_scores_before_and_after(seeds):
    record = score_record(seeds)
    by_name, arm, before = panels_of(record), record["arms"]["free"], record["arms"]["before"]["scores"]
    for what in ("base", "merged"):
        numbers_ = verdict(record, f"score, {what} (nothing frozen)")
        mark = by_name[f"score-{what}"].rows[0]
        assert mark.value == 100 * numbers_["change"]
        assert (mark.low is None) == (len(seeds) == 1)
        after = [sum(one[what]["nulls"]["magnitude"][7] for one in arm["scores"]) / len(seeds)]
        assert mark.draws[7] == pytest.approx(100 * (after[0] / before["nulls"]["magnitude"][7] - 1))
        assert by_name[f"score-{what}"].zones == [(-math.inf, -10, "A"), (-5, 5, "B")]
    rows = by_name["scores-free-safety"].rows
    assert rows[0].counts == before["groups"]["safety"]["counts"]
    assert rows[1].counts == [
        sum(c) for c in zip(*(one["base"]["groups"]["safety"]["counts"] for one in arm["scores"]), strict=True)
    ]
    assert rows[0].median == before["groups"]["safety"]["quartiles"][1]
    assert rows[0].mean == before["groups"]["safety"]["mean"]
    layer = by_name["layers-free-merged"].lines[0]
    means = [one["merged"]["groups"]["safety"]["layers"]["2"] for one in arm["scores"]]
    assert layer.values[2] == pytest.approx(
        100 * (sum(means) / len(seeds) / before["groups"]["safety"]["layers"]["2"] - 1)
    )


def test_the_luck_of_the_chosen_is_told():
    record = score_record()
    rows = {row[0]: row[1:] for row in tables_of(record)["selection"].rows}
    there, here = (
        record["selection"]["groups"]["safety"]["mean"],
        record["arms"]["before"]["scores"]["groups"]["safety"]["mean"],
    )
    assert rows["group 'safety'"] == (
        values.number(there),
        values.number(here),
        f"{100 * (here / there - 1):+.1f} %".replace("-", "−"),
    )
    assert rows["all weights"][2] == "0.0 %"
    summaries = tables_of(record)["scores"].rows
    assert len(summaries) == 3 + 2 * 2 * 3
    assert summaries[0][2:5] == ("safety", values.number(here), "—")


def test_a_study_without_skills_or_without_harmless_prompts(record, undrawn):
    lean = copy.deepcopy(record)
    lean["verdicts"] = [v for v in lean["verdicts"] if v["name"] not in ("skills", "false refusals")]
    for arm in lean["arms"].values():
        del arm["skills"], arm["safety"]["xstest_safe"]
        for run in arm["runs"]:
            run["skills"] = None
        for row in arm.get("asked", ()):
            del row["skills"], row["sets"]["xstest_safe"]
    found = contents.contents(lean)
    assert "skills" not in {p.name for plot in found.plots() for p in plot.panels}
    assert page(found, "0")
    assert text(found)


def test_undefined_measures_are_dashes(record, tmp_path, undrawn):
    lean = copy.deepcopy(record)
    for row in lean["arms"]["free"]["curves"]:
        for group in row["groups"].values():
            group["cosine_distance"] = None
    panel = panels_of(lean)["drift-free-cosine_distance"]
    assert figures.inline(panel, 0).startswith("<svg")
    assert tables_of(lean)["drift"].rows[0][4] == "—"
    (tmp_path / "record.json").write_text(json.dumps(lean))
    twin = json.loads(build_report(tmp_path).json.read_text())
    drawn = {p["name"]: p for s in twin["sections"] for f in s["figures"] for p in f["panels"]}
    assert drawn["drift-free-cosine_distance"]["lines"][0]["values"] == [None] * len(STEPS)


def test_what_did_not_move_is_told(undrawn):
    """A group without any drift has no place among random groups: the report stands without its picture."""
    record = drift_record()
    for arm in record["arms"].values():
        arm["final"] = {}
    found = contents.contents(record)
    assert "against" not in {plot.name for plot in found.plots()}
    assert page(found, "0")
