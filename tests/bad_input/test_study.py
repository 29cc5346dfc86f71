"""`deltalab study drift`: stopped in every stage, given what it cannot use, and out of disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deltalab.core.files import owned
from deltalab.studies import stages
from tests.bad_input.kit import Said, deltalab, interrupted, left_behind, save_model, write_spec
from tests.helpers import small_disk

STAGES = [
    "scores",
    "groups",
    "evaluate:before",
    "tune:free",
    "evaluate:free",
    "tune:frozen",
    "evaluate:frozen",
    "verdict",
    "report",
]
TIMES = {
    "seconds",
    "written",
    "training_seconds",
    "tokens_per_second",
    "memory_before",
    "memory_peak",
    "stages",
    "started",
}


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for the prompts, of which a byte is a token."""
    return save_model(tmp_path_factory.mktemp("study") / "model", context=512)


@pytest.fixture
def study(here: Path, small_model: Path) -> Path:
    """A spec whose study takes seconds."""
    return write_spec(here / "study.yaml", {
        "study": "drift", "model": str(small_model), "score": {"samples": 4}, "groups": {"q": 0.2, "p": 0.1, "nulls": 20},
        "safety": [{"task": "refusals", "limit": 4}], "utility": [{"task": "skills", "n": 4}],
        "tune": {"adapt": [{"method": "lora", "r": 2, "targets": "q,v"}], "data": [{"task": "benign", "n": 12}],
                 "optim": {"steps": 4, "batch": 2, "lr": 1e-2}, "drift_every": 2},
        "arms": [{"name": "free"}, {"name": "frozen", "freeze": "delta_mask"}],
        "evaluate": {"prompts": ["advbench", "xstest_safe"], "limit": 4, "skills": 4, "max_new_tokens": 2}, "output": "out",
    })  # fmt: skip


def run(study: Path, *args: str) -> Said:
    """The study, in this process."""
    return deltalab("study", "drift", study, *args, "--jobs", "1")


def without_times(value: Any) -> Any:
    """A record without what differs between two runs of it."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def whole(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the undisturbed study lies, once it was run."""
    return {"folder": tmp_path_factory.mktemp("whole") / "out"}


def undisturbed(study: Path, whole: dict[str, Path]) -> Path:
    """The folder of the same study, run in one go."""
    if not (whole["folder"] / "record.json").exists():
        said = run(study, "--output", str(whole["folder"]))
        assert said.code == 0, said.err
    return whole["folder"]


def test_stopped_in_every_stage_it_goes_on_to_the_same_record(
    study: Path, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C when a stage has done its work and has not yet kept it; what was finished is not done again."""
    undisturbed(study, whole)
    out, do = study.parent / "out", stages._do
    ran: list[str] = []

    def stopping(ctx: Any, stage: Any, inputs: Any) -> Any:
        if stage.name not in ran:
            ran.append(stage.name)
            stage.run(ctx)
            raise KeyboardInterrupt
        return do(ctx, stage, inputs)

    monkeypatch.setattr(stages, "_do", stopping)
    for number, name in enumerate(STAGES):
        said = run(study)
        said.fails_with("deltalab study drift", "study.yaml", code=130)
        assert ran[-1] == name
        assert sorted(p.parent.name for p in out.glob("*/result.json")) == sorted(
            s.replace(":", "-") for s in STAGES[:number]
        )
        assert left_behind(out) == []
    said = run(study)
    assert said.code == 0, said.err
    got, want = (json.loads((folder / "record.json").read_text()) for folder in (out, undisturbed(study, whole)))
    assert without_times(got) == without_times(want)


@pytest.mark.parametrize("stage", ["tune", "evaluate"])
def test_a_real_ctrl_c(study: Path, stage: str) -> None:
    """In a process of its own, at whatever point of the stage it comes."""
    out = study.parent / "out"
    long = {"tune": ["tune.optim.steps=100000"], "evaluate": ["evaluate.max_new_tokens=300", "evaluate.limit=null"]}[
        stage
    ]
    begun = {
        "tune": lambda: len(list(out.glob("tune-free/run/curves/train.jsonl"))) > 0,
        "evaluate": lambda: (out / "groups" / "result.json").exists(),
    }[stage]
    said = interrupted(["study", "drift", study, *long], begun)
    said.fails_with("deltalab study drift", *long, code=130)
    assert left_behind(out) == []
    assert not (out / "record.json").exists()


def test_all_faults_of_a_spec_are_told_at_once(study: Path) -> None:
    said = run(
        study,
        "gruops=1",
        "groups.q=2",
        "groups.nulls=3",
        "tune.adapt.0.rr=4",
        "tune.optim.lr=fast",
        "arms.1.freeze=exactly",
        "evaluate.prompts=[advbnch]",
        "score.samples=0",
    )
    said.fails_with(
        "has 8 faults", "gruops: unknown key; did you mean groups?", "groups.q: should be less than or equal to 1", "groups.nulls: should be greater than or equal to 20",
        "tune.adapt.0.rr: unknown key; did you mean r?", "tune.optim.lr: should be a valid number", "arms.1.freeze: should be 'none', 'grad_mask', 'exact', 'rewind' or 'delta_mask'",
        "evaluate.prompts: no prompt set is called 'advbnch'", "score.samples: should be greater than 0",
    )  # fmt: skip
    assert not (study.parent / "out").exists()


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["tune.adapt.0.targets=[q_prj]"], ["'q_prj' matches no", "nearest: q_proj"]),
        (["arms.1.freeze=exact"], ["exact", "delta_mask"]),
        (["model=nowhere/at-all"], ["nowhere/at-all"]),
        (["--only", "tunes"], ["'tunes' is no stage", "nearest: tune"]),
        (["--only", "tune", "--until", "verdict"], ["--only and --until exclude each other"]),
        (["--only", "verdict"], ["stage 'verdict' needs", "--until verdict"]),
        (["arms.0.freeze=delta_mask"], ["the first arm freezes nothing"]),
    ],
)
def test_a_study_that_cannot_be(study: Path, args: list[str], parts: list[str]) -> None:
    run(study, *args).fails_with(*parts)
    assert left_behind(study.parent) == []
    assert not (study.parent / "out" / "record.json").exists()


def test_a_kind_of_study_that_is_none(study: Path) -> None:
    deltalab("study", "drfit", study).fails_with("'drfit' is no study", "nearest: drift")


def test_folders_that_are_not_this_studys(study: Path, whole: dict[str, Path]) -> None:
    folder = undisturbed(study, whole)
    run(study, "--output", str(folder), "groups.q=0.3").fails_with(
        "begun with another spec", "groups.q: 0.2 → 0.3", "another folder"
    )
    with owned(folder):
        run(study, "--output", str(folder)).fails_with("is in use", "held by process")
    (study.parent / "mine").mkdir()
    (study.parent / "mine" / "thesis.tex").write_text("…")
    run(study, "--output", "mine").fails_with("not empty", "thesis.tex")
    assert [p.name for p in (study.parent / "mine").iterdir() if not p.name.startswith(".")] == ["thesis.tex"]


def test_damaged_results_are_named(study: Path, whole: dict[str, Path]) -> None:
    out = study.parent / "out"
    shutil.copytree(undisturbed(study, whole), out)
    (out / "groups" / "result.json").write_text('{"stage": ')
    run(study).fails_with("result of stage 'groups'", "is damaged")
    shutil.copytree(undisturbed(study, whole), out, dirs_exist_ok=True)
    weights = out / "tune-free" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-30])
    shutil.rmtree(out / "evaluate-free")
    run(study, "--only", "evaluate:free").fails_with("adapter_model.safetensors")


def test_a_report_of_nothing(here: Path, study: Path, whole: dict[str, Path]) -> None:
    deltalab("report", here).fails_with("no record in", "deltalab study")
    (here / "record.json").write_text("{")
    deltalab("report", here).fails_with("record.json' is damaged")
    whole_record = json.loads((undisturbed(study, whole) / "record.json").read_text())
    (here / "record.json").write_text(json.dumps({**whole_record, "format": 99}))
    deltalab("report", here).fails_with("format 99", "update deltalab")
    (here / "record.json").write_text(json.dumps({key: value for key, value in whole_record.items() if key != "arms"}))
    deltalab("report", here).fails_with("arms")
    assert sorted(p.name for p in here.iterdir() if not p.name.startswith(".")) == ["record.json", "study.yaml"]


@pytest.mark.parametrize(
    ("kib", "said"), [(48, "too little space for the scores"), (160, "the disk is full"), (400, "the disk is full")]
)
def test_a_full_disk(study: Path, kib: int, said: str) -> None:
    """Each size fills in another stage."""
    with small_disk(study.parent / "disk", f"{kib}k") as disk:
        run(study, "--output", str(disk / "out")).fails_with(said, "MiB free")
        assert left_behind(disk) == []
        for result in disk.glob("out/*/result.json"):
            json.loads(result.read_text())
        assert not (disk / "out" / "report.html").exists()
