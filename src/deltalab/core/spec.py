"""Strict specs: frozen pydantic models, read from YAML with `key=value` overrides, all faults reported at once.

A spec is a value: equal specs have equal hashes, and a record keeps the spec that it came from.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import pydantic
import yaml

from deltalab.core.errors import UserError, nearest


S = TypeVar("S", bound="Spec")


class Spec(pydantic.BaseModel):
    """Base of every spec: immutable, unknown keys refused, `alpha: 16` accepted for floats but `"16"` is not."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True, strict=False)

    def plain(self) -> dict[str, Any]:
        """The spec as JSON types, defaults included."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Twelve hex digits of the SHA-256 of the spec's canonical JSON: equal for equal specs."""
        return digest(self.plain())

    def but(self, **changes: Any) -> Self:
        """A copy with fields replaced, validated again."""
        return build(type(self), {**self.plain(), **changes})


def digest(value: Any) -> str:
    """Twelve hex digits of the SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def build(cls: type[S], values: Any, origin: str = "spec") -> S:
    """`cls(**values)`, with every fault in one `UserError`: where it is, what was given, the nearest key."""
    if not isinstance(values, dict):
        raise UserError(f"{origin} is no mapping of keys to values.", found=type(values).__name__,
                        next=f"start from: {', '.join(cls.model_fields)}")  # fmt: skip
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        faults = [_fault(cls, fault) for fault in error.errors()]
        raise UserError(f"{origin} has {len(faults)} fault{'s' * (len(faults) > 1)}:\n" + "\n".join(faults)) from None


def load_spec(cls: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read `cls` from a YAML file, apply `a.b=value` overrides (values are YAML), and validate."""
    return build(cls, override(read_yaml(path), overrides), str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises: UserError if the file is missing, is no YAML, or holds something else than a mapping.
    """
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        there = sorted(p.name for p in folder.glob("*.y*ml"))
        raise UserError(f"spec file '{path}' does not exist.", found=f"in {folder.resolve()}: {', '.join(there) or 'no YAML file'}",
                        nearest=nearest(path.name, there))  # fmt: skip
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"spec file '{path}' is no valid YAML.", found=" ".join(str(error).split())) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"spec file '{path}' holds no mapping.", found=type(values).__name__)
    return values


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=value` set; the value is read as YAML, so `r=8` is a number."""
    out = json.loads(json.dumps(values, default=str))
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise UserError(f"override '{item}' is no key=value.", next="for example: train.steps=200 adapt.r=8")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"override '{item}': the value is no YAML.", found=" ".join(str(error).split())) from None
        where, *rest = key.split(".")[::-1]
        node = out
        for part in reversed(rest):
            child = node.get(part)
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                raise UserError(f"override '{item}': '{part}' holds {child!r}, which has no key '{where}'.")
            node = child
        node[where] = value
    return out


def _fault(cls: type[pydantic.BaseModel], fault: Any) -> str:
    """One line for one pydantic fault, with a suggestion for an unknown key."""
    where = ".".join(str(part) for part in fault["loc"]) or cls.__name__
    if fault["type"] == "extra_forbidden":
        options = _fields_at(cls, fault["loc"][:-1])
        near = nearest(str(fault["loc"][-1]), options)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(options)}"
        return f"  {where}: unknown key; {hint}"
    given = fault.get("input")
    shown = "" if fault["type"] == "missing" else f" (got {given!r})"
    return f"  {where}: {fault['msg'].lower()}{shown}"


def _fields_at(cls: type[pydantic.BaseModel], loc: Sequence[Any]) -> list[str]:
    """The keys that the model at `loc` knows: follows nested models, lists and unions."""
    models: list[type[pydantic.BaseModel]] = [cls]
    for part in loc:
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if fields:
            models = [m for f in fields for m in _models_in(f)]
        else:  # a list index, or the tag of a discriminated union
            models = [m for m in models if m.__name__ == part or part in (getattr(m, "tag", None),)] or models
    return sorted({name for m in models for name in m.model_fields})


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _models_in(arg)]
