"""The four parts of a message, and the nearest names."""

import pytest

from deltalab.core.errors import UserError, nearest


def test_a_message_shows_the_parts_that_it_has() -> None:
    assert str(UserError("asked.")) == "asked."
    full = UserError("asked.", found="this", nearest=["a", "b"], next="do that")
    assert str(full) == "asked.\n  found: this\n  nearest: a, b\n  next: do that"
    assert (full.asked, full.found, full.nearest, full.next) == ("asked.", "this", ("a", "b"), "do that")


@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("q_prj", ["k_proj", "q_proj", "lm_head"], ["q_proj", "k_proj"]),
        ("attn", ["self_attn.q_proj", "mlp"], ["self_attn.q_proj"]),
        ("zzz", ["a", "b"], []),
        ("", ["a"], []),
        ("a", ["a", "a"], ["a"]),
        ("x1", [f"x{i}" for i in range(9)], ["x1", "x8", "x7"]),
    ],
)
def test_the_nearest_come_first(name: str, options: list[str], want: list[str]) -> None:
    assert nearest(name, options) == want
