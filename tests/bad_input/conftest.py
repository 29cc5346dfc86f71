"""A small model on disk, once for all tests here."""

from pathlib import Path

import pytest

from tests.bad_input.kit import rows, save_model, write_data, write_spec


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model; read only."""
    return save_model(tmp_path_factory.mktemp("bad_input") / "model")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def spec(here: Path, model: Path) -> Path:
    """A spec that trains in a second."""
    data = write_data(here / "data.jsonl", rows())
    return write_spec(here / "spec.yaml", {
        "model": str(model), "adapt": [{"method": "lora", "r": 2, "targets": "q,v"}], "data": [{"task": "instruct", "path": str(data)}],
        "optim": {"steps": 4, "batch": 4}, "output": "out",
    })  # fmt: skip
