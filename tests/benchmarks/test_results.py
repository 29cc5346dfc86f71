"""What a run leaves: JSON, history and what got worse, the table; and the command itself."""

import json

import pytest
from benchmarks.harness import Check, Ratio, Row

from benchmarks import __main__ as command
from benchmarks import results, table
from deltalab.core.errors import UserError
from tests.helpers import ROOT

ROWS = [
    Row("a step", "small", "peft / ours", Ratio(1.5, 1.4, 1.6), {"peft": 30.0, "ours": 20.0}, target=1.4,
        checks=[Check("loss", 1e-7, 1e-5)]),
    Row("a step", "small", "ours / limit", Ratio(1.2, 1.1, 1.3), {"ours": 20.0, "limit": 17.0}, target=1.1, direction="at most"),
    Row("saved", "small", "ours / peft", Ratio(0.5, 0.5, 0.5), {"ours": 1.0, "peft": 2.0, "other": 9.0}, "MiB", direction="at most"),
]  # fmt: skip


def line(median, low, high, better="more", **more):
    return {"date": "d", "revision": "r", "machine": "m", "threads": 1, "benchmark": "step", "what": "w", "setting": "s",
            "of": "peft / ours", "better": better, "median": median, "low": low, "high": high} | more  # fmt: skip


@pytest.mark.parametrize(
    ("before", "new", "is_worse"),
    [
        ([line(1.4, 1.35, 1.45)], line(1.35, 1.3, 1.4), False),  # within its spread of .1
        ([line(1.4, 1.35, 1.45)], line(1.29, 1.24, 1.34), True),
        ([line(1.4, 1.39, 1.41)], line(1.3, 1.2, 1.4), False),  # the new one varies more
        ([line(1.4, 1.3, 1.5)], line(1.3, 1.29, 1.31), False),  # the old one did
        ([line(1.4, 1.35, 1.45)], line(1.9, 1.85, 1.95), False),
        ([line(0.3, 0.3, 0.3, "less")], line(0.301, 0.301, 0.301, "less"), False),  # half a percent is none
        ([line(0.3, 0.3, 0.3, "less")], line(0.31, 0.31, 0.31, "less"), True),
        ([line(0.3, 0.3, 0.3, "less")], line(0.2, 0.2, 0.2, "less"), False),
        ([line(2.0, 1.9, 2.1, threads=2)], line(1.4, 1.35, 1.45), False),  # another number of threads
        ([line(2.0, 1.9, 2.1, machine="other")], line(1.4, 1.35, 1.45), False),
        ([line(2.0, 1.99, 2.01)] + 5 * [line(1.4, 1.39, 1.41)], line(1.4, 1.39, 1.41), False),  # long ago
        (4 * [line(1.4, 1.39, 1.41)] + [line(1.2, 1.19, 1.21)], line(1.2, 1.19, 1.21), True),  # one bad run before
        ([], line(1.0, 1.0, 1.0), False),
    ],
)
def test_worse_is_by_more_than_the_spread(before, new, is_worse):
    assert bool(results.worse(before, [new])) == is_worse
    assert bool(results.latest([*before, new])) == is_worse


def test_a_run_is_written_and_remembered(tmp_path):
    file = results.write(tmp_path, "step", "What it measures.", "python -m benchmarks step", ROWS, quick=False)
    found = json.loads(file.read_text())
    assert file.name == f"step-{found['machine']['threads']}t.json"
    assert [row["reached"] for row in found["rows"]] == [True, False, None]
    assert found["machine"]["versions"]["torch"]
    past = tmp_path / "history.jsonl"
    assert results.remember(found, past) == []
    slower = json.loads(json.dumps(found))
    slower["rows"][0]["ratio"] = {"median": 1.2, "low": 1.15, "high": 1.25}
    (said,) = results.remember(slower, past)
    assert said.startswith("step: a step, small")
    assert "1.2, was 1.5" in said
    with past.open("a") as handle:
        handle.write('{"cut off')
    assert len(results.history(past)) == 2 * len(ROWS)
    assert results.latest(results.history(past)) == [said]


def test_the_table_has_every_row_and_keeps_the_words(tmp_path):
    results.write(tmp_path, "step", "What it measures.", ".venv/bin/python -m benchmarks step --threads 1", ROWS, quick=False)  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text(f"# Words\n\n{table.BEGIN}\nold\n{table.END}\n\nMore words.\n")
    table.write(tmp_path, page)
    text = page.read_text()
    assert text.startswith("# Words\n")
    assert text.endswith("\n\nMore words.\n")
    assert "old" not in text
    assert "1 of 2 rows reach theirs." in text
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    threads = rows[1][2]
    assert rows[1] == ["a step", "small", threads, "peft / ours", "1.50 [1.40, 1.60]", "≥ 1.4", "yes", "peft 30, ours 20 ms", "loss 1e-07"]  # fmt: skip
    assert rows[2][5:7] == ["≤ 1.1", "**no**"]
    assert rows[4] == ["saved", "small", threads, "ours / peft", "0.5", "ours 1, peft 2 MiB"]
    assert "$ .venv/bin/python -m benchmarks step --threads 1" in text
    assert "torch" in text.partition("## Measured on")[2]
    table.write(tmp_path, page)
    assert page.read_text() == text


def test_no_table_of_quick_runs_or_without_a_place(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{table.BEGIN}{table.END}")
    results.write(tmp_path, "step", "", "", ROWS, quick=True)
    with pytest.raises(UserError, match="no results"):
        table.write(tmp_path, page)
    results.write(tmp_path, "step", "", "", ROWS, quick=False)
    page.write_text("words")
    with pytest.raises(UserError, match="no place"):
        table.write(tmp_path, page)
    assert page.read_text() == "words"


def test_every_benchmark_says_what_it_measures(capsys):
    assert command.main(["--list"]) == 0
    said = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert {"step", "bank", "nf4"} <= said.keys()
    assert all(about.strip().endswith((".", ":")) for about in said.values()), said


def test_an_unknown_benchmark_is_named_with_the_nearest(capsys):
    assert command.main(["stp"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is no benchmark 'stp'.")
    assert "nearest: step" in said
    assert command.main(["profile", "step", "--side", "our"]) == 2
    assert "nearest: ours" in capsys.readouterr().err


def test_a_quick_run_leaves_a_result_and_no_history(tmp_path, capfd):
    before = results.HISTORY.read_text() if results.HISTORY.exists() else ""
    assert command.main(["dora_norm", "--quick", "--out", str(tmp_path)]) == 0
    found = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert found.keys() == {"dora_norm-1t.json", "dora_norm-2t.json"}
    for threads in (1, 2):
        result = found[f"dora_norm-{threads}t.json"]
        assert result["quick"]
        assert result["machine"]["threads"] == threads
        (row,) = result["rows"]
        assert row["same"]
        assert row["of"] == "unit matrix / algebra"
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    assert (results.HISTORY.read_text() if results.HISTORY.exists() else "") == before
    assert "these figures mean nothing" in capfd.readouterr().out


def test_the_page_has_a_place_for_the_tables():
    text = table.PAGE.read_text()
    assert text.count(table.BEGIN) == text.count(table.END) == 1
    assert table.PAGE == ROOT / "docs" / "results" / "performance.md"
