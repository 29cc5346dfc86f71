"""Strict specs: frozen pydantic models, read from YAML with `key=value` overrides, all faults reported at once.

A spec is a value: equal specs have equal hashes, and a record keeps the spec that it came from.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

import pydantic

from deltalab.core.errors import UserError, nearest
from deltalab.core.faults import describe
from deltalab.core.yaml_text import YAMLError, parse

S = TypeVar("S", bound="Spec")


class Spec(pydantic.BaseModel):
    """Base of every spec: immutable and hashable, unknown keys refused.

    From files and overrides (`build`), types are strict: `alpha: 16` is a float, `alpha: "16"` is a fault.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())
    beside: ClassVar[tuple[str, ...]] = ()
    """Fields that change nothing of what comes out. The digest is without them."""

    def __init__(self, **values: Any) -> None:
        """Raises: UserError with every fault, as `build`."""
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise _faults(type(self), type(self).__name__, error) from None

    # else pydantic would make each part of a spec by this, and its faults would stand alone
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def plain(self) -> dict[str, Any]:
        """The spec as JSON types, defaults included."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Twelve hex digits of the SHA-256 of the spec's canonical JSON without `beside`: equal for equal specs."""
        return digest({key: value for key, value in self.plain().items() if key not in self.beside})

    def told(self) -> dict[str, Any]:
        """What matters of it: without `beside` and what is as it is by default, but with tags. A later version with more fields says the same."""
        return {name: _told_value(getattr(self, name)) for name, field in type(self).model_fields.items() if name not in self.beside
                and (_is_tag(field.annotation) or getattr(self, name) != field.get_default(call_default_factory=True))}  # fmt: skip

    def but(self, **changes: Any) -> Self:
        """A copy with fields replaced, validated again."""
        return build(type(self), {**self.plain(), **changes})

    def __hash__(self) -> int:
        return hash((type(self), self.digest()))  # by value: a field may be a list


def _is_tag(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def _told_value(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.told()
    if isinstance(value, dict):
        return {key: _told_value(one) for key, one in value.items()}
    return [_told_value(one) for one in value] if isinstance(value, (list, tuple)) else value


def digest(value: Any) -> str:
    """Twelve hex digits of the SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def build(cls: type[S], values: Any, origin: str = "spec") -> S:
    """`cls(**values)`, with every fault in one `UserError`: where it is, what was given, the nearest key.

    values: a mapping of JSON types, specs and paths. They pass through JSON, where a list may be a tuple and a string
    a path, and nothing else is converted.
    """
    if not isinstance(values, dict):
        raise UserError(f"{origin} is no mapping of keys to values.", found=type(values).__name__,
                        next=f"start from: {', '.join(cls.model_fields)}")  # fmt: skip
    try:
        return cls.model_validate_json(json.dumps(values, default=_plain), strict=True)
    except pydantic.ValidationError as error:
        raise _faults(cls, origin, error) from None


def _faults(cls: type[pydantic.BaseModel], origin: str, error: pydantic.ValidationError) -> UserError:
    faults = describe(cls, error)
    return UserError(f"{origin} has {len(faults)} fault{'s' * (len(faults) > 1)}:\n" + "\n".join(faults))


def load_spec(cls: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read `cls` from a YAML file, apply `a.b=value` overrides (values are YAML), and validate."""
    return build(cls, override(read_yaml(path), overrides), str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises: UserError if the file is missing, unreadable, no YAML, or holds something else than a mapping.
    """
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        there = sorted(p.name for p in folder.glob("*.y*ml"))
        raise UserError(f"spec file '{path}' {'is a folder' if path.is_dir() else 'does not exist'}.",
                        found=f"in {folder.resolve()}: {', '.join(there) or 'no YAML file'}", nearest=nearest(path.name, there))  # fmt: skip
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise UserError(f"spec file '{path}' is no valid YAML.", found=" ".join(str(error).split())) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"spec file '{path}' cannot be read.", found=str(error)) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"spec file '{path}' holds no mapping of keys to values.", found=type(values).__name__)
    return values


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=value` set; the value is read as YAML, so `r=8` is a number.

    A part of the key may be an index of a list, `adapt.0.r=8`; a list of one needs none, `adapt.r=8`.
    """
    out = copy.deepcopy(values)
    for item in overrides:
        key, sign, text = item.partition("=")
        parts = key.split(".")
        if not sign or not all(parts):
            raise UserError(f"override '{item}' is no key=value.", next="for example: optim.steps=200 adapt.0.r=8")
        try:
            value = parse(text)
        except YAMLError as error:
            raise UserError(f"override '{item}': the value is no YAML.", found=" ".join(str(error).split())) from None
        _set(out, parts, value, item)
    return out


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b` in a spec's values, in place; parts of the key are as in `override`. Raises: UserError where there is no such place."""
    _set(values, key.split("."), value, key)


def _set(node: Any, parts: list[str], value: Any, item: str) -> None:
    """Set `node[parts[0]][parts[1]]… = value`, making the mappings in between that are not there."""
    first, rest = parts[0], parts[1:]
    place: str | int = first
    if isinstance(node, list):
        if first.lstrip("-").isdigit():
            place = int(first)
        elif len(node) == 1:
            return _set(node[0], parts, value, item)
        if not isinstance(place, int) or not -len(node) <= place < len(node):
            raise UserError(f"override '{item}': '{first}' is no index of a list of {len(node)}.",
                            next=f"indices are 0 to {len(node) - 1}" if node else "give the whole list: key=[…]")  # fmt: skip
    elif not isinstance(node, dict):
        raise UserError(f"override '{item}': {node!r} stands there, which has no key '{first}'.")
    if not rest:
        node[place] = value
        return None
    if isinstance(node, dict) and node.get(place) is None:
        node[place] = {}
    return _set(node[place], rest, value, item)


def _plain(value: Any) -> Any:
    """JSON for what may stand in the values of a spec beside JSON types."""
    return value.plain() if isinstance(value, Spec) else str(value)
