"""The report of a sweep: hand-worked numbers of a made-up one, what is missing or broken, figures as three kinds of file."""

import json
import re

import pytest

from deltalab.core.errors import UserError
from deltalab.report import build_report, panels
from deltalab.report.charts import short
from deltalab.report.contents import Contents
from deltalab.report.figures import save
from deltalab.report.inside import heat_map, trimmed
from deltalab.report.page import page
from deltalab.report.style import beside
from deltalab.report.sweeps import sweep_contents
from deltalab.report.sweeps.gather import gather
from deltalab.report.sweeps.measures import fixed, numeric_axis, signed
from tests.report.made_up import sweep_of, table, told

RIGHT = {2: (4, 5, 6), 4: (3, 3, 3), 8: (8, 8, 9)}


def by_rank(trial) -> int:
    return RIGHT[trial.spec.adapt[0].r][trial.spec.seed - 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sweep_of(tmp_path_factory.mktemp("sweeps") / "ranks", by_rank, product={"adapt.r": [2, 4, 8]}).folder


@pytest.fixture(scope="module")
def contents(folder) -> Contents:
    return sweep_contents(folder)


def panel(contents: Contents, name: str):
    return next(one for plot in contents.plots() for one in plot.panels if one.name == name)


def test_means_and_differences_are_those_worked_by_hand(contents):
    scores, losses = table(contents, "score.own.accuracy"), table(contents, "held_out")
    assert [row["mean [95 %]"][:5] for row in scores.values()] == ["0.500", "0.300", "0.833"]
    assert scores["r=2"]["verdict"] == "baseline"
    assert scores["r=8"]["difference [95 %]"].startswith("+0.333 [")
    assert scores["r=8"]["tested on"] == "3 seeds × 10 examples, paired"
    # held-out: 1.82, 1.84, 1.86 beside 1.28, 1.36, 1.44: −0.48, sd 0.06 of the differences, t(2) = 4.303
    assert losses["r=8"]["mean [95 %]"].replace("\u00a0", " ") == "1.360 [1.161, 1.559]"
    assert losses["r=8"]["difference [95 %]"] == "−0.480 [−0.629, −0.331]"
    assert losses["r=8"]["p, Holm"] == "0.010"  # 2 · 0.00517: of two tests the smaller
    assert losses["r=8"]["verdict"] == "better"


def test_costs_are_those_of_the_records(contents):
    costs = table(contents, "training-cost")
    assert costs["r=2"] == {
        "trained parameters": "2,000", "% of the model": "0.2", "factor fewer": "500×", "adapter, MB": "0.0085",
        "training, s": "16", "tokens/s": "125", "memory above the base, MB": "8",
    }  # fmt: skip
    assert "use-cost" not in [t.name for section in contents.sections for t in section.tables]


def test_the_verdict_names_the_best_and_what_it_is_beside_others(contents):
    best = told(contents, "best accuracy on own")
    assert best.outcome == "r=8"
    assert re.match(r"Best by accuracy on own: r=8, 0\.833 \[0\.\d{3},\s1\.000\] \(3 seeds\)\. Both others are worse \(r=2: −0\.333 ", best.sentence)  # fmt: skip
    assert "Adjusted by Holm over 2 tests." in best.sentence
    assert told(contents, "trials").outcome == "finished"
    assert told(contents, "proofs").sentence == "Of the finished trials, base untouched, by its digest: 9 of 9."
    assert contents.tiles[0].value == "0.833"


def test_curves_have_the_mean_and_the_band_of_the_seeds(contents):
    loss = panel(contents, "training-loss").lines[0]
    assert list(loss.x) == list(range(1, 21))
    assert loss.values[-1] == pytest.approx(3.0 - 0.02 * 20 + 0.2)
    assert (loss.low[-1], loss.high[-1]) == (pytest.approx(2.7), pytest.approx(2.9))
    held = panel(contents, "held-out-loss").lines[2]
    assert (held.label, list(held.x), held.values[-1]) == ("r=8", [0, 10, 20], pytest.approx(2.8))


def test_probes_become_curves_spectra_and_maps(contents):
    assert panel(contents, "relative-norm").lines[0].values == pytest.approx([0.0, 0.025, 0.05])
    assert panel(contents, "effective-rank").lines[2].values == pytest.approx([0.0, 4.0, 4.0])
    spectra = panel(contents, "spectra")
    assert [len(line.values) for line in spectra.lines] == [2, 4, 8]
    assert spectra.lines[0].values == pytest.approx([0.2, 0.1])
    heat = panel(contents, "heat-relative-r=2")
    assert (heat.rows, heat.columns) == (["0", "1"], ["q_proj", "v_proj"])
    assert heat.values == [pytest.approx([0.02, 0.04]), pytest.approx([0.06, 0.08])]
    assert panel(contents, "cka").lines[0].values == pytest.approx([1.0, 0.98, 0.96])


def test_the_front_is_what_no_other_beats(contents):
    front = panel(contents, "pareto-trained")
    assert front.logx
    assert [point.label for point in front.points if point.filled] == ["r=8", "r=2"]
    assert [corner[0] for corner in front.joined] == [2000, 8000]
    memory = panel(contents, "pareto-memory_above")
    assert {point.label: point.x for point in memory.points} == {"r=2": 8.0, "r=4": 10.0, "r=8": 14.0}


def test_four_panels_compare_the_groups(contents):
    plot = next(plot for plot in contents.plots() if plot.name == "methods")
    assert [one.title for one in plot.panels] == ["Parameters trained", "Accuracy on own", "Memory", "Training time"]
    assert plot.columns == 2
    quality = plot.panels[1].rows[2]
    assert (quality.value, quality.colour) == (pytest.approx(25 / 30), "green")
    assert quality.low < quality.value < quality.high
    assert [row.value for row in plot.panels[3].rows] == [16.0, 32.0, 64.0]


def test_a_single_numeric_axis_is_drawn(contents, tmp_path):
    axis = panel(contents, "axis")
    assert [(point.x, point.y) for point in axis.points] == [(2, 0.5), (4, pytest.approx(0.3)), (8, pytest.approx(25 / 30))]  # fmt: skip
    assert not axis.logx
    together = sweep_of(tmp_path / "zip", lambda _: 5, product={}, zip=[{"adapt.r": [2, 32], "adapt.alpha": [4, 64]}])
    drawn = panel(sweep_contents(together.folder), "axis")
    assert (drawn.xlabel, drawn.logx, list(drawn.ticks)) == ("r (alpha with it)", True, [2.0, 32.0])
    two = sweep_of(tmp_path / "two", lambda _: 5, product={"adapt.r": [2, 8], "optim.lr": [0.001, 0.01]})
    assert numeric_axis(gather(two.folder)) == ("", {})
    cases = [{"name": "a", "adapt": [{"method": "lora"}]}, {"name": "b", "adapt": [{"method": "ia3"}]}]
    named = sweep_of(tmp_path / "cases", lambda _: 5, product={}, cases=cases)
    assert numeric_axis(gather(named.folder)) == ("", {})


def test_the_baseline_is_the_one_asked_for(folder, tmp_path):
    asked = table(sweep_contents(folder, "r=8"), "score.own.accuracy")
    assert asked["r=8"]["verdict"] == "baseline"
    assert asked["r=2"]["difference [95 %]"].startswith("−0.333")
    in_spec = sweep_of(tmp_path / "s", lambda trial: by_rank(trial) if trial.spec.adapt[0].r == 2 else None, baseline="r=8")  # fmt: skip
    found = sweep_contents(in_spec.folder)
    assert "The baseline 'r=8' has no finished trial; 'r=2' stands in for it." in told(found, "trials").sentence
    with pytest.raises(UserError, match="no group with a finished trial is called 'r=7'") as caught:
        sweep_contents(folder, "r=7")
    assert "r=8" in caught.value.nearest
    with pytest.raises(UserError, match="baseline: no group is called 'rank 2'"):
        sweep_of(tmp_path / "wrong", by_rank, baseline="rank 2")


def test_groups_are_ranked_by_the_measure_asked_for(folder):
    found = gather(folder, measure="held_out")
    assert (found.main, found.best, found.rises) == ("held_out", "r=8", False)
    quality = panel(sweep_contents(folder, measure="held_out"), "quality")
    assert not quality.bars  # of a loss, zero is far away
    with pytest.raises(UserError, match="no run has the measure 'score.own.accurcy'") as caught:
        gather(folder, measure="score.own.accurcy")
    assert caught.value.nearest[0] == "score.own.accuracy"


def test_one_seed_has_no_interval_but_that_of_its_examples(tmp_path):
    sweep = sweep_of(tmp_path / "one", by_rank, seeds=[1], product={"adapt.r": [2, 8]})
    found = sweep_contents(sweep.folder)
    assert table(found, "held_out") == {"r=2": {"seeds": "1", "mean": "1.820"}, "r=8": {"seeds": "1", "mean": "1.280"}}
    best = told(found, "best accuracy on own").sentence
    assert "(one seed)" in best
    assert "One seed: how another training would come out is not measured. The interval is over its examples alone." in best  # fmt: skip
    assert all(not line.low for line in panel(found, "training-loss").lines)
    losses = next(plot for plot in found.plots() if plot.name == "losses")
    assert "One seed, so no bands." in losses.caption
    by_loss = sweep_contents(sweep.folder, measure="held_out")
    assert all(row.low is None for row in panel(by_loss, "quality").rows)
    assert "One seed: no intervals" in next(plot for plot in by_loss.plots() if plot.name == "methods").caption


def test_a_sweep_without_a_finished_trial_has_no_report(tmp_path):
    sweep = sweep_of(tmp_path / "s", lambda trial: "no room" if trial.spec.seed == 1 else None)
    with pytest.raises(UserError, match="has no finished trial to report on") as caught:
        build_report(sweep.folder)
    assert caught.value.found == "2 failed, 4 waiting"
    assert not (sweep.folder / "report.html").exists()


def test_a_sweep_without_a_measure_has_no_report(tmp_path):
    empty = {"scores": {"before": {}, "after": {}}, "result": {"loss": [3.0, None], "held_out": []}}
    sweep = sweep_of(tmp_path / "s", lambda _: 5, fields=lambda _: empty)
    with pytest.raises(UserError, match="has a score or a loss"):
        gather(sweep.folder)


def test_columns_that_some_have_get_dashes_and_those_of_nobody_are_left_out(tmp_path):
    def fields(trial):
        some = {"load_seconds": 0.0125, "merge": {"largest": None}} if trial.spec.adapt[0].r == 2 else {}
        return {"cost": some, "forgetting": {"text": {"before": 1.5, "after": 1.48}}}

    found = sweep_contents(sweep_of(tmp_path / "s", lambda _: 5, fields=fields).folder)
    assert table(found, "use-cost") == {
        "r=2": {"load, ms": "12.5", "forgetting, nats/token": "−0.020"},
        "r=8": {"load, ms": "—", "forgetting, nats/token": "−0.020"},
    }
    costs = table(found, "training-cost")["r=8"]
    assert (costs["% of the model"], costs["memory above the base, MB"]) == ("0.8", "14")


def test_seeds_that_stopped_early_are_averaged_where_all_have_steps(tmp_path):
    sweep = sweep_of(tmp_path / "s", lambda _: 5, probed=False)
    path = sweep.place(sweep.trials[0]) / "curves" / "train.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:12]))
    found = sweep_contents(sweep.folder)
    assert [len(line.x) for line in panel(found, "training-loss").lines] == [12, 20]
    assert "inside" not in [section.id for section in found.sections]


def test_many_groups_stay_readable(tmp_path, undrawn):
    ranks, rates = [1, 2, 4, 8, 16, 32], [0.0001, 0.0003, 0.001, 0.003, 0.01]
    sweep = sweep_of(tmp_path / "s", lambda trial: 40 + trial.spec.adapt[0].r + trial.spec.seed, 100, product={"adapt.r": ranks, "optim.lr": rates})  # fmt: skip
    found = sweep_contents(sweep.folder)
    assert len(table(found, "score.own.accuracy")) == 30
    lines = panel(found, "held-out-loss").lines
    assert len(lines) == 8
    assert lines[0].label == "r=1, lr=0.0001"  # the baseline, though it is the worst
    assert len({(line.colour, line.dash) for line in lines}) == 8
    assert len(panel(found, "quality").rows) == 12
    assert len(next(plot for plot in found.plots() if plot.name == "heat-relative").panels) == 4
    assert "Of 30 groups the 7 best by accuracy on own and the baseline." in next(plot for plot in found.plots() if plot.name == "losses").caption  # fmt: skip
    folded = {t.name: t.folded for section in found.sections for t in section.tables}
    assert folded == {"score.own.accuracy": False, "held_out": True, "training-cost": True, "proofs": False, "trials": True}  # fmt: skip
    assert page(found, "0").count("<tr>") > 150


def test_everything_is_written_and_a_figure_is_the_same_bytes_again(folder, contents, tmp_path):
    built = build_report(folder)
    kinds = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert {path.suffix for path in built.figures} == set(kinds)
    assert {path.stem for path in built.figures} == {plot.name for plot in contents.plots()}
    assert {"methods", "pareto", "axis", "losses", "spectra", "heat-relative"} <= {path.stem for path in built.figures}
    for path in built.figures:
        assert path.read_bytes().startswith(kinds[path.suffix])
    for name in ("pareto", "losses"):
        for path in save(next(plot for plot in contents.plots() if plot.name == name), tmp_path):
            assert path.read_bytes() == (folder / "figures" / path.name).read_bytes(), path.name
    source = built.page.read_text()
    assert "from the records of its trials." in source
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]+)"', source))
    ids = re.findall(r'\bid="([^"]+)"', source)
    assert len(ids) == len(set(ids))
    twin = json.loads(built.json.read_text())
    assert twin["spec"]["product"] == {"adapt.r": [2, 4, 8]}
    drawn = {figure["name"]: figure for section in twin["sections"] for figure in section["figures"]}
    assert drawn["methods"]["panels"][3]["rows"][0]["value"] == 16.0
    assert built.verdict in built.text.read_text()
    assert "r=8      3  0.833" in built.text.read_text()


def test_names_of_users_are_escaped(tmp_path, undrawn):
    cases = [{"name": "<script>x</script>", "optim.lr": 0.01}, {"name": "$a$ & b", "optim.lr": 0.02}]
    found = sweep_contents(sweep_of(tmp_path / "s", lambda _: 5, product={}, cases=cases).folder)
    assert "<script" not in page(found, "0")


def test_only_a_sweep_has_a_baseline(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"format": 1, "kind": "train"}))
    with pytest.raises(UserError, match="is no sweep"):
        build_report(tmp_path, baseline="r=2")


def test_labels_keep_off_each_other_and_their_points():
    points = [(1.0, 1.0), (1.05, 1.0), (1.0, 1.1), (2.9, 1.9), (0.05, 0.05)]
    sizes = [(0.6, 0.13)] * 5
    taken = [(x - 0.05, y - 0.05, x + 0.05, y + 0.05) for x, y in points]
    placed = beside(points, sizes, taken, (0.0, 0.0, 3.0, 2.0))
    boxes = [(x - 0.3, y - 0.065, x + 0.3, y + 0.065) for x, y in placed]
    for i, box in enumerate(boxes):
        assert box[0] >= 0
        assert box[2] <= 3.0
        for other in [*boxes[:i], *taken]:
            assert box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
    crowded = beside([(0.5, 0.5)] * 40, [(0.6, 0.13)] * 40, [], (0.0, 0.0, 1.0, 1.0))
    assert None in crowded


@pytest.mark.parametrize(("value", "shown"), [(20_000, "20 k"), (3e6, "3 M"), (0.05, "0.05"), (0.0003, "3·10⁻⁴"), (0.0001, "10⁻⁴"), (0, "0")])  # fmt: skip
def test_numbers_at_ticks(value, shown):
    assert short(value) == shown


def test_numbers_in_columns():
    assert [fixed(v) for v in (0.5, -0.25, 12.3456, 0.0012345, 1234.5)] == ["0.500", "−0.250", "12.346", "0.00123", "1,234"]  # fmt: skip
    assert [signed(v) for v in (0.25, -0.25, 0.0, 0.0002)] == ["+0.250", "−0.250", "0", "0"]


def test_heat_maps_and_spectra():
    grid = heat_map("x", "x", {(1, "q"): 0.5, (0, "v"): 0.25})
    assert grid is not None
    assert (grid.rows, grid.columns, grid.values, grid.top) == (
        ["0", "1"],
        ["q", "v"],
        [[None, 0.25], [0.5, None]],
        0.5,
    )
    assert heat_map("x", "x", {}) is None
    assert trimmed([[2.0, 1.0], [4.0]]) == [3.0, 0.5]
    assert trimmed([[1.0, 1e-12]]) == [1.0]


def test_every_panel_is_described_by_its_numbers(contents):
    for plot in contents.plots():
        for one in plot.panels:
            assert re.search(r"\d", panels.describe(one)), one.name
            assert "nan" not in panels.describe(one), one.name
