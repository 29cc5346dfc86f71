"""`deltalab chat` with lines piped into it, and in a terminal of the test's own."""

import io
import os
import signal
import sys

import pytest
from rich.console import Console

import deltalab as dl
from deltalab.cli import chat as verb
from deltalab.cli.columns import in_columns, is_wide, plain
from deltalab.models.chat import Session, Settings
from tests.cli.test_verbs import main
from tests.deltas.perturb import perturbed
from tests.helpers import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(context=512).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    model = perturbed(dl.adapt(tiny_llama(context=512), dl.LoRA(r=2, targets="all-linear")), 0.3)
    return dl.save_adapter(model, tmp_path_factory.mktemp("adapter") / "fr")


@pytest.fixture
def piped(monkeypatch, capsys, base, adapter):
    """The transcript of a session with these lines."""

    def run(*lines, args=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        code, out, err = main(capsys, "chat", str(base), "--adapter", str(adapter), "--max-new-tokens", "6", *args)
        assert (code, err) == (0, "")
        return out

    return run


class Screen(io.StringIO):
    """A terminal's output. At the first thing that is written after `armed`, Ctrl-C is pressed."""

    armed = False

    def isatty(self):
        return True

    def write(self, text):
        if self.armed and text.strip():
            self.armed = False
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def terminal(adapter, width=100):
    session = Session(tiny_llama(context=512), byte_tokenizer(), {"fr": adapter}, settings=Settings(max_new_tokens=40))
    console = Console(file=Screen(), width=width, height=30, force_terminal=True, color_system=None, highlight=False)
    return verb.Terminal(session, console)


def test_a_conversation(piped, adapter, tmp_path):
    out = piped("hi", "/adapters", "/use base", "more", "/undo", f"/save {tmp_path}/talk.jsonl", "/quit", "never read")
    assert "fr> hi\n" in out
    assert f"  base  the model without an adapter\n* fr    {adapter}\n" in out
    assert "base> more\n" in out
    assert "forgotten: more" in out
    assert f"written: {tmp_path}/talk.jsonl" in out
    assert "never read" not in out
    reply = out.split("fr> hi\n")[1].split("\nfr was cut")[0]
    model = dl.load_adapter(tiny_llama(context=512), adapter)
    assert reply == dl.generate(model, byte_tokenizer(), ["hi"], max_new_tokens=6)[0].text


def test_the_end_of_the_input_ends_it(piped):
    assert piped("/set").endswith("seed 0\nfr> \n")


def test_two_beside_each_other(piped):
    out = piped("/compare base fr", "hi", "/use fr", "/set max-new-tokens 3", "ho")
    assert "base | fr> hi\n[base]\n" in out
    assert "\n[fr]\n" in out
    assert "fr> ho\n" in out
    assert "fr was cut at 3 tokens" in out


def test_mistakes_never_end_it(piped, adapter, tmp_path):
    lines = {
        "/compar base fr": "nearest: /compare",
        "/use frr": "nearest: fr",
        "/use": "/use takes NAME",
        "/use a b": "/use takes NAME",
        "/compare fr": "next: /compare base fr",
        "/compare fr fr": "named twice",
        "/load x": "/load takes NAME FOLDER",
        f"/load x {tmp_path}/nothing": "does not exist",
        f"/load fr {adapter}": "is taken",
        "/set temprature 1": "nearest: temperature",
        "/set temperature": "/set takes NAME VALUE",
        "/undo": "nothing to undo",
        "/save": "/save needs a file",
        f"/save {tmp_path}": "there already",
        "x" * 600: "leave no room for a reply",
    }
    out = piped(*lines, "/help")
    for line, message in lines.items():
        shown = out.split(f"fr> {line}\n")[1].split("\nfr> ")[0]
        assert shown.startswith("error: "), line
        assert message in shown, line
    assert "/compare A B …" in out


def test_other_commands(piped, adapter):
    out = piped("/system be brief", "/system", "/system -", "/set temperature=0.7", f"/load two {adapter}", "/use two", "/reset",
                "a line \\", "and the next", "//slash", args=("--system", "first"))  # fmt: skip
    assert out.count("system prompt: be brief") == 2
    assert "no system prompt" in out
    assert "temperature 0.7  top-p 1.0" in out
    assert "two> /reset\nthe conversation is empty" in out
    assert "two> a line \\\n... and the next\n" in out
    assert "two> //slash\n" in out
    assert "error" not in out


def test_a_bug_is_told_and_the_conversation_goes_on(piped, monkeypatch):
    def broken(self, name, folder):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(Session, "load", broken)
    out = piped("/load a b", "hi")
    assert "error: ZeroDivisionError: by nothing" in out
    assert "fr> hi\n" in out


def test_ctrl_c_stops_the_reply_and_not_the_program(adapter):
    shown = terminal(adapter)
    shown.console.file.armed = True
    shown.do("hi")
    assert shown.console.file.getvalue().rstrip().endswith("stopped")
    whole = dl.generate(shown.session.model, byte_tokenizer(), ["hi"], max_new_tokens=40)[0].text
    turns = shown.session.messages("fr")
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert 0 < len(turns[1]["content"]) < len(whole)
    assert whole.startswith(turns[1]["content"])
    shown.do("/undo")
    shown.do("hi")
    assert shown.session.messages("fr")[1]["content"] == whole
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_the_prompt(adapter, monkeypatch, capsys):
    lines = iter([KeyboardInterrupt, "/set seed 4", EOFError])

    def read(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", Screen())
    shown = terminal(adapter)
    shown.run("hello")
    text = shown.console.file.getvalue()
    assert text.startswith("hello\n")
    assert "Ctrl-D ends" in text
    assert "seed 4" in text


def test_columns_in_a_wide_terminal_and_one_after_the_other_in_a_narrow_one(adapter):
    wide, narrow = terminal(adapter, 100), terminal(adapter, 50)
    for shown in (wide, narrow):
        shown.do("/compare base fr")
        shown.do("hi")
    heads = [line for line in wide.console.file.getvalue().splitlines() if "base" in line and "fr" in line]
    assert len(heads) > 1

    assert "[base]\n" in narrow.console.file.getvalue()
    assert not is_wide(narrow.console, 2)
    assert is_wide(wide.console, 2)
    shown = Console(file=io.StringIO(), width=90, highlight=False)
    shown.print(in_columns({"base": "left [bold]text[/bold] " * 6, "fr": "right"}))
    text = shown.file.getvalue()
    assert max(map(len, text.splitlines())) <= 90
    assert "[bold]" in text, "what a model writes is no markup"


def test_a_model_cannot_steer_the_terminal():
    assert plain("a\x1b[31mb\x07\tc\nd\x9b1m") == "a[31mb\tc\nd1m"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--max-new-tokens", "0"), "max_new_tokens=0"),
        (("--adapter", "{adapter}"), "two adapters are called 'fr'"),
        (("--adapter", "x={adapter}x"), "does not exist"),
        (("--quantize", "nf5"), "nf5"),
    ],
)
def test_mistakes_at_the_start(args, message, capsys, base, adapter):
    args = [arg.format(adapter=adapter) for arg in args]
    code, out, err = main(capsys, "chat", str(base), "--adapter", str(adapter), *args)
    assert (code, out) == (2, "")
    assert message in err
