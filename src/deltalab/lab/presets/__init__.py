"""Sweeps that come with the package: each a YAML file here, on the bundled model and data until overrides say otherwise."""

from pathlib import Path

HERE = Path(__file__).parent


def names() -> list[str]:
    """The presets there are."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def find(spec: Path) -> Path:
    """The file of a preset by its name; any other path as it is."""
    preset = HERE / f"{spec}.yaml"
    return preset if str(spec) in names() and not spec.exists() else spec
