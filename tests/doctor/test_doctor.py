"""`deltalab doctor`: what it tells, and that a fault is found, named and given a next command."""

import importlib.metadata
import json
from typing import Any

import pytest

import deltalab.deltas
import deltalab.deltas.peft_format
from deltalab.cli import doctor, main
from deltalab.core.errors import UserError


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """(exit code, what was printed) of `deltalab doctor ARGS`."""
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *args])
    return int(caught.value.code or 0), capsys.readouterr().out


def by_name(text: str) -> dict[str, Any]:
    """The checks of the JSON output."""
    return {check["name"]: check for check in json.loads(text)["checks"]}


def test_everything_is_looked_at_and_works(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "--json")
    checks = by_name(out)
    assert checks["torch"]["detail"] == importlib.metadata.version("torch")
    assert {"python", "processor", "memory", "disk here", "quant", "import deltalab", "LoRA", "bundled model"} <= set(
        checks
    )
    assert [name for name, check in checks.items() if check["ok"] is False] == []
    assert (code, json.loads(out)["ok"]) == (0, True)
    assert set(deltalab.deltas.METHODS) <= set(checks)


def test_lines_say_what_is_missing_and_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: {"accelerate": None, "optuna": None, "scipy": "1.0"}.get(name, version(name))
    )
    code, out = run(capsys)
    assert code == 1
    assert "  FAIL accelerate " in out
    assert "  accelerate: not installed\n    next: pip install 'accelerate>=" in out
    assert "  scipy: 1.0, needed is >=" in out
    assert "pip install 'deltalab[search]'  (missing: optuna)" in out
    assert "2 of " in out
    assert "self-test" not in out.split("checks fail")[0].splitlines()[-1]


def test_a_method_that_is_broken_is_named_with_the_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise UserError("cannot write.")

    monkeypatch.setattr(deltalab.deltas.peft_format, "save_adapter", broken)
    monkeypatch.setattr(doctor, "start_up", lambda: iter(()))
    code, out = run(capsys)
    assert code == 1
    assert "FAIL LoRA" in out
    assert "after 'logits of the merged and of the adapted model': cannot write." in out


def test_an_inexact_method_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = deltalab.merged

    def off(model: Any) -> Any:
        plain = merged(model)
        plain.lm_head.weight.data *= 1.001
        return plain

    monkeypatch.setattr("deltalab.deltas.merge.merged", off)
    failed = [check for check in doctor.tested() if check.ok is False and check.name in deltalab.deltas.METHODS]
    apart = {"Bottleneck", "ZeroInitPrefix", "LoRAExperts"}  # have nothing to merge
    assert [check.name for check in failed] == [name for name in deltalab.deltas.METHODS if name not in apart]
    assert "logits of the merged and of the adapted model differ by 0.001" in failed[0].detail


def test_without_the_self_test_nothing_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "tested", lambda: pytest.fail("was asked not to"))
    assert "self-test" not in run(capsys, "--no-self-test")[1]


def test_a_package_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", missing)
    checks = {check.name: check for check in doctor.packages()}
    assert (checks["deltalab"].ok, checks["deltalab"].next) == (False, "pip install -e .")
    assert doctor.as_text(list(checks.values())).endswith("    next: pip install -e .")


@pytest.mark.parametrize(("works", "said"), [(True, "works on the processor"), (False, "ONEDNN_MAX_CPU_ISA=AVX512")])
def test_bfloat16_is_tried_and_told(works: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltalab.models.precision.cpu_multiplies_bfloat16", lambda: works)
    (check,) = [check for check in doctor.machine() if check.name == "bfloat16"]
    assert check.ok is None
    assert said in check.detail


def test_little_memory_and_disk_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_memory_limit", lambda: 2**28)
    monkeypatch.setattr(doctor, "free_bytes", lambda _: 2**20)
    checks = {check.name: check for check in doctor.machine()}
    assert checks["memory"].ok is False
    assert checks["memory"].detail.startswith("0.2 GiB free of 0.2")
    assert checks["disk here"].ok is False
