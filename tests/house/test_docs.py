"""The commands that the documents name exist, with their options; links lead somewhere."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from deltalab.cli import VERBS
from deltalab.core.spec import load_spec
from deltalab.train import TrainSpec
from tests.helpers import ROOT
from tests.house.source import modules

DOCS = [p for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")] if p.is_file()]
ids = [str(p.relative_to(ROOT)) for p in DOCS]


def commands(path: Path) -> list[str]:
    """What a document offers to type: code blocks of a shell, and inline code that begins with a command."""
    text = path.read_text()
    blocks = re.findall(r"^```(?:console|sh|bash)\n(.*?)^```", text, re.M | re.S)
    lines = [line.removeprefix("$ ").split("#")[0].strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = [line.removeprefix(".venv/bin/") for line in lines + inline]
    return [line for line in found if re.match(r"(make|deltalab|python -m (deltalab|benchmarks))\b(?! ?[=(])", line)]


@cache
def options(verb: str) -> str:
    """The help text of a verb."""
    return subprocess.run(
        [sys.executable, "-m", "deltalab", verb, "--help"], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("path", DOCS, ids=ids)
def test_commands_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in commands(path):
        words = line.split()
        if words[0] == "make":
            assert {w for w in words[1:] if "=" not in w and w != "…"} <= targets, line
        elif words[0] == "deltalab" and len(words) > 1:
            if words[1].startswith("--") or not re.fullmatch("[a-z-]+", words[1]):
                continue
            assert words[1] in VERBS, line
            for option in (w.split("=")[0] for w in words[2:] if w.startswith("--")):
                assert option in options(words[1]), f"{line}: no option {option}"
        elif words[:3] == ["python", "-m", "benchmarks"]:
            asked = benchmarks.parser().parse_args([word for word in shlex.split(line)[3:] if word != "…"])
            known = {*benchmarks.benchmarks(), "all", "table", "history", "profile", "NAME", None}
            assert asked.name in known, line
        elif words[:2] == ["python", "-m"]:
            assert words[2] in modules(), line


@pytest.mark.parametrize("path", DOCS, ids=ids)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target


def test_every_verb_has_its_file() -> None:
    assert {f"deltalab.cli.{verb}" for verb in VERBS} <= set(modules())


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks
    ran = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_readmes_spec_is_one(tmp_path: Path) -> None:
    (spec,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (tmp_path / "spec.yaml").write_text(spec)
    read = load_spec(TrainSpec, tmp_path / "spec.yaml", ["optim.steps=200", "adapt.0.r=16"])
    assert (read.optim.steps, read.adapt[0].r) == (200, 16)
