"""A file imports only from its own floor or below it."""

import subprocess
import sys

import pytest

from tests.house.source import FLOORS, GENERATORS, imports, modules


def floor(module: str) -> int:
    """The floor of a module, `deltalab.deltas.lora` -> 2."""
    return FLOORS[module.split(".")[1]]


def test_every_folder_has_a_floor() -> None:
    assert {name.split(".")[1] for name in modules() if "." in name} <= set(FLOORS)


def test_imports_go_down() -> None:
    wrong = []
    for module, path in modules().items():
        if module == "deltalab":
            continue  # the lazy table of public names; it imports nothing
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for line, target in imports(path, package):
            if "." not in target:
                continue  # `from deltalab import __version__`
            above = floor(target) > floor(module)
            generator = (
                module.startswith("deltalab.data.tasks")
                and target.removeprefix("deltalab.organism.").split(".")[0] in GENERATORS
            )
            if above and not generator:
                wrong.append(
                    f"{path.name}:{line}: {module} (floor {floor(module)}) imports {target} (floor {floor(target)})"
                )
    assert not wrong, "\n".join(wrong)


def test_measures_know_nothing_of_safety_and_reports_nothing_of_studies() -> None:
    seen = {(module.split(".")[1], target.split(".")[1]) for module, path in modules().items() if "." in module
            for _, target in imports(path, module.rpartition(".")[0]) if "." in target}  # fmt: skip
    assert not seen & {
        ("measure", "safety"),
        ("report", "studies"),
        ("report", "safety"),
        ("lab", "safety"),
        ("lab", "deltas"),
    }


@pytest.mark.parametrize("generator", sorted(GENERATORS))
def test_the_generators_of_the_organism_are_plain_python(generator: str) -> None:
    name = f"deltalab.organism.{generator}"
    if name not in modules():
        pytest.fail(f"{name} is named as an exception of the floors, and is not there")
    code = f"import sys, {name}; sys.exit(', '.join({{'torch', 'transformers', 'numpy'}} & set(sys.modules)) or 0)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
