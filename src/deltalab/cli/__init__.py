"""The command line: one file a verb, loaded when it is called.

`VERBS` holds the help lines, so `deltalab --help` imports neither torch nor the verbs. Each `cli/<verb>.py` has one
function `command`, whose signature typer turns into arguments and options, or several as a mapping from sub-verb to
function. A `UserError` prints without a traceback.
"""

import functools
import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from deltalab.core.errors import UserError, nearest

VERBS = {
    "demo": "run the bundled drift study on the bundled model, and show where the report is",
    "study": "run a whole study from a spec: deltalab study drift SPEC",
    "train": "train a delta from a spec, and keep its adapter, curves and record",
    "sweep": "run many trainings side by side from one spec, and make one table: deltalab sweep SPEC",
    "compare": "compare the runs of a sweep, or single ones, with intervals and tests: deltalab compare RUNS --baseline NAME",
    "inspect": "look inside adapters, runs or tuned models: spectra, ranks, new directions, what they share",
    "rerun": "run what a record says once more, and say what came out otherwise: deltalab rerun RECORD",
    "merge": "merge an adapter into its base, and say what that costs: deltalab merge BASE ADAPTER OUT",
    "export": "write an adapter for vLLM or peft, or the model that it merges to: deltalab export BASE ADAPTER OUT",
    "eval": "score a model on tasks of lm-evaluation-harness: deltalab eval MODEL --tasks hellaswag,arc_easy",
    "generate": "reply to prompts, with adapters side by side: deltalab generate MODEL --adapter NAME=FOLDER",
    "chat": "talk to a model, switch adapters by name, compare them side by side: deltalab chat MODEL",
    "preview": "show training samples token by token, with what is learnt from",
    "score": "score every weight of a model on the conversations of tasks, as files",
    "groups": "make groups of weights from scores, combine, compare and describe them",
    "methods": "print the table of methods, or all about one: deltalab methods LoRA",
    "targets": "list the target names of a model, with counts and presets",
    "combine": "make several adapters of one base into one: deltalab combine BASE A B --out FOLDER",
    "report": "build the report of a record or a sweep again: HTML page, text, JSON, figures",
    "clean": "remove what stopped runs left and finished ones need no more; never results",
    "doctor": "show versions, devices, memory and disk, and run a ten-second self-test",
}
_GLOBAL = {"--help": "show this list; after a verb, its arguments", "--version": "show the version",
           "--debug": "show tracebacks of mistakes too (or set DELTALAB_DEBUG=1)"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command line and exit: 0 done, 1 a bug, 2 a mistake of the user's, 130 stopped by Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args or os.environ.get("DELTALAB_DEBUG", "0") not in ("", "0")
    args = [arg for arg in args if arg != "--debug"]
    try:
        sys.exit(_guarded(lambda: _dispatch(args, debug), args, debug))
    except BrokenPipeError:  # the reader of a pipe has gone (`deltalab targets … | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def overview() -> str:
    """The text of `deltalab --help`."""
    from deltalab import __version__

    width = max(map(len, [*VERBS, *_GLOBAL])) + 2
    rows = [f"  {name:<{width}}{text}" for name, text in VERBS.items()]
    options = [f"  {name:<{width}}{text}" for name, text in _GLOBAL.items()]
    return "\n".join([
        f"deltalab {__version__}: fine-tune a language model with a small delta, and measure what it costs and what it moves.",
        "", "usage: deltalab VERB …", "", "verbs:", *rows, "", "options:", *options, "",
        "start with: deltalab demo", "help on one verb: deltalab VERB --help",
    ])  # fmt: skip


def _dispatch(args: list[str], debug: bool) -> int:
    if not args or args[0] in ("--help", "-h", "help"):
        print(overview())
        return 0
    if args[0] == "--version":
        from deltalab import __version__

        print(f"deltalab {__version__}")
        return 0
    verb, *rest = args
    if verb not in VERBS:
        raise UserError(
            f"'{verb}' is no verb of deltalab.",
            nearest=nearest(verb, VERBS),
            next=f"deltalab --help (verbs: {', '.join(VERBS)})",
        )
    import typer

    command = importlib.import_module(f"deltalab.cli.{verb}").command
    several = isinstance(command, Mapping)
    if several and rest and not rest[0].startswith("-") and rest[0] not in command:
        raise UserError(
            f"'{rest[0]}' is nothing that deltalab {verb} does.",
            nearest=nearest(rest[0], command),
            next=f"deltalab {verb} --help ({', '.join(command)})",
        )
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=several)
    for name, function in command.items() if several else [(verb, command)]:
        app.command(name, help=function.__doc__)(_wrapped(function, args, debug))
    app(args=rest, prog_name=f"deltalab {verb}")
    return 0


def _wrapped(command: Callable[..., Any], args: list[str], debug: bool) -> Callable[..., Any]:
    """`command` with our own handling of mistakes and Ctrl-C, before typer's."""

    @functools.wraps(command)
    def run(*a: Any, **k: Any) -> None:
        code = _guarded(lambda: command(*a, **k), args, debug)
        if code:
            sys.exit(code)

    return run


def _guarded(call: Callable[[], Any], args: list[str], debug: bool) -> int:
    """Runs `call`; prints a `UserError` or Ctrl-C in words and returns the exit code."""
    try:
        call()
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print(f"\nstopped. What is finished is kept; to go on: {shlex.join(['deltalab', *args])}", file=sys.stderr)
        return 130
    return 0
