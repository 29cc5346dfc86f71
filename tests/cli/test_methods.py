"""`deltalab methods`: the table, read from the methods themselves."""

import io
import re
import sys

import pytest
from rich.console import Console

from deltalab import deltas
from deltalab.cli import methods as verb
from deltalab.deltas.spec import DeltaSpec
from tests.cli.test_verbs import main

SPECS = deltas.specs()


@pytest.fixture(scope="module")
def rows():
    return {name: verb.row_of(name, spec) for name, spec in SPECS.items()}


@pytest.mark.parametrize("name", SPECS)
def test_a_row_says_all_of_its_method(name, rows):
    row, spec = rows[name], SPECS[name]
    assert all(value for key, value in row._asdict().items() if key != "defaults"), row
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}(, arXiv:\d{4}\.\d{4,5})*", row.papers)
    assert "=" in row.equation
    assert "arXiv" not in row.equation
    assert row.summary[0].islower() or row.summary[0].isupper()
    if issubclass(spec, DeltaSpec):
        assert re.search(r"\w+ \(.*(out|in|r|hidden)\b.*\)", row.trains), row.trains
        assert row.file == (spec.peft_type or "own")
        assert set(row.goes_on.split(", ")) == spec.sits_on


def test_rows_against_what_is_known(rows):
    lora, vera = rows["LoRA"], rows["VeRA"]
    assert lora.summary == "a low-rank change of a linear map"
    assert lora.equation == "y = W x + s · B (A x),  s = α / r"
    assert lora.trains == "A (r, in), B (out, r)"
    assert lora.merges == "yes"
    assert lora.papers.startswith("arXiv:2106.09685, arXiv:2312.03732")
    assert lora.defaults.startswith("r 8, alpha 16")
    assert vera.trains == "d (r), b (out)"
    assert vera.file == "VERA"
    assert rows["Train"].file == "own"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("color", [False, True])
def test_the_table_fits_the_terminal(width, color, rows):
    console = Console(width=width, file=io.StringIO(), force_terminal=color, color_system="standard" if color else None)
    verb.show(list(rows.values()), console)
    text = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
    assert max(map(len, text.splitlines())) <= width
    for name, row in rows.items():
        assert re.search(rf"^ ?{name}\b", text, re.M), f"{name} is broken over lines"
        assert row.papers.removeprefix("arXiv:").split(", ")[0] in text
        words = set(re.findall(r"\w{3,}", row.summary))
        assert words <= set(re.findall(r"\w{3,}", text)), f"a word of {name} is broken over lines"


def test_piped_it_is_plain(capsys, rows):
    """One line a method, its cells apart by tabs."""
    code, out, err = main(capsys, "methods")
    assert (code, err) == (0, "")
    table = [line.split("\t") for line in out.splitlines()]
    assert table[0] == ["name", "summary", "equation", "trains", "merges", "goes on", "file", "defaults", "papers"]
    assert table[1:] == [list(row) for row in rows.values()]
    assert not re.search(r"[\x1b│┃━─]", out)


def test_on_a_terminal_it_is_a_table(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, _ = main(capsys, "methods")
    assert "─" in out
    assert "\t" not in out
    assert "deltalab methods NAME" in out


@pytest.mark.parametrize("name", SPECS)
def test_one_method_with_its_fields(capsys, name, rows):
    code, out, _ = main(capsys, "methods", name)
    assert code == 0
    spec, row = SPECS[name], rows[name]
    tag = spec.model_fields["method"].default
    assert main(capsys, "methods", tag)[1] == out
    fields = {line.split()[0] for line in out.split("default:\n")[1].split("\n\n")[0].splitlines()}
    assert fields == spec.model_fields.keys() - {"method"}
    assert all(fact in out for fact in (row.trains, row.papers, row.summary, f"method: {tag}"))
    assert " ".join(spec.__doc__.split())[:40] in " ".join(out.split())


def test_the_fields_of_one(capsys):
    lines = [" ".join(line.split()) for line in main(capsys, "methods", "vera")[1].splitlines()]
    for line in ("r int 256", "d_initial float 0.1", "save_projection bool true", "targets str | list[str] q,v",
                 "layers list[int] | none none", "merges yes", "goes on experts, linear"):  # fmt: skip
        assert line in lines


def test_no_such_method(capsys):
    code, out, err = main(capsys, "methods", "lorra")
    assert (code, out) == (2, "")
    assert err.startswith("error: 'lorra' is no method.")
    assert "nearest: LoRA" in err


def test_a_new_method_is_in_the_table(capsys, monkeypatch):
    monkeypatch.setitem(deltas.METHODS, "VeRA2", deltas.METHODS["VeRA"])
    monkeypatch.setattr(deltas, "methods", lambda: {name: SPECS[name.rstrip("2")] for name in deltas.METHODS})
    out = main(capsys, "methods")[1]
    assert [line.split("\t")[0] for line in out.splitlines()[1:]] == [*deltas.METHODS, "Train"]
