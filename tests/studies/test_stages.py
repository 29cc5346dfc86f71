"""The stage engine: what is finished stays finished, whatever stopped the process, and nothing stale is mixed in."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltalab.core.errors import UserError
from deltalab.core.files import owned
from deltalab.core.spec import Spec
from deltalab.studies import stages
from deltalab.studies.stages import Estimate, Stage, changes, choose, plan, run


class Sums(Spec):
    """A study that adds."""

    start: int = 1
    steps: list[int] = [2, 3]


def study(spec: Sums, log: list[str], data: str = "d0") -> list[Stage]:
    def adds(name: str, n: int, before: str):
        def work(ctx):
            log.append(name)
            return {"sum": ctx.results[before]["sum"] + n}

        return Stage(
            f"add:{name}",
            work,
            needs=(before,),
            inputs=lambda ctx: {"n": n},
            estimate=Estimate(seconds=7200, memory=2**31),
        )

    def first(ctx):
        log.append("load")
        return {"sum": spec.start}

    out = [Stage("load", first, inputs=lambda ctx: {"data": data})]
    for i, n in enumerate(spec.steps):
        out.append(adds(str(i), n, out[-1].name))
    return out


def test_every_stage_runs_once_and_the_result_is_on_disk(tmp_path):
    log: list[str] = []
    ctx = run(study(Sums(), log), tmp_path / "out", Sums(), say=lambda line: None)
    assert log == ["load", "0", "1"]
    assert ctx.results["add:1"] == {"sum": 6}
    stored = json.loads((tmp_path / "out/add-1/result.json").read_text())
    assert stored["result"] == {"sum": 6}
    assert stored["inputs"]["n"] == 3
    assert set(stored["inputs"]) == {"n", "stage add:0"}


def test_the_same_command_does_only_what_is_missing(tmp_path):
    log: list[str] = []
    run(study(Sums(), log), tmp_path, Sums(), until="add:0", say=lambda line: None)
    assert log == ["load", "0"]
    said: list[str] = []
    ctx = run(study(Sums(), log), tmp_path, Sums(), say=said.append)
    assert log == ["load", "0", "1"]
    assert ctx.results["add:1"] == {"sum": 6}
    assert [line for line in said if "done before" in line] == [
        line for line in said if line.startswith(("[1/3]", "[2/3]"))
    ]


def test_only_one_stage_or_all_of_a_kind(tmp_path):
    log: list[str] = []
    with pytest.raises(UserError, match="stage 'add:0' needs load"):
        run(study(Sums(), log), tmp_path, Sums(), only="add", say=lambda line: None)
    run(study(Sums(), log), tmp_path, Sums(), only="load", say=lambda line: None)
    assert log == ["load"]
    run(study(Sums(), log), tmp_path, Sums(), only="add", say=lambda line: None)
    assert log == ["load", "0", "1"]


def test_choosing_stages():
    three = study(Sums(), [])
    assert [s.name for s in choose(three, None, "add:0")] == ["load", "add:0"]
    assert [s.name for s in choose(three, None, "add")] == ["load", "add:0", "add:1"]
    with pytest.raises(UserError, match="'laod' is no stage") as caught:
        choose(three, "laod", None)
    assert caught.value.nearest == ("load",)
    with pytest.raises(UserError, match="exclude each other"):
        choose(three, "load", "load")


def test_dry_run_runs_nothing_and_says_what_is_done(tmp_path):
    log: list[str] = []
    text = plan(study(Sums(), log), tmp_path / "new", Sums())
    assert log == []
    assert not (tmp_path / "new").exists()
    assert text.count("to do") == 3
    assert "~2.0 h" in text
    assert "2.0 GiB" in text
    run(study(Sums(), log), tmp_path / "new", Sums(), until="load", say=lambda line: None)
    lines = plan(study(Sums(), log), tmp_path / "new", Sums(), until="add:0").splitlines()
    assert ["done" in lines[1], "to do" in lines[2], "left out" in lines[3]] == [True] * 3


def test_a_changed_spec_is_refused_by_name(tmp_path):
    run(study(Sums(), []), tmp_path, Sums(), until="load", say=lambda line: None)
    for attempt in (
        lambda: run(study(Sums(steps=[2, 4]), []), tmp_path, Sums(steps=[2, 4])),
        lambda: plan(study(Sums(), []), tmp_path, Sums(steps=[2, 4])),
    ):
        with pytest.raises(UserError, match="another spec") as caught:
            attempt()
        assert "steps.1: 3 → 4" in caught.value.found


def test_changed_data_is_refused_by_stage_and_by_name(tmp_path):
    run(study(Sums(), []), tmp_path, Sums(), say=lambda line: None)
    with pytest.raises(UserError, match="stage 'load'") as caught:
        run(study(Sums(), [], data="d1"), tmp_path, Sums(), say=lambda line: None)
    assert "data: 'd0' → 'd1'" in caught.value.found


def test_a_stage_done_again_with_another_result_is_noticed_downstream(tmp_path):
    run(study(Sums(), []), tmp_path, Sums(), say=lambda line: None)
    (tmp_path / "load/result.json").unlink()
    changed = study(Sums(start=5), [])
    with pytest.raises(UserError, match="stage 'add:0'") as caught:
        run(changed, tmp_path, Sums(), say=lambda line: None)
    assert "stage load" in caught.value.found


def test_a_folder_in_use_or_with_strangers_is_refused(tmp_path):
    with owned(tmp_path / "used"), pytest.raises(UserError, match="in use"):
        run(study(Sums(), []), tmp_path / "used", Sums())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("…")
    with pytest.raises(UserError, match="holds no study") as caught:
        run(study(Sums(), []), tmp_path / "mine", Sums())
    assert "thesis.tex" in caught.value.found


def test_a_damaged_result_is_named(tmp_path):
    run(study(Sums(), []), tmp_path, Sums(), say=lambda line: None)
    (tmp_path / "load/result.json").write_text('{"resu')
    with pytest.raises(UserError, match="result of stage 'load'.*damaged"):
        run(study(Sums(), []), tmp_path, Sums(), say=lambda line: None)


def test_a_fault_or_ctrl_c_leaves_what_was_finished(tmp_path):
    def stopped(ctx):
        raise KeyboardInterrupt

    broken = [*study(Sums(), [])[:2], Stage("last", stopped, needs=("add:0",))]
    with pytest.raises(KeyboardInterrupt):
        run(broken, tmp_path, Sums(), say=lambda line: None)
    assert (tmp_path / "add-0/result.json").exists()
    assert not (tmp_path / "last/result.json").exists()
    log: list[str] = []
    good = [*study(Sums(), log)[:2], Stage("last", lambda ctx: {"fine": True}, needs=("add:0",))]
    assert run(good, tmp_path, Sums(), say=lambda line: None).results["last"] == {"fine": True}
    assert log == []


def test_changes_names_every_leaf():
    assert changes({"a": {"b": 1, "c": [1, 2]}}, {"a": {"b": 2, "c": [1, 2, 3]}, "d": 0}) == [
        "a.b: 1 → 2",
        "a.c: [1, 2] → [1, 2, 3]",
        "d: None → 0",
    ]
    assert changes({"a": [1]}, {"a": [1]}) == []


@pytest.mark.parametrize(
    "value",
    [(None, "—", "—"), (90.0, "90 s", "90 B"), (300.0, "5 min", "300 B"), (9000.0, "2.5 h", "8.8 KiB")],
    ids=str,
)
def test_times_and_sizes_in_words(value):
    assert (stages._seconds(value[0]), stages._bytes(value[0])) == value[1:]


SLOW = """
import sys, time
from pathlib import Path
from deltalab.core.spec import Spec
from deltalab.studies.stages import Stage, run

class Slow(Spec):
    n: int = 6

def stage(i):
    def work(ctx):
        (ctx.folder / "log").open("a").write(f"{i} ")
        time.sleep(0.15)
        return {"value": i + sum(r["value"] for r in ctx.results.values())}
    return Stage(f"s{i}", work, needs=tuple(f"s{j}" for j in range(i)))

ctx = run([stage(i) for i in range(6)], sys.argv[1], Slow())
print("sum", ctx.results["s5"]["value"])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_killed_at_any_moment_it_continues(tmp_path, how):
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(stages.__file__).parents[2])}
    for wait in (0.05, 0.3):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun = len((out / "log").read_text().split()) if (out / "log").exists() else 0
        deadline = time.time() + 20
        while (
            not ((out / "log").exists() and len((out / "log").read_text().split()) > begun) and time.time() < deadline
        ):
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(how)
        process.wait(20)
    last = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert last.returncode == 0, last.stderr
    assert last.stdout.splitlines()[-1] == "sum 31"  # 0, 1, 3, 7, 15, 31: the value of an undisturbed run
    begun = (out / "log").read_text().split()
    assert [begun.count(str(i)) >= 1 for i in range(6)] == [True] * 6
    assert len(begun) <= 6 + 2  # only the stages that were being done are done again
