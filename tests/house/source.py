"""The package's source as the house tests read it: files, trees, imports."""

import ast
from functools import cache
from pathlib import Path

from tests.helpers import ROOT

PACKAGE = ROOT / "src" / "deltalab"
FLOORS = {
    "core": 0,
    "kernels": 1, "quant": 1, "capture": 1,
    "deltas": 2, "data": 2,
    "models": 3,
    "train": 4, "measure": 4,
    "safety": 5, "lab": 5, "report": 5,
    "studies": 6, "organism": 6,
    "cli": 7, "__main__": 7,
}  # fmt: skip

# The organism's generators of questions, requests and prompts are plain Python over lists of words; as data they
# belong to floor 2, and they stand in organism/ because its recipe, card and splits do. Nothing here imports torch.
GENERATORS = {"skills", "requests", "twins", "prompts", "paths"}


@cache
def modules() -> dict[str, Path]:
    """Module name -> file, for every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(), str(path))


def imports(path: Path, package: str) -> list[tuple[int, str]]:
    """(line, module) of everything of deltalab that a file imports, inside functions and by name too.

    package: the package the file lies in, for relative imports.
    """
    known, found = modules(), []
    for node in ast.walk(tree(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            names = [
                v.value for v in ast.walk(node.args[0]) if isinstance(v, ast.Constant) and isinstance(v.value, str)
            ]
        found += [(node.lineno, name) for name in names if name == "deltalab" or name.startswith("deltalab.")]
    return found


def texts() -> list[Path]:
    """The project's own text files: source, tests, docs, settings."""
    kinds = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".jinja", ".html", ".css", ".json", ""}
    skip = {
        ".git",
        ".venv",
        "__pycache__",
        ".mypy_cache",
        ".ruff_cache",
        ".hypothesis",
        "build",
        "dist",
        "runs",
        "htmlcov",
        "deltalab-demo",
    }
    return [
        path for path in sorted(ROOT.rglob("*"))
        if path.suffix in kinds and path.is_file() and not skip & set(path.relative_to(ROOT).parts)
        and "egg-info" not in str(path) and path.stat().st_size < 10**6 and not path.name.startswith(".coverage")
    ]  # fmt: skip
