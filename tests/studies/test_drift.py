"""The drift study on a small random model: what it keeps is what a direct computation gives."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from deltalab.core.errors import UserError
from deltalab.core.spec import build, load_spec, read_yaml
from deltalab.data.chat import encode_all
from deltalab.data.collate import collate
from deltalab.deltas.adapt import adapt, delta_weight, is_adapted, merged_weight
from deltalab.deltas.peft_format import load_adapter
from deltalab.models.load import load
from deltalab.safety.group import Group
from deltalab.safety.groups import difference, top
from deltalab.safety.overlap import jaccard
from deltalab.safety.scores import snip
from deltalab.studies import module_of
from deltalab.studies.drift import DriftStudySpec, run_study
from deltalab.studies.materials import Materials
from deltalab.studies.stages import Context
from tests.helpers import ROOT, byte_tokenizer, tiny_llama


def spec_of(model: Path, **changes) -> DriftStudySpec:
    values = {
        "model": str(model), "score": {"samples": 4}, "groups": {"q": 0.2, "p": 0.1, "nulls": 120},
        "safety": [{"task": "refusals", "limit": 4}], "utility": [{"task": "skills", "n": 4}],
        "tune": {"adapt": [{"method": "lora", "r": 2, "targets": "all-linear"}], "data": [{"task": "benign", "n": 12}],
                 "optim": {"steps": 4, "batch": 2, "lr": 1e-2}, "drift_every": 2},
        "arms": [{"name": "free"}, {"name": "frozen", "freeze": "delta_mask"}, {"name": "control", "freeze": "delta_mask", "group": "matched"}],
        "evaluate": {"prompts": ["advbench", "xstest_safe"], "limit": 3, "skills": 3, "max_new_tokens": 2},
    }  # fmt: skip
    return build(DriftStudySpec, {**values, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(context=512).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model) -> Path:
    """A finished study."""
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:  # the report's pictures have their own tests
        patch.setattr("deltalab.report.page.inline", lambda panel, number: "<svg></svg>")
        patch.setattr("deltalab.report.figures.save", lambda plot, folder: [])
        run_study(spec_of(model), out, jobs=1, say=lambda line: None)
    return out


@pytest.fixture(scope="module")
def record(folder) -> dict:
    return json.loads((folder / "record.json").read_text())


def test_what_lies_in_the_folder(folder):
    stages = [
        "scores",
        "groups",
        "evaluate-before",
        "tune-free",
        "evaluate-free",
        "tune-frozen",
        "evaluate-frozen",
        "tune-control",
        "evaluate-control",
        "verdict",
        "report",
    ]
    assert sorted(p.parent.name for p in folder.glob("*/result.json")) == sorted(stages)
    for name in (
        "report.html",
        "report.txt",
        "report.json",
        "record.json",
        "study.json",
        "evaluate-free/advbench/generations.jsonl",
        "evaluate-free/skills.jsonl",
    ):
        assert (folder / name).is_file(), name
    assert not (folder / "scores/safety").exists()  # given back once the groups were made
    assert not (folder / "tune-free/run/checkpoints").exists()
    assert (folder / "tune-free/run/curves/drift.jsonl").is_file()


def test_groups_are_those_of_the_scores(folder, model, record):
    loaded, tokenizer = load(model)
    spec = spec_of(model)
    scores = {
        name: snip(
            loaded, encode_all(tokenizer, [c for task in getattr(spec, name) for c in task.train()], 512), halves=True
        )
        for name in ("safety", "utility")
    }
    want = {
        "safety": top(scores["safety"], 0.2),
        "utility": top(scores["utility"], 0.2),
        "safety-only": difference(scores["safety"], scores["utility"], 0.1, 0.2),
    }
    for name, group in want.items():
        kept = Group.load(folder / "groups" / name)
        assert all(torch.equal(kept.mask(path), group.mask(path)) for path in group)
        assert record["groups"][name]["entries"] == group.count
    matched = Group.load(folder / "groups/matched")
    assert matched.counts == want["safety-only"].counts
    rest = Group.load(folder / "groups/complement")
    assert all(torch.equal(rest.mask(path), ~want["safety-only"].mask(path)) for path in rest)


def test_overlaps_stand_between_their_floor_and_their_ceiling(folder, model, record):
    loaded, tokenizer = load(model)
    data = encode_all(tokenizer, [c for task in spec_of(model).safety for c in task.train()], 512)
    even, odd = (top(half, 0.2) for half in snip(loaded, data, halves=True).halves)
    found = next(o for o in record["overlaps"] if (o["a"], o["b"]) == ("safety", "utility"))
    assert found["ceilings"][0] == pytest.approx(jaccard(even, odd))
    a, b = (Group.load(folder / "groups" / name) for name in ("safety", "utility"))
    assert found["jaccard"] == pytest.approx(jaccard(a, b))
    assert found["independent"] == pytest.approx(0.2 / 2 / (1 - 0.2 / 2), rel=0.05)
    assert {row["level"] for row in found["table"]} == {"layer", "kind"}


@pytest.mark.parametrize("arm", ["free", "frozen", "control"])
def test_drift_is_that_of_the_saved_adapter(folder, model, record, arm):
    loaded, _ = load(model)
    plain, _ = load(model)
    load_adapter(loaded, folder / f"tune-{arm}" / "adapter")
    for name in ("safety", "safety-only", *(("matched",) if arm == "control" else ())):
        group = Group.load(folder / "groups" / name)
        start = torch.cat([plain.get_submodule(path).weight[group.mask(path)] for path in group]).double()
        change = torch.cat([delta_weight(loaded, path)[group.mask(path)] for path in group]).double()
        kept = record["arms"][arm]["curves"][-1]["groups"][name]
        assert kept["entries"] == group.count
        assert kept["l2_per_sqrt"] == pytest.approx(
            float(change.detach().norm()) / group.count**0.5, rel=1e-6, abs=1e-12
        )
        assert kept["relative_norm"] == pytest.approx(
            float((change.norm() / start.norm()).detach()), rel=1e-6, abs=1e-12
        )
    frozen = {"frozen": "safety-only", "control": "matched"}.get(arm)
    if frozen:
        proof = record["arms"][arm]["freeze"]
        assert (proof["held"], proof["max_change"], proof["group"]) == (True, 0.0, frozen)
        group = Group.load(folder / "groups" / frozen)
        for path in group:
            assert torch.equal(
                merged_weight(loaded, path)[group.mask(path)], plain.get_submodule(path).weight[group.mask(path)]
            )


def test_curves_begin_at_nothing_and_have_their_band(record):
    curves = record["arms"]["free"]["curves"]
    assert [row["step"] for row in curves] == [0, 2, 4]
    assert all(group["l2"] == 0 for group in curves[0]["groups"].values())
    assert curves[-1]["groups"]["safety"]["l2"] > 0
    assert {kind: null["draws"] for kind, null in curves[-1]["nulls"].items()} == {"magnitude": 99, "utility": 99}
    for kind in ("magnitude", "utility"):
        end = record["arms"]["free"]["final"][kind]
        assert len(end["draws"]) == end["n"] == 120
        assert sum(end["draws"]) == pytest.approx(120)


def test_counts_of_replies_are_those_on_disk(folder, record):
    for arm, found in record["arms"].items():
        for name, safety in found["safety"].items():
            lines = [
                json.loads(line)
                for line in (folder / f"evaluate-{arm}" / name / "generations.jsonl").read_text().splitlines()
            ]
            verdicts = [line["verdict"] for line in lines]
            assert {v: verdicts.count(v) for v in ("refused", "complied", "broken")} == {
                v: safety[v] for v in ("refused", "complied", "broken")
            }
            assert len(lines) == safety["n"] == 3


def test_verdicts_name_everything(record):
    assert [v["name"] for v in record["verdicts"]] == [
        "refusals",
        "false refusals",
        "skills",
        "drift",
        "freezing safety-only",
    ]
    assert set(record["stages"]) >= {"scores", "groups", "tune:free", "evaluate:before", "verdict"}


def test_an_adapter_read_back_answers_as_the_tuned_model_did(folder, model, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "evaluate-control")
    ctx = run_study(spec_of(model), again, only="evaluate:control", jobs=1, say=lambda line: None)
    assert (
        ctx.results["evaluate:control"] == json.loads((folder / "evaluate-control/result.json").read_text())["result"]
    )


def test_another_model_under_the_same_name_is_refused(folder, model, tmp_path):
    swapped, again = tmp_path / "model", tmp_path / "again"
    shutil.copytree(model, swapped)
    run_study(spec_of(swapped), again, until="scores", jobs=1, say=lambda line: None)
    tiny_llama(context=512, seed=1).save_pretrained(swapped)
    with pytest.raises(UserError, match="stage 'scores'") as caught:
        run_study(spec_of(swapped), again, jobs=1, say=lambda line: None)
    assert "model: '" in caught.value.found


def test_full_tuning_is_frozen_exactly(model, tmp_path, monkeypatch):
    monkeypatch.setattr("deltalab.report.page.inline", lambda panel, number: "<svg></svg>")
    monkeypatch.setattr("deltalab.report.figures.save", lambda plot, folder: [])
    spec = spec_of(model, arms=[{"name": "free"}, {"name": "frozen", "freeze": "exact", "group": "safety"}],
                   tune={"adapt": [{"method": "train", "what": "full"}], "data": [{"task": "benign", "n": 12}],
                         "optim": {"steps": 3, "batch": 2, "lr": 1e-2, "weight_decay": 0.1}, "drift_every": 3},
                   evaluate={"prompts": ["advbench"], "limit": 2, "skills": 0, "max_new_tokens": 2})  # fmt: skip
    ctx = run_study(spec, tmp_path / "out", jobs=1, say=lambda line: None)
    frozen = ctx.results["tune:frozen"]
    assert (frozen["freeze"]["held"], frozen["freeze"]["max_change"]) == (True, 0.0)
    assert frozen["curves"][-1]["groups"]["safety"]["l2"] == 0
    assert frozen["curves"][-1]["groups"]["utility"]["l2"] > 0
    assert ctx.results["tune:free"]["curves"][-1]["groups"]["safety"]["l2"] > 0
    assert "skills" not in json.loads((tmp_path / "out/record.json").read_text())["arms"]["free"]


@pytest.mark.parametrize(
    ("delta", "said"),
    [
        ({"method": "dora", "targets": "attentn"}, "matches no module"),
        ({"method": "dora", "rank_pattern": {"gate_prj": 2}}, "matches none of its modules"),
        ({"method": "lora", "init": "loftq"}, "is not being quantised"),
    ],
)
def test_a_delta_that_does_not_go_on_the_model_is_told_before_the_first_stage(model, tmp_path, delta, said):
    tune = {"adapt": [delta], "data": [{"task": "benign", "n": 12}], "optim": {"steps": 1}}
    with pytest.raises(UserError, match=said):
        run_study(spec_of(model, tune=tune), tmp_path / "out", until="scores", jobs=1, say=lambda line: None)
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock", "study.json"}
    run_study(
        spec_of(model), tmp_path / "out", until="scores", jobs=1, say=lambda line: None
    )  # corrected, it begins here
    with pytest.raises(UserError, match="begun with another spec"):
        run_study(spec_of(model, tune=tune), tmp_path / "out", until="scores", jobs=1, say=lambda line: None)


def test_a_start_that_looks_at_activations_sees_what_is_tuned_on(model, tmp_path):
    tune = {"adapt": [{"method": "lora", "r": 2, "init": "eva"}], "data": [{"task": "benign", "n": 12}],
            "optim": {"steps": 1, "batch": 2}, "eval": {"fraction": 0.0}}  # fmt: skip
    m, ctx = Materials(spec_of(model, tune=tune)), Context(tmp_path)
    assert not is_adapted(m.loaded(ctx).model)
    tuned = m.adapted(ctx, m.data(ctx, "tune"), seed=3)
    got = {name: p.detach().clone() for name, p in tuned.named_parameters() if p.requires_grad}
    plain, tokenizer = m.base(ctx)
    batches = [collate(m.data(ctx, "tune").items[i : i + 2], tokenizer.pad_token_id) for i in range(0, 12, 2)]
    want = adapt(plain, m.spec.tune.adapt, seed=3, calibration=batches)
    assert got.keys() == {name for name, p in want.named_parameters() if p.requires_grad}
    assert all(torch.equal(got[name], p) for name, p in want.named_parameters() if name in got)


def test_dry_run_says_what_it_takes_and_runs_nothing(model, tmp_path):
    text = run_study(spec_of(model), tmp_path / "out", dry_run=True)
    assert isinstance(text, str)
    assert len(text.splitlines()) >= 12
    rows = {line.split()[0]: line for line in text.splitlines()[1:]}
    assert all("~" in rows[name] for name in ("scores", "tune:free", "evaluate:frozen"))
    assert rows["groups"].count("KiB") == 2
    assert "—" in rows["verdict"]
    assert not (tmp_path / "out").exists()


def test_the_demo_is_the_spec_that_users_copy():
    bundled, copy = ROOT / "src/deltalab/studies/specs/drift-organism.yaml", ROOT / "examples/drift-organism.yaml"
    assert bundled.read_text() == copy.read_text()
    spec = load_spec(DriftStudySpec, bundled)
    assert spec.model == "organism"
    assert [arm.freeze for arm in spec.arms] == ["none", "delta_mask", "delta_mask"]


SPECS = [*sorted((ROOT / "examples").glob("*.yaml")), *sorted((ROOT / "src/deltalab/studies/specs").glob("*.yaml"))]


@pytest.mark.parametrize("path", SPECS, ids=lambda p: f"{p.parent.name}-{p.name}")
@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_examples_and_presets_are_specs(path, quick):
    module = module_of(read_yaml(path)["study"])
    spec = load_spec(module.SPEC, path, module.QUICK if quick else ())
    assert spec.arms[0].freeze == "none"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"arms": [{"name": "frozen", "freeze": "delta_mask"}]}, "the first arm freezes nothing"),
        ({"arms": [{"name": "free"}, {"name": "free", "freeze": "delta_mask"}]}, "two arms have one name"),
        ({"arms": [{"name": "free"}, {"name": "more"}]}, "two arms freeze the same group"),
        ({"seeds": [1, 1]}, "two seeds are the same"),
        ({"groups": {"unit": "head", "nulls": 20}}, "a share of each row has no head"),
        (
            {"arms": [{"name": "free"}, {"name": "x", "freeze": "delta_mask", "lr": 0.1}]},
            "the first arm with lr 0.1 freezes nothing",
        ),
        ({"arms": [{"name": "before"}]}, "no arm may be called 'before'"),
        ({"arms": [{"name": "free"}, {"name": "x", "freeze": "exact"}]}, "freezes 'exact'"),
        ({"evaluate": {"prompts": ["xstest_safe"]}}, "at least one set of harmful prompts"),
        ({"evaluate": {"prompts": ["advbunch"]}}, "no prompt set is called 'advbunch'"),
        ({"groups": {"nulls": 5}}, "groups.nulls"),
    ],
)
def test_faults_of_a_spec(model, changes, fault):
    with pytest.raises(UserError, match=fault):
        spec_of(model, **changes)


def test_a_sweep_multiplies_the_arms(model):
    spec = spec_of(model, sweep={"lr": [1e-3, 1e-2], "n": [4, 12]})
    assert [arm.name for arm in spec.all_arms][:4] == [
        "free-lr0p001-n4",
        "frozen-lr0p001-n4",
        "control-lr0p001-n4",
        "free-lr0p001-n12",
    ]
    assert {arm.cell for arm in spec.all_arms} == {"lr 0.001, n 4", "lr 0.001, n 12", "lr 0.01, n 4", "lr 0.01, n 12"}
    assert len({arm.label for arm in spec.all_arms}) == 12
