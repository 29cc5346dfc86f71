"""What trackers are told: under which names, at which steps, once each; against the curves, by a recording tracker and by each tool's own reader."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker

import deltalab as dl
from deltalab.core.errors import UserError
from deltalab.core.spec import build
from deltalab.train import LoopSpec, TrackSpec, TrainSpec, names, run_spec
from deltalab.train.run import finished
from deltalab.train.spec import ProbeSpec
from deltalab.train.trackers import TOOLS, Trackio
from tests.train.runs import At, adapted, interrupt, run
from tests.train.tracker_readers import READERS

PATH = "model.layers.0.self_attn.q_proj"


class Recorder(GeneralTracker):
    """Keeps what it is told."""

    name, requires_logging_directory = "tensorboard", True
    runs: list["Recorder"] = []
    fails_at: int | None = None
    fails_to_start = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments, self.config, self.logged, self.ended = arguments, {}, [], 0

    def start(self) -> None:
        if self.fails_to_start:
            raise ConnectionError("nobody answers\nat all")
        self.runs.append(self)

    @property
    def tracker(self) -> "Recorder":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = dict(values)

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("the line is dead")
        self.logged.append((step, dict(values)))

    def finish(self) -> None:
        self.ended += 1

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value), as told."""
        return [(step, values[name]) for step, values in self.logged if name in values]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    """In the place of TensorBoard."""
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    monkeypatch.setattr(TOOLS["tensorboard"], "check", lambda tool: None)
    monkeypatch.setattr(Recorder, "runs", [])
    monkeypatch.setattr(Recorder, "fails_at", None)
    monkeypatch.setattr(Recorder, "fails_to_start", False)
    return Recorder


def curves(folder: Path) -> dict[str, list[dict[str, Any]]]:
    files = sorted((folder / "curves").glob("*.jsonl"))
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def plan(**fields: Any) -> TrainSpec:
    return build(TrainSpec, {
        "model": "organism", "adapt": [{"method": "lora", "r": 2}], "optim": {"steps": 4, "batch": 4}, "probe": {"every": 2, "samples": 3},
        "data": [{"task": "rows", "path": "even.jsonl", "test_path": "even.jsonl", "prompt": "{q}", "reply": "{a}", "answers": ["yes", "no"]}],
        **fields,
    })  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data for `plan`."""
    rows = [{"q": f"is {i} even?", "a": ["yes", "no"][i % 2]} for i in range(12)]
    (tmp_path / "even.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rows_by_name() -> None:
    assert names.of_row("train", {"step": 3, "loss": 1.5, "lr": None, "tokens": 7}) == {
        "train/loss": 1.5,
        "train/tokens": 7,
    }
    assert names.of_row("speed", {"step": 3, "seconds": 0.5, "tokens_per_second": 14.0}) == {
        "training_efficiency/step_seconds": 0.5, "training_efficiency/tokens_per_second": 14.0}  # fmt: skip
    assert names.of_row("own", {"step": 1, "a": [1.0, math.nan], "b": {"c": True, "d": "text"}}) == {
        "own/a/0": 1.0,
        "own/b/c": 1,
    }
    weight = {
        "norm": 2.0,
        "relative": 0.5,
        "singular": [3.0, 2.0, 1.0],
        "effective_rank": 2.5,
        "rank": 5,
        "A": {"mean": 7.0},
    }
    other = {"norm": 4.0, "relative": 0.1, "singular": [1.0], "effective_rank": 1.0, "rank": None}
    row = {"step": 1, "methods": {"x.q": "lora", "x.v": "ia3", "x.m": "lora"}, "weights": {"x.q": weight, "x.v": other, "x.m": {**weight, "norm": 6.0}},
           "told": {"x.q": {"gate": 0.25}}}  # fmt: skip
    found = names.of_row("deltas", row)
    assert found["lora_adapters/x.q/norm"] == 2
    assert found["lora_adapters/norm"] == 4
    assert found["lora_adapters/x.q/A/mean"] == 7
    assert found["lora_adapters/x.q/gate"] == 0.25
    assert {k: v for k, v in found.items() if k.startswith("lora_rank/x.q/")} == {
        "lora_rank/x.q/effective": 2.5, "lora_rank/x.q/share": 0.5, "lora_rank/x.q/largest": 3.0, "lora_rank/x.q/mean": 2.0, "lora_rank/x.q/smallest": 1.0}  # fmt: skip
    assert found["ia3_adapters/x.v/norm"] == found["ia3_adapters/norm"] == 4
    assert "ia3_rank/x.v/share" not in found


def test_what_a_run_tells(tmp_path: Path, recorder: type[Recorder]) -> None:
    run(tmp_path / "one", probe=ProbeSpec(every=4, samples=3), track="tensorboard", probes=[])
    (told,), rows = recorder.runs, curves(tmp_path / "one")
    assert told.ended == 1
    assert told.arguments == {"run_name": "tensorboard", "logging_dir": str(tmp_path / "one"), "purge_step": 0}
    assert [step for step, _ in told.logged] == list(range(13))
    for key in ("loss", "lr", "grad_norm"):
        assert told.curve(f"train/{key}") == [(row["step"], row[key]) for row in rows["train"]]
    assert told.curve("eval/loss") == [(row["step"], row["loss"]) for row in rows["eval"]]
    assert told.curve("training_efficiency/step_seconds") == [(row["step"], row["seconds"]) for row in rows["speed"]]
    weights = [(row["step"], row["weights"][PATH]) for row in rows["deltas"]]
    assert [step for step, _ in weights] == [0, 4, 8, 12]
    assert told.curve(f"lora_adapters/{PATH}/B/norm") == [(step, w["B"]["norm"]) for step, w in weights]
    assert told.curve(f"lora_rank/{PATH}/share") == [(step, w["effective_rank"] / 4) for step, w in weights]
    sizes = dl.trainable(adapted())
    assert told.curve("efficiency/trained") == [(0, sizes.count)]
    assert told.curve("efficiency/factor") == [(0, sizes.total / sizes.count)]
    assert (told.config["optim.lr"], told.config["optim.betas"], told.config["run.tokens"]) == (
        0.005,
        "[0.9, 0.999]",
        "null",
    )
    assert not any(key.startswith("track") for key in told.config)


def test_a_run_is_the_same_to_the_bit(tmp_path: Path, recorder: type[Recorder]) -> None:
    run(tmp_path / "plain")
    run(tmp_path / "told", track="tensorboard")
    one, other = curves(tmp_path / "plain"), curves(tmp_path / "told")
    assert {k: v for k, v in one.items() if k != "speed"} == {k: v for k, v in other.items() if k != "speed"}
    files = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("plain", "told")]
    assert files[0] == files[1]


def test_a_whole_run_with_scores_proofs_and_costs(here: Path, recorder: type[Recorder]) -> None:
    record = json.loads(run_spec(plan(track=["tensorboard"]), here / "run", progress=False).read_text())
    (told,) = recorder.runs
    for measure in ("accuracy",):
        before, after = (record["scores"][when]["rows"][measure] for when in ("before", "after"))
        assert told.curve(f"score/rows/{measure}") == [(0, before), (4, after)]
    assert not any(
        name.startswith("score/") and name.endswith(("/n", "/low", "/high")) for _, v in told.logged for name in v
    )
    assert told.curve("verification/base_untouched") == [(4, 1)]
    assert told.curve("verification/merge/relative") == [(4, record["cost"]["merge"]["relative"])]
    assert told.curve("training_efficiency/memory_peak") == [(4, record["cost"]["memory_peak"])]
    assert told.curve("efficiency/adapter_bytes") == [(4, record["sizes"]["adapter_bytes"])]
    prefixes = {name.split("/")[0] for _, values in told.logged for name in values}
    assert prefixes >= {
        "train",
        "eval",
        "lora_adapters",
        "lora_rank",
        "efficiency",
        "verification",
        "training_efficiency",
        "score",
    }
    assert [step for step, _ in told.logged] == [0, 1, 2, 3, 4]


def test_trackers_are_no_part_of_what_a_run_is(here: Path, recorder: type[Recorder]) -> None:
    assert plan(track=["wandb"]).digest() == plan().digest() == plan(track=[{"to": "mlflow", "project": "x"}]).digest()
    assert hash(plan(track=["wandb"])) == hash(plan())
    assert "track" in plan(track=["wandb"]).plain()
    run_spec(plan(costs=False), here / "run", progress=False)
    assert finished(plan(costs=False, track=["wandb"]), here / "run")
    with pytest.raises(UserError, match="another finished run"):
        finished(plan(costs=False, track=["wandb"], seed=1), here / "run")


def test_a_stopped_run_goes_on_without_gaps_or_doubled_steps(tmp_path: Path, recorder: type[Recorder]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", probes=[At(5, interrupt)], track="tensorboard")
    run(tmp_path / "a", probes=[At(0, lambda model: None)], track="tensorboard")
    first, second = recorder.runs
    assert second.arguments["purge_step"] == 5  # readers drop what the first had of it
    steps = [step for step, _ in first.logged if step < 5] + [step for step, _ in second.logged]
    assert steps == list(range(13))
    losses = [row["loss"] for row in curves(tmp_path / "a")["train"]]
    assert [v for s, v in first.curve("train/loss") if s < 5] + [v for _, v in second.curve("train/loss")] == losses
    assert second.config == {}


def test_one_that_is_added_later_gets_all(tmp_path: Path, recorder: type[Recorder]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", probes=[At(5, interrupt)])
    run(tmp_path / "a", probes=[At(0, lambda model: None)], track="tensorboard")
    (told,) = recorder.runs
    assert [step for step, _ in told.logged] == list(range(13))
    assert told.config
    assert told.curve("eval/loss")[0][0] == 0


def test_one_that_fails_is_left_out_and_training_goes_on(
    tmp_path: Path, recorder: type[Recorder], capfd: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Recorder, "fails_at", 4)
    result = run(tmp_path / "a", track="tensorboard")
    assert result.steps == 12
    assert result.losses == run(tmp_path / "b").losses
    err = capfd.readouterr().err
    assert err.count("tensorboard is left out from here: ConnectionError: the line is dead") == 1
    (told,) = recorder.runs
    assert [step for step, _ in told.logged] == [0, 1, 2, 3]
    assert json.loads((tmp_path / "a/trackers.json").read_text()) == {}  # one that goes on begins a new run


def test_one_that_does_not_start_is_an_error(tmp_path: Path, recorder: type[Recorder], monkeypatch: Any) -> None:
    monkeypatch.setattr(Recorder, "fails_to_start", True)
    with pytest.raises(UserError, match="tensorboard does not start.\n  found: ConnectionError: nobody answers\n"):
        run(tmp_path / "a", track="tensorboard")


@pytest.mark.parametrize("name", TOOLS)
def test_one_that_is_not_installed(tmp_path: Path, name: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"not installed.\n  next: pip install 'deltalab\\[{name}\\]'"):
        run(tmp_path / "a", track=name)
    assert not (tmp_path / "a").exists()


def test_offline_means_offline(monkeypatch: Any) -> None:
    assert Trackio(TrackSpec(to="trackio", offline=True), None).remote() is None
    assert Trackio(TrackSpec(to="trackio", options={"space_id": "a/b"}), None).remote() == "option space_id"
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://host")
    assert Trackio(TrackSpec(to="trackio"), None).remote() == "TRACKIO_SERVER_URL"


def test_how_trackers_are_written() -> None:
    one = TrackSpec(to="wandb")
    assert LoopSpec(track="wandb").track == LoopSpec(track=["wandb"]).track == LoopSpec(track={"to": "wandb"}).track == LoopSpec(track=[one]).track == [one]  # fmt: skip
    assert LoopSpec(track=None).track == LoopSpec().track == []


# what each tool has, read by its own reader


@pytest.mark.parametrize("stops", [False, True], ids=["whole", "stopped"])
@pytest.mark.parametrize("name", TOOLS)
def test_what_a_tool_has_is_what_the_curves_have(tmp_path: Path, name: str, stops: bool, monkeypatch: Any) -> None:
    pytest.importorskip(name)
    read = READERS[name](tmp_path, monkeypatch)
    track, probe, folder = {"to": name, "offline": True, "group": "g"}, ProbeSpec(every=4, samples=3), tmp_path / "run"
    if stops:
        with pytest.raises(KeyboardInterrupt):
            run(folder, probes=[At(5, interrupt)], probe=probe, track=track)
    run(folder, probes=[At(0, lambda model: None)], probe=probe, track=track)
    wanted: dict[str, list[tuple[int, float]]] = {}
    for curve, rows in curves(folder).items():
        for row in rows:
            for key, value in names.of_row(curve, row).items():
                wanted.setdefault(key, []).append((row["step"], value))
    found = read(folder)
    sizes = {key: found.pop(key) for key in list(found) if key.startswith("efficiency/")}
    assert sizes["efficiency/trained"] == [(0, dl.trainable(adapted()).count)]
    assert found.keys() == wanted.keys()
    for key, points in wanted.items():
        assert [step for step, _ in found[key]] == [step for step, _ in points], key
        assert [value for _, value in found[key]] == pytest.approx([value for _, value in points], rel=1e-6), key


def test_wandb_without_a_login_never_asks(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(UserError, match="no login here.\n  next: wandb login"):
        run(tmp_path / "a", track="wandb")
    assert not (tmp_path / "a").exists()
