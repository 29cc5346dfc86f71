"""Tunings side by side, over several seeds: the same numbers as one after the other, whatever stops them."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from deltalab.core.errors import UserError
from deltalab.core.machine import jobs_for
from deltalab.core.spec import build, load_spec
from deltalab.studies import PRESETS, module_of
from deltalab.studies.lanes import Workers
from tests.bad_input.kit import save_model
from tests.helpers import ROOT

TIMES = {"seconds", "written", "stages", "git", "speed"}
SMALL = {
    "score": {"samples": 4},
    "tune": {
        "adapt": [{"method": "lora", "r": 2, "targets": "all-linear", "dropout": 0.1}],
        "data": [{"task": "benign", "n": 12}],
        "optim": {"steps": 6, "batch": 2, "lr": 1e-2},
        "run": {"checkpoint_every": 2},
    },
    "evaluate": {"prompts": ["advbench", "xstest_safe"], "limit": 3, "skills": 3, "max_new_tokens": 2},
    "seeds": [1, 2],
}
CHANGES = {
    "drift": {"groups": {"q": 0.2, "p": 0.1, "per": "row", "nulls": 40}, "safety": [{"task": "refusals", "limit": 4}], "utility": [{"task": "skills", "n": 4}]},
    "score-dynamics": {"group": {"q": 0.2, "nulls": 40}, "data": [{"task": "refusals", "limit": 8}], "score": {"score": "wanda", "samples": 4}},
    "organism": {
        "groups": {"q": 0.2, "p": 0.1, "nulls": 40}, "safety": [{"task": "refusals", "limit": 4}], "utility": [{"task": "skills", "n": 4}], "ablate": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "m", context=512)


def spec_file(folder: Path, preset: str, model: Path, **more) -> Path:
    """The preset, made small."""
    whole = yaml.safe_load((ROOT / "src/deltalab/studies/specs" / PRESETS[preset][1]).read_text())
    tune = {**whole["tune"], **SMALL["tune"], **({"ask_every": 3} if preset == "organism" else {})}
    spec = {**whole, **SMALL, **CHANGES[preset], "tune": tune, "model": str(model), **more}
    path = folder / f"{preset}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def command(preset: str, spec: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "deltalab", "study", preset, str(spec), "--output", str(out), *more]


def ran(preset: str, spec: Path, out: Path, *more: str) -> None:
    done = subprocess.run(command(preset, spec, out, *more), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def plain(value):
    """Without what differs between two runs of one thing."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in TIMES}
    return [plain(item) for item in value] if isinstance(value, list) else value


def found(out: Path) -> tuple[dict, dict[str, bytes]]:
    """The record, and every adapter's bytes."""
    adapters = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("tune-*/adapter/*.safetensors"))}
    return plain(json.loads((out / "record.json").read_text())), adapters


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model):
    """Preset → what an undisturbed run of it found, one tuning after the other."""
    kept = {}

    def get(preset: str):
        if preset not in kept:
            folder = tmp_path_factory.mktemp("whole")
            ran(preset, spec_file(folder, preset, model), folder / "out", "--jobs", "1")
            kept[preset] = found(folder / "out")
        return kept[preset]

    return get


def killed_then_finished(preset: str, model: Path, folder: Path, moments: list[float]) -> Path:
    """The study, killed so many seconds after each start, then run to its end."""
    spec, out = spec_file(folder, preset, model), folder / "out"
    for moment in moments:
        child = subprocess.Popen(
            command(preset, spec, out, "--jobs", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(moment)
        child.send_signal(signal.SIGKILL)
        child.wait()
    ran(preset, spec, out, "--jobs", "2")
    return out


@pytest.mark.slow
def test_side_by_side_finds_what_one_after_the_other_does(tmp_path, model, undisturbed):
    spec = spec_file(tmp_path, "drift", model)
    ran("drift", spec, tmp_path / "out", "--jobs", "2")
    record, adapters = found(tmp_path / "out")
    want, want_adapters = undisturbed("drift")
    assert record == want
    assert adapters == want_adapters
    assert set(adapters) == {
        f"tune-{arm}-{seed}/adapter/adapter_model.safetensors"
        for arm in ("free", "frozen", "control")
        for seed in (1, 2)
    }


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(PRESETS))
def test_killed_at_five_moments_it_ends_the_same(preset, tmp_path, model, undisturbed):
    moments = np.random.default_rng(len(preset)).uniform(4, 16, size=5).tolist()
    record, adapters = found(killed_then_finished(preset, model, tmp_path, moments))
    want, want_adapters = undisturbed(preset)
    assert record == want
    assert adapters == want_adapters


def test_ctrl_c_reaches_every_worker_and_each_keeps_a_checkpoint(tmp_path, model):
    spec, out = spec_file(tmp_path, "drift", model), tmp_path / "out"
    spec.write_text(spec.read_text().replace("steps: 6", "steps: 100000"))
    child = subprocess.Popen(
        command("drift", spec, out, "--jobs", "2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while (
        len(list(out.glob("tune-*/run/curves/train.jsonl"))) < 2 and child.poll() is None and time.monotonic() < until
    ):
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=120)
    assert child.returncode == 130, said
    assert "Traceback" not in said[1]
    assert "to go on" in said[1]
    kept = {checkpoint.parts[-4] for checkpoint in out.glob("tune-*/run/checkpoints/step-*")}
    assert kept == {"tune-free-1", "tune-free-2"}
    assert not (out / "record.json").exists()


def test_a_worker_ends_with_its_parent(tmp_path, model):
    spec, out = spec_file(tmp_path, "drift", model), tmp_path / "out"
    spec.write_text(spec.read_text().replace("steps: 6", "steps: 100000"))
    child = subprocess.Popen(
        command("drift", spec, out, "--jobs", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not list(out.glob("tune-*/run/curves/train.jsonl")) and time.monotonic() < until:
        time.sleep(0.05)
    workers = workers_on(out)
    assert workers
    child.send_signal(signal.SIGKILL)
    child.wait()
    until = time.monotonic() + 10
    while workers_on(out) and time.monotonic() < until:
        time.sleep(0.05)
    assert workers_on(out) == []


def workers_on(out: Path) -> list[int]:
    """Processes that work on a folder's lanes."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().decode().split("\0")
                if "deltalab.studies.lanes" in line and str(out) in line:
                    found.append(int(entry.name))
    return found


def test_a_users_mistake_in_a_worker_is_told_in_words(tmp_path, model):
    module = module_of("drift")
    spec = load_spec(module.SPEC, spec_file(tmp_path, "drift", model))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.json").write_text(json.dumps({"spec": build(module.SPEC, spec.plain()).plain()}))
    with pytest.raises(UserError, match="needs groups, evaluate:before"):
        Workers("drift", tmp_path / "out", 1, 1, say=lambda line: None).run({"free:1": ["tune:free:1"]})


def test_jobs_fit_processors_memory_and_lanes(monkeypatch):
    monkeypatch.setattr("deltalab.core.machine.cores", lambda: 8)
    monkeypatch.setattr("deltalab.core.machine.available_memory", lambda: 20 * 2**30)
    assert jobs_for(1, 2**20, 30) == 8
    assert jobs_for(1, 2**20, 3) == 3
    assert jobs_for(8, 2**20, 3) == 1
    assert jobs_for(1, 7 * 2**30, 8) == 2
    assert jobs_for(1, 90 * 2**30, 8) == 1
