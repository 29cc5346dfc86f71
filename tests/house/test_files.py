"""Sizes of files and functions, what is shipped, what must not stand in a text."""

import ast
import fnmatch
import re
import tomllib

from tests.helpers import ROOT
from tests.house.source import PACKAGE, modules, texts, tree

LINES, FUNCTION = 350, 80


def test_files_are_short_or_say_why_not() -> None:
    """A longer file has the sentence 'Long because …' in its docstring."""
    paths = [*modules().values(), *(ROOT / "tests").rglob("*.py")]
    long = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in paths}
    said = {str(p.relative_to(ROOT)) for p in paths if "Long because" in (ast.get_docstring(tree(p)) or "")}
    assert {name: n for name, n in long.items() if n > LINES and name not in said} == {}


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines"
        for path in modules().values() for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION
    ]  # fmt: skip
    assert not long, "\n".join(long)


def test_no_text_names_a_machine() -> None:
    places = re.compile(r"(?<![\w.$}~])/(?:work|root|home/\w+|Users/\w+)/")
    wrong = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in texts()
        for match in places.finditer(path.read_text(errors="ignore"))
    ]
    assert not wrong, "\n".join(wrong)


def test_all_data_of_the_package_is_shipped() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["deltalab"]
    patterns = [pattern.replace("**/", "*") for pattern in patterns]
    files = [p.relative_to(PACKAGE) for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    left = [str(p) for p in files if not any(fnmatch.fnmatch(str(p), pattern) for pattern in patterns)]
    assert not left, "no pattern of package-data in pyproject.toml takes: " + ", ".join(left)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        re.split(r"[\[<>=]", entry)[0] for entry in [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    }
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    plain = {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    assert {name for name in wanted if re.sub(r"[-_.]+", "-", name).lower() not in plain} == set()
