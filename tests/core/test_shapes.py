"""Shape annotations, with and without jaxtyping."""

import runpy
import sys

import jaxtyping
import pytest
from torch import Tensor

from deltalab.core import shapes


def test_with_jaxtyping_they_are_its_own() -> None:
    assert shapes.Float is jaxtyping.Float


def test_without_it_they_are_the_plain_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jaxtyping", None)
    plain = runpy.run_path(str(shapes.__file__))
    assert plain["Float"][Tensor, "out in"] is plain["Bool"][Tensor, "out in"] is plain["Int"][Tensor, " k"] is Tensor
