"""What a study concludes, from results made by hand: which arms are compared, over which seeds, and as one family."""

import pytest

from deltalab.core.spec import build
from deltalab.core.stats import holm
from deltalab.studies.conclusions import cells, of_drift
from deltalab.studies.drift import DriftStudySpec
from deltalab.studies.parts import runs_of

MEASURES = ("l2_per_sqrt", "cosine_distance")


def spec_of(**changes) -> DriftStudySpec:
    arms = [
        {"name": "free"}, {"name": "held", "freeze": "delta_mask"}, {"name": "undone", "freeze": "rewind"},
        {"name": "held-random", "freeze": "delta_mask", "group": "matched"}, {"name": "undone-random", "freeze": "rewind", "group": "matched"},
    ]  # fmt: skip
    values = {
        "tune": {"data": [{"task": "benign"}]},
        "arms": arms,
        "seeds": [1, 2, 3],
        "evaluate": {"prompts": ["advbench", "xstest_safe"]},
    }
    return build(DriftStudySpec, {**values, **changes})


def asked(refused: int, n: int = 60, right: int = 50) -> dict:
    letters = "R" * refused + "C" * (n - refused)
    return {
        "safety": {"advbench": {"letters": letters}, "xstest_safe": {"letters": "C" * n}},
        "skills": {"right": "1" * right + "0" * (60 - right)},
    }


def results_of(spec: DriftStudySpec, refused: dict[str, int], ratio: float = 1.0) -> dict:
    """refused: arm → how many of sixty harmful prompts it still refuses, more by one with each seed."""
    draws = [1 + 0.001 * (i % 11 - 5) for i in range(99)]
    out = {"evaluate:before": asked(58)}
    for run in runs_of(spec.all_arms, spec.seeds):
        frozen = run.arm.freeze != "none"
        out[f"tune:{run.name}"] = {
            "freeze": {"variant": run.arm.freeze, "entries": 10 * frozen, "max_change": 0.0 if frozen else None, "held": True if frozen else None},
            "final": {"values": dict.fromkeys(MEASURES, ratio), "nulls": {k: dict.fromkeys(MEASURES, draws) for k in ("magnitude", "utility")}},
        }  # fmt: skip
        out[f"evaluate:{run.name}"] = asked(refused[run.arm.name] + spec.seeds.index(run.seed))
    return out


EVERY = {"free": 20, "held": 40, "undone": 41, "held-random": 22, "undone-random": 39}


def test_every_claim_of_a_study_is_there_once():
    names = [v["name"] for v in of_drift(spec_of(), results_of(spec_of(), EVERY))]
    assert names == [
        "refusals",
        "false refusals",
        "skills",
        "drift",
        "freezing safety-only",
        "freezing safety-only (put back at the end)",
    ]


def test_a_way_of_freezing_is_compared_with_random_entries_frozen_in_the_same_way():
    found = {v["name"]: v for v in of_drift(spec_of(), results_of(spec_of(), EVERY))}
    held, undone = found["freezing safety-only"], found["freezing safety-only (put back at the end)"]
    assert held["numbers"]["sets"]["control"]["before"] == pytest.approx(23 / 60)  # of held-random, mean over seeds
    assert undone["numbers"]["sets"]["control"]["before"] == pytest.approx(40 / 60)
    assert held["outcome"] == "protects"
    assert undone["outcome"] in ("no better than random", "undecided")
    assert held["numbers"]["sets"]["free"]["per_seed"] == pytest.approx([20 / 60] * 3)


def test_everything_else_frozen_has_no_control_of_its_size():
    arms = [
        {"name": "free"},
        {"name": "rest", "freeze": "delta_mask", "group": "complement"},
        {"name": "some", "freeze": "delta_mask", "group": "matched"},
    ]
    spec = spec_of(arms=arms)
    found = {v["name"]: v for v in of_drift(spec, results_of(spec, {"free": 20, "rest": 55, "some": 22}))}
    assert list(found["freezing everything else"]["numbers"]["sets"]) == ["free"]


def test_arms_are_compared_within_their_cell():
    spec = spec_of(sweep={"n": [10, 50]})
    refused = {arm.name: EVERY[arm.name.rpartition("-n")[0]] - (15 if arm.n == 50 else 0) for arm in spec.all_arms}
    assert [(cell.name, [arm.name for arm in cell.arms][:2]) for cell in cells(spec.all_arms)] == [
        ("n 10", ["free-n10", "held-n10"]), ("n 50", ["free-n50", "held-n50"]),
    ]  # fmt: skip
    found = {v["name"]: v["numbers"] for v in of_drift(spec, results_of(spec, refused))}
    assert found["refusals (n 10)"]["sets"]["advbench"]["after"] == pytest.approx(21 / 60)
    assert found["refusals (n 50)"]["sets"]["advbench"]["after"] == pytest.approx(6 / 60)
    assert found["freezing safety-only (n 50)"]["sets"]["free"]["before"] == pytest.approx(6 / 60)
    assert found["freezing safety-only (n 50)"]["sets"]["control"]["before"] == pytest.approx(8 / 60)


def test_p_values_are_adjusted_over_the_whole_study():
    found = of_drift(spec_of(), results_of(spec_of(), EVERY))
    tests = [t for v in found for t in v["numbers"]["tests"] if t["asks"] == "change" and t["p"] is not None]
    assert [t["adjusted"] for t in tests] == pytest.approx(holm([t["p"] for t in tests]))
    assert len(tests) > 6


def test_zeroing_joins_the_family_where_it_was_asked_for():
    spec = spec_of(ablate=20)
    replies = {"safety-only": asked(3, right=50), **{f"random-{i}": asked(50 + i % 5) for i in range(20)}}
    for one in replies.values():
        one["skills"]["value"] = one["skills"]["right"].count("1") / 60
    results = {**results_of(spec, EVERY), "ablate": {"replies": replies, "fraction": 0.08}}
    results["evaluate:before"]["skills"]["value"] = 50 / 60
    first = of_drift(spec, results)[0]
    assert first["name"] == "ablation"
    assert first["numbers"]["zeroed"]["refused"] == pytest.approx(3 / 60)
    assert first["numbers"]["p_permutation"]["refused"] == pytest.approx(1 / 21)
    assert first["outcome"] == "refusals hang on it"
