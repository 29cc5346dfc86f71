"""The frame of the command line: fast help, mistakes without traceback, exit codes."""

import importlib.resources
import os
import subprocess
import sys
import time

import pytest

from deltalab import cli
from deltalab.core.errors import UserError


def call(*argv: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deltalab", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(environment or {})},
    )


def main(capsys, *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


def test_help_is_fast_and_imports_no_torch():
    call("--help")
    took = []
    for _ in range(3):
        began = time.perf_counter()
        result = call("--help")
        took.append(time.perf_counter() - began)
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in cli.VERBS)
    assert min(took) <= 0.3, took
    code = "import sys\nfrom deltalab import cli\nprint(cli.overview())\nassert not {'torch', 'transformers', 'typer', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_version(capsys):
    from deltalab import __version__

    assert main(capsys, "--version") == (0, f"deltalab {__version__}\n", "")


def test_an_unknown_verb_names_the_nearest(capsys):
    code, _, err = main(capsys, "sudy")
    assert code == 2
    assert err.startswith("error: 'sudy' is no verb")
    assert "nearest: study" in err
    assert "Traceback" not in err


def test_every_verb_has_a_module_with_a_command():
    for verb in cli.VERBS:
        assert importlib.resources.files("deltalab.cli").joinpath(f"{verb}.py").is_file(), verb


@pytest.fixture
def verb(monkeypatch):
    """A verb whose command is given by the test."""
    import sys
    import types

    def make(command):
        module = types.ModuleType("deltalab.cli.probe")
        module.command = command
        monkeypatch.setitem(sys.modules, "deltalab.cli.probe", module)
        monkeypatch.setitem(cli.VERBS, "probe", "…")

    return make


def test_a_users_mistake_prints_its_four_parts_without_traceback(verb, capsys):
    def command(name: str) -> None:
        """Fails."""
        raise UserError(f"no {name}.", found="two", nearest=["that"], next="do so")

    verb(command)
    assert main(capsys, "probe", "this") == (2, "", "error: no this.\n  found: two\n  nearest: that\n  next: do so\n")
    code, _, err = main(capsys, "--debug", "probe", "this")
    assert code == 2
    assert "Traceback" in err


def test_debug_by_environment(verb, capsys, monkeypatch):
    def command() -> None:
        raise UserError("no.")

    verb(command)
    monkeypatch.setenv("DELTALAB_DEBUG", "1")
    assert "Traceback" in main(capsys, "probe")[2]
    monkeypatch.setenv("DELTALAB_DEBUG", "0")
    assert "Traceback" not in main(capsys, "probe")[2]


def test_ctrl_c_exits_130_and_says_what_to_run_next(verb, capsys):
    def command(path: str) -> None:
        raise KeyboardInterrupt

    verb(command)
    code, _, err = main(capsys, "probe", "my spec.yaml")
    assert code == 130
    assert "to go on: deltalab probe 'my spec.yaml'" in err


def test_a_bug_keeps_its_traceback(verb):
    def command() -> None:
        raise ZeroDivisionError

    verb(command)
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_a_missing_argument_is_a_mistake_too(verb, capsys):
    def command(path: str) -> None:
        """Needs a path."""

    verb(command)
    code, _, err = main(capsys, "probe")
    assert code == 2
    assert "path" in err.lower()


def test_report_of_a_folder_without_record(capsys, tmp_path):
    code, _, err = main(capsys, "report", str(tmp_path))
    assert code == 2
    assert err.startswith(f"error: no record in '{tmp_path}'")
