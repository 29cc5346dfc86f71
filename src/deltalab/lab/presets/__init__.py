"""Sweeps that come with the package: each a YAML file here, on the bundled model and data until overrides say otherwise."""

from pathlib import Path

from deltalab.core.errors import UserError, nearest

HERE = Path(__file__).parent


def names() -> list[str]:
    """The presets there are."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def find(spec: Path) -> Path:
    """The file of a preset by its name; any other path as it is. Raises: UserError for a bare name that is neither file nor preset."""
    if spec.exists() or spec.suffix or len(spec.parts) > 1:
        return spec
    if str(spec) not in names():
        raise UserError(
            f"'{spec}' is no file, and no preset.",
            found=f"presets: {', '.join(names())}",
            nearest=nearest(str(spec), names()),
        )
    return HERE / f"{spec}.yaml"
