"""The faults that `make mutants` injects still fit the source that they change."""

import runpy

import pytest

from tests.helpers import ROOT

MUTANTS = runpy.run_path(str(ROOT / "tools" / "mutants.py"))["MUTANTS"]
NEEDED = {
    "alpha/r",
    "absolute value",
    "positions",
    "mask",
    "labels shifted",
    "weight decay",
    "set difference",
    "unmatched",
    "scale",
    "RNG",
}


@pytest.mark.parametrize("fault", MUTANTS, ids=[fault.name for fault in MUTANTS])
def test_a_fault_changes_what_stands_once(fault: object) -> None:
    for name, old, new in fault.changes:  # type: ignore[attr-defined]
        text = (ROOT / "src" / "deltalab" / name).read_text()
        assert text.count(old) == 1, f"{name}: {old!r}"
        compile(text.replace(old, new), name, "exec")
    for test in (name.partition("::")[0] for name in fault.tests):  # type: ignore[attr-defined]
        assert (ROOT / test).is_file() or list((ROOT / test).rglob("test_*.py")), f"no tests in {test}"


def test_no_fault_is_missing() -> None:
    names = " | ".join(fault.name for fault in MUTANTS)
    assert [part for part in NEEDED if part not in names] == []
    assert len({fault.name for fault in MUTANTS}) == len(MUTANTS)
