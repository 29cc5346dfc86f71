"""YAML as people write it: `lr: 1e-4` is a number, and a key given twice is a mistake.

PyYAML follows YAML 1.1, where a float needs a dot (so `1e-4` is text) and where the later of two equal keys wins.
"""

import re
from typing import Any

import yaml
from yaml import YAMLError

__all__ = ["YAMLError", "parse"]


def parse(text: str) -> Any:
    """The value that `text` holds.

    Raises: YAMLError if it is no YAML or holds a key twice.
    """
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    problem=f"key '{key.value}' stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
