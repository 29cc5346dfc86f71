"""What pydantic found wrong with a spec, in the user's words: one line a place, with the nearest key or value.

Pydantic names places by its own route: the tag of a tagged union and the types of a plain one stand in the location
(`adapt.0.lora.rnk`, `targets.list[str]`). The route is followed through the annotations, so that the place shown is
what the user would write (`adapt.0.rnk`) and the keys suggested are those of the model chosen there.
"""

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic

from deltalab.core.errors import nearest


def describe(cls: type[pydantic.BaseModel], error: pydantic.ValidationError) -> list[str]:
    """One line for each faulty place of a spec of type `cls`, in the order found."""
    lines: dict[str, list[str]] = {}
    for fault in error.errors(include_url=False):
        place, models = _follow(cls, fault["loc"])
        said = lines.setdefault(place or cls.__name__, [])
        if (text := _say(fault, models)) not in said:
            said.append(text)
    # of a plain union such as `str | list[str]`, the member that was meant is the one that fails deeper
    shallow = {place for place in lines if any(other.startswith(f"{place}.") for other in lines)}
    return [f"  {place}: {_joined(said)}" for place, said in lines.items() if place not in shallow]


def _joined(said: list[str]) -> str:
    """The members of a plain union each give a fault: 'should be a string, or should be a list (got 3)'."""
    given = [text[text.rindex(" (got ") :] for text in said if text.endswith(")") and " (got " in text]
    if len(said) > 1 and len(given) == len(said) and len(set(given)) == 1:
        return ", or ".join(text.removesuffix(given[0]) for text in said) + given[0]
    return "; ".join(said)


def _say(fault: Any, models: Sequence[type[pydantic.BaseModel]]) -> str:
    """One fault in words. models: those whose keys are allowed where the faulty key stands."""
    kind, context, given = fault["type"], fault.get("ctx", {}), fault.get("input")
    if kind == "extra_forbidden":
        options = sorted({name for model in models for name in model.model_fields})
        return f"unknown key; {_hint(str(fault['loc'][-1]), options, 'known keys')}"
    if kind == "missing":
        return "is needed and not there"
    if kind == "union_tag_not_found":
        tags = [tag for model in models for tag in _tags(model)]
        return f"needs the key {context.get('discriminator', '')}" + (f", one of: {', '.join(tags)}" if tags else "")
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        return f"{context['discriminator']} '{context['tag']}' is unknown; {_hint(str(context['tag']), tags, 'known')}"
    said = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").removeprefix("Input ")
    said = said.replace("a valid array", "a list").replace("an object", "a mapping")  # what JSON calls them
    said = said[:1].lower() + said[1:] + f" (got {_short(given)})"
    if kind == "literal_error" and isinstance(given, str):
        near = nearest(given, context["expected"].replace(" or ", ", ").replace("'", "").split(", "), n=1)
        said += f"; did you mean {near[0]}?" if near else ""
    return said


def _hint(name: str, options: list[str], label: str) -> str:
    near = nearest(name, options)
    return f"did you mean {' or '.join(near)}?" if near else f"{label}: {', '.join(options)}"


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _follow(cls: type[pydantic.BaseModel], loc: Sequence[Any]) -> tuple[str, list[type[pydantic.BaseModel]]]:
    """The place as the user would write it, and the models that stand at it or, for a key they lack, around it."""
    shown: list[str] = []
    here: list[Any] = [cls]
    for part in loc:
        here = [member for annotation in here for member in _members(annotation)]
        models = [a for a in here if _is_model(a)]
        tagged = [m for m in models if part in _tags(m)] if len(models) > 1 else []
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if tagged:
            here = tagged
        elif fields:
            shown.append(str(part))
            here = fields
        elif isinstance(part, int):
            shown.append(str(part))
            here = [arg for a in here if get_origin(a) for arg in get_args(a) if arg is not Ellipsis]
        elif any(get_origin(a) is dict for a in here):
            shown.append(str(part))
            here = [get_args(a)[1] for a in here if get_origin(a) is dict and get_args(a)]
        elif named := [m for m in models if m.__name__ == part]:
            here = named
        elif len(here) > 1 and any(part == _name(a) or "[" in str(part) for a in here):
            continue  # a member of a plain union
        else:
            shown.append(str(part))  # the key that no model knows
    return ".".join(shown), [a for annotation in here for a in _members(annotation) if _is_model(a)]


def _members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without the wrappings of Annotated and Union."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for arg in get_args(annotation) for member in _members(arg)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)


def _name(annotation: Any) -> str:
    """A type as pydantic's locations name it: `str`, `list[str]`."""
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def _tags(model: type[pydantic.BaseModel]) -> list[str]:
    """The values of the fields that tell a model from the others of its union: `method: Literal["lora"] = "lora"`."""
    literals = [f.annotation for f in model.model_fields.values() if get_origin(f.annotation) is Literal]
    return [value for literal in literals if len(get_args(literal)) == 1 for value in get_args(literal)]
