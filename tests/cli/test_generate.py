"""`deltalab generate`, as a user calls it."""

import io
import json
import sys

import pytest
from rich.console import Console

import deltalab as dl
from deltalab.cli import generate as verb
from deltalab.data.prompts import read_prompts
from deltalab.models.generate import Generation
from tests.cli.test_verbs import main
from tests.deltas.perturb import perturbed
from tests.helpers import byte_tokenizer, model_folder, tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return model_folder(tiny_llama(), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    model = perturbed(dl.adapt(tiny_llama(), dl.LoRA(r=2, targets="all-linear")), 0.3)
    return dl.save_adapter(model, tmp_path_factory.mktemp("adapter") / "fr")


def wanted(prompts, adapter=None, **options):
    model = tiny_llama() if adapter is None else dl.load_adapter(tiny_llama(), adapter)
    return dl.generate(model, byte_tokenizer(), prompts, max_new_tokens=5, **options)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(capsys, base, *args):
    return main(capsys, "generate", str(base), "--max-new-tokens", "5", *map(str, args))


def test_a_single_reply_is_printed_as_it_is(capsys, base):
    code, out, err = run(capsys, base, "-p", "hi")
    assert (code, err) == (0, "")
    assert out == wanted(["hi"])[0].text + "\n"
    assert run(capsys, base, "-p", "hi", "--raw")[1] == wanted(["hi"], template=False)[0].text + "\n"


def test_adapters_by_name_in_a_file(capsys, base, adapter, tmp_path):
    (tmp_path / "ask.txt").write_text("one\n\n  two \n")
    code, out, _ = run(capsys, base, "-p", "zero", "--file", tmp_path / "ask.txt", "--adapter", "base",
                       "--adapter", f"fr={adapter}", "--out", tmp_path / "out.jsonl")  # fmt: skip
    assert code == 0
    assert f"3 prompts, base, fr: {tmp_path / 'out.jsonl'}" in out
    prompts = ["zero", "one", "two"]
    want = {"base": wanted(prompts), "fr": wanted(prompts, adapter)}
    got = rows(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in got] == prompts
    for name, replies in want.items():
        assert [row["replies"][name]["text"] for row in got] == [reply.text for reply in replies]
        assert [row["replies"][name]["tokens"] for row in got] == [reply.tokens for reply in replies]
        assert [row["replies"][name]["finished"] for row in got] == [reply.finished for reply in replies]
    assert [r.text for r in want["base"]] != [r.text for r in want["fr"]]
    _, out, _ = run(capsys, base, "-p", "one", "--adapter", "base", "--adapter", adapter)
    assert out.startswith("> one\n[base] ")
    assert "\n[fr]   " in out


def test_samples_and_a_system_prompt(capsys, base, tmp_path):
    (tmp_path / "ask.jsonl").write_text(
        '{"prompt": "hi"}\n{"instruction": "sum", "input": "1 2"}\n{"messages": [{"role": "user", "content": "ho"}, {"role": "assistant", "content": "x"}]}\n'
    )
    options = {"system": "be brief", "temperature": 0.9, "top_p": 0.8, "seed": 3}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    run(capsys, base, "--file", tmp_path / "ask.jsonl", *flags, "--out", tmp_path / "out.jsonl")
    got = rows(tmp_path / "out.jsonl")
    asked = ["hi", "sum\n\n1 2", [{"role": "user", "content": "ho"}]]
    assert [row.get("prompt") or row["messages"] for row in got] == asked
    assert [row["replies"]["base"]["text"] for row in got] == [reply.text for reply in wanted(asked, **options)]


def test_lines_of_the_standard_input(capsys, base, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nho\n"))
    _, out, _ = run(capsys, base)
    first, second = wanted(["hi", "ho"])
    assert out == f"> hi\n{first.text}\n\n> ho\n{second.text}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    code, _, err = run(capsys, base)
    assert code == 2
    assert "no prompt in the standard input" in err


def test_quantised(capsys, base, tmp_path):
    _, out, _ = run(capsys, base, "-p", "hi", "--quantize", "int8")
    model = dl.load(base, quantize="int8")[0]
    assert out == dl.generate(model, byte_tokenizer(), ["hi"], max_new_tokens=5)[0].text + "\n"


def test_columns_in_a_terminal():
    replies = {name: [Generation("q", f"reply of {name}", 3, True)] for name in ("base", "fr")}
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None, highlight=False)
    verb.show(replies, console)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "> q"
    assert any("reply of base" in line and "reply of fr" in line for line in lines)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-p", "hi", "--max-new-tokens", "-1"], "max_new_tokens=-1"),
        (["-p", "hi", "--temperature", "-0.1"], "temperature=-0.1"),
        (["-p", "hi", "--top-p", "2"], "top_p=2.0"),
        (["-p", "hi", "--batch-size", "0"], "batch_size=0"),
        (["-p", "hi", "-p", " "], "prompt 2 is blank"),
        (["--file", "{here}/nothing.txt"], "nearest: nothing2.txt"),
        (["--file", "{here}/nothing.jsonl"], "does not exist"),
        (["--file", "{here}/empty.jsonl"], "is empty"),
        (["--file", "{here}/odd.jsonl"], "odd.jsonl, line 2: no prompt in it"),
        (["--file", "{here}/cut.jsonl"], "cut.jsonl, line 1: no valid JSON"),
        (["-p", "hi", "--adapter", "{here}/none"], "adapter folder '{here}/none' does not exist"),
        (["-p", "hi", "--adapter", "fr="], "names no adapter"),
        (["-p", "x" * 200], "leave no room"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_mistakes(args, message, capsys, base, tmp_path):
    for name, text in {"nothing2.txt": "x", "empty.jsonl": "", "odd.jsonl": '{"prompt": "a"}\n{"b": "c"}\n', "cut.jsonl": '{"prompt'}.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    code, out, err = main(capsys, "generate", str(base), *(arg.format(here=tmp_path) for arg in args),
                          "--out", str(tmp_path / "out.jsonl"))  # fmt: skip
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message.format(here=tmp_path) in err
    assert not (tmp_path / "out.jsonl").exists()


def test_prompts_that_are_none(tmp_path):
    path = tmp_path / "p.jsonl"
    for row, message in (
        ({"prompt": 3}, "holds no text"),
        ({"prompt": " "}, "is blank"),
        ({"messages": []}, "a list with a message"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no user's message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
        ({"messages": ["hi"]}, "must be an object"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(dl.UserError, match=message):
            read_prompts(path)
    path.write_text(json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}))
    assert read_prompts(path) == [[{"role": "user", "content": "a"}]]
