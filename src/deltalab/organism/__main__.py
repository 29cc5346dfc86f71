"""python -m deltalab.organism: build, check, lists."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def _build(args: argparse.Namespace) -> int:
    from .recipe import build

    for name, folder in build(args.work, args.out, args.only).items():
        print(f"{name}: {folder}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from .check import check

    found, met = check(tuple(args.models), not args.no_tunings)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if met else 1


def _lists(args: argparse.Namespace) -> int:
    from .sources import write_prompts, write_questions

    write_prompts(args.folder)
    write_questions(args.folder)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one verb of the recipe: `build`, `check` or `lists`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deltalab.organism", description="The bundled pair of models.")
    verbs = parser.add_subparsers(required=True)
    build = verbs.add_parser(
        "build", help="train base and chat; takes a stopped run up again (half an hour on 2 cores)"
    )
    build.add_argument("--work", type=Path, default=Path("organism-build"), help="checkpoints and logs")
    build.add_argument("--out", type=Path, default=None, help="where the models go (default: into the package)")
    build.add_argument("--only", choices=("base", "chat"), default=None)
    build.set_defaults(run=_build)
    check = verbs.add_parser("check", help="measure the bundled pair and hold it against the thresholds")
    check.add_argument("--models", nargs="+", default=["base", "chat"], choices=("base", "chat"))
    check.add_argument("--no-tunings", action="store_true", help="leave the short tunings of chat out")
    check.add_argument("--json", type=Path, default=None, help="write every figure here too")
    check.set_defaults(run=_check)
    lists = verbs.add_parser("lists", help="make the bundled prompt lists from the public sets' files")
    lists.add_argument("folder", type=Path)
    lists.set_defaults(run=_lists)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
