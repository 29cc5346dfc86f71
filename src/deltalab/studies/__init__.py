"""Floor 6: whole studies as stages. Each module has a `SPEC`, its `stages` and `run_study`.

`STUDIES`: kind → its module. `PRESETS`: what a user asks for by name → kind, and the spec in `specs/` that is run where
none is given.
"""

import importlib
from types import ModuleType

STUDIES = {"drift": "deltalab.studies.drift", "score-dynamics": "deltalab.studies.score_dynamics"}
PRESETS = {
    "drift": ("drift", "drift.yaml"),
    "score-dynamics": ("score-dynamics", "score-dynamics.yaml"),
    "organism": ("drift", "organism.yaml"),
}


def module_of(kind: str) -> ModuleType:
    """The module of a study, by its name in `STUDIES`."""
    return importlib.import_module(STUDIES[kind])
