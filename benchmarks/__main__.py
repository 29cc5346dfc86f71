"""Runs benchmarks: `python -m benchmarks NAME [--quick] [--threads N] [--out DIR]`, from the project's folder.

python -m benchmarks --list           the benchmarks, a line each
python -m benchmarks step             one, with one thread and then with two, each in a process of its own
python -m benchmarks all              all of them
python -m benchmarks table FOLDER     docs/results/performance.md again, from the results in a folder
python -m benchmarks history          what got worse on this and other machines, by benchmarks/history.jsonl
python -m benchmarks profile step --only 'bf16' --side ours    where the time of one side goes
"""

import argparse
import ast
import importlib
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from benchmarks import environment
from deltalab.core.errors import UserError, nearest

HERE = Path(__file__).parent
BOTH = (1, 2)


def benchmarks() -> dict[str, str]:
    """Name -> the first line of its docstring. A benchmark is a file here that has a function `rows`."""
    found = {}
    for file in sorted(HERE.glob("*.py")):
        tree = ast.parse(file.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "rows" for node in tree.body):
            found[file.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks", formatter_class=argparse.RawDescriptionHelpFormatter,
                                   description=__doc__)  # fmt: skip
    made.add_argument("name", nargs="?", help="a benchmark, or: all, table, history, profile")
    made.add_argument("what", nargs="?", help="the folder of `table`, the benchmark of `profile`")
    made.add_argument("--list", action="store_true", help="name the benchmarks")
    made.add_argument("--quick", action="store_true", help="a few rounds of the smallest case, to see that it runs")
    made.add_argument("--threads", type=int, help="once, with so many; without it once with 1 and once with 2")
    made.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="the results go there as JSON")
    made.add_argument("--only", default="", help="a pattern: of the rows, those whose name and setting match")
    made.add_argument("--rounds", type=int, help="instead of the benchmark's own number")
    made.add_argument("--no-history", action="store_true", help="leave benchmarks/history.jsonl as it is")
    made.add_argument("--side", default="ours", help="for `profile`")
    return made


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 a benchmark failed, 2 a mistake of the user's. A target that was missed is no failure."""
    asked = parser().parse_args(argv)
    try:
        return dispatch(asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def dispatch(asked: argparse.Namespace) -> int:
    known = benchmarks()
    if asked.list or asked.name is None:
        width = max(map(len, known))
        print("\n".join(f"{name:<{width}}  {about}" for name, about in known.items()))
        return 0
    if asked.name in ("table", "history"):
        return after(asked)
    if asked.name == "profile":
        from benchmarks import profile

        print(profile.table(require(asked.what, known), asked.only, asked.side, asked.threads or 1))
        return 0
    names = list(known) if asked.name == "all" else [require(asked.name, known)]
    if asked.threads and len(names) == 1:
        return here(names[0], known[names[0]], asked)
    return max(
        child(name, threads, asked) for name in names for threads in ([asked.threads] if asked.threads else BOTH)
    )


def require(name: str | None, known: dict[str, str]) -> str:
    """The name of a benchmark.

    Raises: UserError with the nearest, if there is none of it.
    """
    if name not in known:
        raise UserError(f"there is no benchmark '{name}'.", found=f"{len(known)} benchmarks: {', '.join(known)}",
                        nearest=nearest(name or "", known), next="python -m benchmarks --list")  # fmt: skip
    return name


def after(asked: argparse.Namespace) -> int:
    """What is made of results: the table, the comparison."""
    from benchmarks import results

    if asked.name == "history":
        print("\n".join(results.latest(results.history())) or "nothing got worse by more than its spread")
        return 0
    from benchmarks import table

    print(f"wrote {table.write(Path(asked.what or asked.out))}")
    return 0


def child(name: str, threads: int, asked: argparse.Namespace) -> int:
    """One benchmark with so many threads, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", name, "--threads", str(threads), "--out", str(asked.out.absolute())]
    command += ["--quick"] * asked.quick + ["--no-history"] * asked.no_history
    command += ["--only", asked.only] if asked.only else []
    command += ["--rounds", str(asked.rounds)] if asked.rounds else []
    ran = subprocess.run(command, cwd=HERE.parent, env=os.environ | environment(threads))
    return min(ran.returncode, 1)


def here(name: str, about: str, asked: argparse.Namespace) -> int:
    """One benchmark in this process; rows are printed as they come, and written together."""
    os.environ |= environment(asked.threads)  # before torch is imported
    import torch

    from benchmarks import harness, results

    torch.set_num_threads(asked.threads)
    warnings.simplefilter("ignore")
    print(
        f"{name}, {asked.threads} thread(s){', quick: these figures mean nothing' if asked.quick else ''}", flush=True
    )
    module: Any = importlib.import_module(f"benchmarks.{name}")
    given = harness.Asked(asked.quick, asked.threads, asked.out, asked.only, asked.rounds)
    found = []
    for row in module.rows(given):
        print(f"  {row}", flush=True)
        found.append(row)
    if not found:
        print("  no row" + (f" matches {asked.only!r}" if asked.only else ""))
        return 0
    options = " --quick" * asked.quick + (f" --only {shlex.quote(asked.only)}" if asked.only else "")
    options += f" --rounds {asked.rounds}" if asked.rounds else ""
    command = f".venv/bin/python -m benchmarks {name} --threads {asked.threads}{options}"
    file = results.write(asked.out, name, about, command, found, asked.quick)
    print(f"  wrote {file}")
    if not asked.quick and not asked.no_history:
        from deltalab.core.files import read_json

        for line in results.remember(read_json(file)):
            print(f"  WORSE: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
