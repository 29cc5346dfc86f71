"""The study of score dynamics on a small random model: what it keeps is what a direct computation gives."""

import json
from pathlib import Path

import pytest
import torch

from deltalab.core.errors import UserError
from deltalab.core.spec import build
from deltalab.data.chat import encode_all
from deltalab.deltas.merge import merged
from deltalab.deltas.peft_format import load_adapter
from deltalab.models.load import load
from deltalab.safety.dynamics import summary
from deltalab.safety.group import Group
from deltalab.safety.groups import top
from deltalab.safety.scores import score
from deltalab.studies.score_dynamics import ScoreDynamicsSpec, run_study
from tests.bad_input.kit import save_model

SEEDS = [3, 4]


def spec_of(model: Path, **changes) -> ScoreDynamicsSpec:
    values = {
        "model": str(model), "data": [{"task": "refusals", "limit": 12}], "score": {"score": "wanda", "samples": 6},
        "group": {"q": 0.2, "nulls": 25},
        "tune": {"adapt": [{"method": "lora", "r": 2, "targets": "all-linear"}], "data": [{"task": "benign", "n": 12}],
                 "optim": {"steps": 4, "batch": 2, "lr": 3e-2}},
        "arms": [{"name": "free", "group": "safety"}, {"name": "frozen", "freeze": "delta_mask", "group": "safety"}],
        "evaluate": {"prompts": ["advbench", "xstest_safe"], "limit": 3, "skills": 3, "max_new_tokens": 2},
        "seeds": SEEDS,
    }  # fmt: skip
    return build(ScoreDynamicsSpec, {**values, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "m", context=512)


@pytest.fixture(scope="module", params=["wanda", "snip"])
def study(request, tmp_path_factory, model) -> tuple[ScoreDynamicsSpec, Path, dict]:
    """A finished study of each kind of score: spec, folder, record."""
    spec = spec_of(model, score={"score": request.param, "samples": 6})
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:  # the report's pictures have their own tests
        patch.setattr("deltalab.report.page.inline", lambda panel, number: "<svg></svg>")
        patch.setattr("deltalab.report.figures.save", lambda plot, folder: [])
        run_study(spec, out, jobs=1, say=lambda line: None)
    return spec, out, json.loads((out / "record.json").read_text())


def samples(spec: ScoreDynamicsSpec, part: int):
    """Every other of the first twelve encoded samples."""
    _, tokenizer = load(spec.model)
    return encode_all(tokenizer, [c for task in spec.data for c in task.train()], 512)[part:12:2]


def test_the_group_is_the_top_on_one_half_of_the_samples(study):
    spec, out, record = study
    loaded, _ = load(spec.model)
    scores = score(loaded, samples(spec, 0), spec.score)
    want, kept = top(scores, 0.2), Group.load(out / "select" / "safety")
    assert all(torch.equal(kept.mask(path), want.mask(path)) for path in want)
    assert record["groups"]["safety"]["entries"] == want.count
    on_selection = summary(scores, {"safety": want}, {})["groups"]["safety"]
    assert record["selection"]["groups"]["safety"]["mean"] == pytest.approx(on_selection["mean"], rel=1e-6)


def test_it_is_measured_on_the_other_half(study):
    spec, out, record = study
    seen, measured = ({tuple(sample.input_ids) for sample in samples(spec, part)} for part in (0, 1))
    assert not seen & measured
    loaded, _ = load(spec.model)
    group = Group.load(out / "select" / "safety")
    want = summary(score(loaded, samples(spec, 1), spec.score), {"safety": group}, {})
    before = record["arms"]["before"]["scores"]
    assert before["groups"]["safety"]["mean"] == pytest.approx(want["groups"]["safety"]["mean"], rel=1e-6)
    assert before["groups"]["safety"]["quartiles"] == pytest.approx(want["groups"]["safety"]["quartiles"], rel=1e-6)
    assert before["edges"] == pytest.approx(want["edges"], rel=1e-6)
    assert len(before["nulls"]["magnitude"]) == 25


@pytest.mark.parametrize("what", ["base", "merged"])
@pytest.mark.parametrize(("arm", "number"), [("free", 0), ("free", 1), ("frozen", 0)])
def test_scores_after_tuning_are_those_of_the_saved_adapter(study, what, arm, number):
    spec, out, record = study
    loaded, _ = load(spec.model)
    load_adapter(loaded, out / f"tune-{arm}-{SEEDS[number]}" / "adapter")
    scored = merged(loaded) if what == "merged" else loaded
    group = Group.load(out / "select" / "safety")
    want = summary(score(scored, samples(spec, 1), spec.score), {"safety": group}, {})
    kept = record["arms"][arm]["scores"][number][what]
    assert kept["groups"]["safety"]["mean"] == pytest.approx(want["groups"]["safety"]["mean"], rel=1e-5)
    assert kept["all"]["mean"] == pytest.approx(want["all"]["mean"], rel=1e-5)
    before = record["arms"]["before"]["scores"]
    assert kept["edges"] == before["edges"]
    assert kept["groups"]["safety"]["mean"] != before["groups"]["safety"]["mean"]


def test_verdicts_name_both_scores_of_every_arm(study):
    _, _, record = study
    names = [v["name"] for v in record["verdicts"]]
    assert [name for name in names if name.startswith("score")] == [
        "score, base (nothing frozen)", "score, base (safety frozen)", "score, merged (nothing frozen)", "score, merged (safety frozen)",
    ]  # fmt: skip
    merged_free = next(v for v in record["verdicts"] if v["name"] == "score, merged (nothing frozen)")["numbers"]
    before = record["arms"]["before"]["scores"]["groups"]["safety"]["mean"]
    after = [run["merged"]["groups"]["safety"]["mean"] for run in record["arms"]["free"]["scores"]]
    assert merged_free["per_seed"] == pytest.approx([value / before - 1 for value in after])
    assert any(name.startswith("freezing safety") for name in names)


def test_scores_are_given_back(study):
    _, out, _ = study
    assert not list(out.glob("scores/*"))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"arms": [{"name": "free", "group": "safety"}, {"name": "x", "freeze": "delta_mask"}]},
            "freezes 'safety-only'",
        ),
        ({"score": {"score": "magnitude"}}, "depends on no activations"),
        ({"group": {"unit": "row"}}, "a share of each row has no row"),
    ],
)
def test_faults_of_a_spec(model, changes, fault):
    with pytest.raises(UserError, match=fault):
        spec_of(model, **changes)
