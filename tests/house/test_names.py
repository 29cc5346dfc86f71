"""One place names a method; public names resolve; what is public is described."""

import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest

import deltalab
from tests.house.source import PACKAGE, modules, tree

RECIPE = PACKAGE / "organism"
"""How the bundled model was made and is checked: it names the methods that it uses, as a spec does."""

HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "numpy",
    "scipy",
    "sklearn",
    "matplotlib",
    "tokenizers",
    "jinja2",
    "pydantic",
}


def mentions(path: Path, names: set[str]) -> list[str]:
    """`file:line: name` for each use of a name in code: as identifier, attribute, import, or whole string.

    The default of a spec, in a constant `DEFAULT_…`, may name what a user would write there.
    """
    found = []
    defaults = [
        node
        for node in tree(path).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("DEFAULT_")
    ]
    allowed = {id(inner) for node in defaults for inner in ast.walk(node)}
    for node in ast.walk(tree(path)):
        if id(node) in allowed:
            continue
        if isinstance(node, ast.Name):
            used = [node.id]
        elif isinstance(node, ast.Attribute):
            used = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            used = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used = [node.value]
        else:
            continue
        found += [f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}" for name in used if name in names]
    return found


def home(spec: type) -> Path:
    """The file that a method stands in."""
    return Path(sys.modules[spec.__module__].__file__ or "")


def test_only_the_table_and_its_own_file_name_a_method() -> None:
    """Its classes, its module and its tag. Defaults of specs, the recipe of the bundled model and tests may name it."""
    from deltalab.deltas import METHODS, methods

    table, wrong = PACKAGE / "deltas" / "__init__.py", []
    for name, spec in methods().items():
        classes = {node.name for node in tree(home(spec)).body if isinstance(node, ast.ClassDef)}
        names = {name, METHODS[name], *classes, spec.model_fields["method"].default}
        others = [p for p in modules().values() if p not in {home(spec), table} and not p.is_relative_to(RECIPE)]
        wrong += [at for path in others for at in mentions(path, names)]
    assert not wrong, "\n".join(wrong)


def test_only_a_methods_own_file_names_its_type_in_peft() -> None:
    """LORA, which peft has for several of them, may also stand in what these are built on."""
    from deltalab.deltas import methods

    shared, wrong = {PACKAGE / "deltas" / "__init__.py", PACKAGE / "deltas" / "lowrank.py"}, []
    for kind in {spec.peft_type for spec in methods().values()} - {None}:
        homes = shared | {home(spec) for spec in methods().values() if spec.peft_type == kind}
        wrong += [at for path in modules().values() if path not in homes for at in mentions(path, {str(kind)})]
    assert not wrong, "\n".join(wrong)


def test_a_line_in_the_table_makes_a_method_public(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltalab.deltas import METHODS

    module = types.ModuleType("temp_method")
    module.Other = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "temp_method", module)
    monkeypatch.setitem(METHODS, "Other", "temp_method")
    assert deltalab.Other is deltalab.deltas.Other is module.Other


@pytest.mark.parametrize("name", deltalab.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(deltalab, name)
    assert name in dir(deltalab)
    assert name.startswith("__") or (value.__doc__ or "").strip(), f"dl.{name} has no docstring"


def test_a_function_and_a_submodule_may_share_a_name() -> None:
    code = """if 1:
        import deltalab as dl, inspect
        first = dl.train                       # by name, before the submodule was imported
        import deltalab.train
        from deltalab.train import train
        assert callable(first) and callable(dl.train) and callable(deltalab.train.run_spec)
        for function in (first, dl.train):
            try:
                function()
            except TypeError as error:
                print(error)
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("train() missing 3 required positional arguments") == 2


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'lora'"):
        deltalab.lora  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import deltalab",
        "import deltalab.cli; deltalab.cli.main(['--help'])",
        "import deltalab.core.spec, deltalab.core.files",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    """What makes `import deltalab` and `deltalab --help` quick; `deltalab doctor` shows the times."""
    heavy = HEAVY - {"pydantic"} if "core.spec" in code else HEAVY
    report = (
        f"import atexit, sys\natexit.register(lambda: print('imported', *sorted({heavy!r} & set(sys.modules))))\n{code}"
    )
    ran = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "imported"


def test_what_is_public_has_a_docstring() -> None:
    bare = []
    for path in modules().values():
        module = tree(path)
        if not ast.get_docstring(module):
            bare.append(f"{path.relative_to(PACKAGE)}: the file")
        for node in module.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            small = isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno < 6
            if public and not small and not ast.get_docstring(node):
                bare.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.name}")
    assert not bare, "\n".join(bare)
