"""A card for each method: the sections, the fields as the spec has them, snippets that build; and their index."""

import ast
import copy
import re
import unicodedata

import pytest

import deltalab as dl
from deltalab import deltas
from deltalab.cli.methods import row_of
from deltalab.core.spec import build
from deltalab.core.yaml_text import parse
from deltalab.deltas.adapt import is_adapted
from deltalab.train import TrainSpec
from tests.helpers import ROOT, tiny_llama

CARDS = ROOT / "docs" / "methods"
SPECS = deltas.specs()
SECTIONS = ("What trains", "Defaults and why", "Cost", "When to use it", "Paper")
methods = pytest.mark.parametrize("name", SPECS)


def tag(name):
    return SPECS[name].model_fields["method"].default


def card(name):
    return (CARDS / f"{tag(name)}.md").read_text()


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def field_table(text):
    """Field -> default, of the card's table | field | default | meaning |."""
    lines = text[text.index("| field | default | meaning |\n|---|---|---|\n") :].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in lines[: next(i for i, x in enumerate(lines) if not x)]]
    assert all(len(row) >= 3 and all(row) for row in rows), rows
    return {row[0].strip("`"): value_of(row[1]) for row in rows}


def value_of(cell):
    """A default as the card writes it: YAML, in backticks or not, and `none`."""
    text = cell.strip("` ")
    return None if text == "none" else parse(text)


def same(said, default):
    """Equal, and a number where it is a number: 0 is not false. `none` is said of None and of a field's own "none"."""
    if said is None:
        return default in (None, "none")
    return said == default and isinstance(said, bool) == isinstance(default, bool)


def test_every_card_is_a_methods():
    assert {path.name for path in CARDS.glob("*.md")} == {f"{tag(name)}.md" for name in SPECS} | {"README.md"}


@methods
def test_a_card_has_its_sections(name):
    text = card(name)
    title, idea, *_ = text.split("\n\n")
    letters = "".join(c for c in unicodedata.normalize("NFKC", title) if c.isalnum()).lower()
    assert letters.startswith(name.lower()), title
    assert not idea.startswith(("    ", "```")), "the idea comes first, in words"
    assert len(idea.split()) >= 10, idea
    assert re.search(r"^    \S.*=", text, re.M), "no equation"
    found = re.findall(r"^(?:\*\*|## )([^*\n]+?)\.?(?:\*\*|$)", text, re.M)
    assert not set(SECTIONS) - set(found), f"missing: {set(SECTIONS) - set(found)} of {found}"
    papers = row_of(name, SPECS[name]).papers.split(", ")
    assert not [paper for paper in papers if paper not in text]


@methods
def test_a_card_has_the_fields_of_its_spec(name):
    fields = {key: f.get_default(call_default_factory=True) for key, f in SPECS[name].model_fields.items()}
    del fields["method"]
    said = field_table(card(name))
    assert said.keys() == fields.keys()
    assert {key: said[key] for key in fields if not same(said[key], fields[key])} == {}, fields


@methods
def test_a_cards_snippets_build(name, tmp_path, monkeypatch):
    """Python: each statement, one that adapts on a fresh model. YAML: part of a training run's spec."""
    text = card(name)
    monkeypatch.chdir(tmp_path)
    code, specs = blocks(text, "python"), blocks(text, "yaml")
    assert any(f"dl.{name}(" in block for block in code)
    for block in code:
        space, fresh = {"dl": dl, "model": tiny_llama()}, tiny_llama()
        for statement in ast.parse(block).body:
            if "adapt(" in ast.unparse(statement):
                space["model"] = copy.deepcopy(fresh)
            exec(compile(ast.Module([statement], []), f"{name}'s card", "exec"), space)
            if "load(" in ast.unparse(statement) and not is_adapted(space["model"]):
                fresh = copy.deepcopy(space["model"])
    assert specs
    for block in specs:
        spec = build(TrainSpec, {"model": "organism", "data": [{"task": "skills", "n": 4}], **parse(block)})
        assert tag(name) in [entry.method for entry in spec.adapt]


def test_the_index_has_every_method():
    """A row each, with the facts that `deltalab methods` prints."""
    text = (CARDS / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    want = []
    for name, spec in SPECS.items():
        row = row_of(name, spec)
        papers = row.papers.replace("arXiv:", "")
        want.append(
            f"| [{name}]({tag(name)}.md) | {row.summary} | {row.trains} | {row.merges} | {row.goes_on} | {row.file} | {papers} |"
        )
    assert rows == want, "\n".join(["the table should be:", *want])
