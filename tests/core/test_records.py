"""Records: whole, of one spec, and told apart from what only looks like one."""

import importlib.metadata
import json
import subprocess
from pathlib import Path

import pytest

from deltalab.core import records
from deltalab.core.errors import UserError
from deltalab.core.records import environment, git_revision, read_record, write_record
from deltalab.core.spec import Spec


class Tiny(Spec):
    """A spec."""

    lr: float = 1e-3


def test_a_record_tells_what_was_run_and_with_what(tmp_path: Path) -> None:
    path = write_record(tmp_path / "run", "train", Tiny(lr=0.5), {"losses": [1.0, 0.5]})
    record = read_record(tmp_path / "run")
    assert record == read_record(path)
    assert (record["kind"], record["spec"], record["digest"], record["losses"]) == (
        "train",
        {"lr": 0.5},
        Tiny(lr=0.5).digest(),
        [1.0, 0.5],
    )
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["machine"]["cpus"] >= 1
    assert record["written"].endswith("+00:00")


def test_a_record_is_replaced_by_the_same_spec_only(tmp_path: Path) -> None:
    write_record(tmp_path, "train", Tiny(), {"n": 1})
    write_record(tmp_path, "train", Tiny(), {"n": 2})
    with pytest.raises(UserError, match="already holds the record of another spec"):
        write_record(tmp_path, "train", Tiny(lr=1.0), {"n": 3})
    assert read_record(tmp_path)["n"] == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no record in"),
        ("{", "is damaged"),
        ("[1]", "is no record"),
        ('{"a": 1}', "is no record"),
        ('{"format": 99}', r"up to 1\n  next: update"),
    ],
)
def test_what_is_no_record_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "record.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_record(tmp_path)


def test_records_one_folder_below_are_offered(tmp_path: Path) -> None:
    write_record(tmp_path / "a", "train", Tiny(), {})
    with pytest.raises(UserError, match=f"nearest: {tmp_path / 'a'}"):
        read_record(tmp_path)
    with pytest.raises(UserError, match=r"no record\.json there"):
        read_record(tmp_path / "none")


def test_the_revision_is_of_the_tree_that_tracks_the_file(tmp_path: Path) -> None:
    def git(*args: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *args],
            check=True,
            capture_output=True,
            text=True,
        )
        return run.stdout.strip()

    file = tmp_path / "source.py"
    file.write_text("1")
    assert git_revision(file) is None
    git("init", "-q")
    assert git_revision(file) is None  # lies in a repository that does not know it
    git("add", "source.py")
    git("commit", "-qm", "one")
    assert git_revision(file) == git("rev-parse", "--short=12", "HEAD")
    file.write_text("2")
    assert git_revision(file) == git("rev-parse", "--short=12", "HEAD") + "+"


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def git_is_missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(records, "PACKAGES", ("numpy", "no-such-package"))
    monkeypatch.setattr(records.subprocess, "run", git_is_missing)
    found = environment()
    assert set(found["versions"]) == {"python", "deltalab", "numpy"}
    assert found["git"] is None
    json.dumps(found)
