"""Floor 6: whole studies as stages. `STUDIES` names them; each module has a `<Name>Spec` and `run_study`."""

STUDIES = {"drift": "deltalab.studies.drift"}
