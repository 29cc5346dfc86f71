"""Shape annotations, `Float[Tensor, "out in"]`: jaxtyping's where it is installed, plain types elsewhere.

They are documentation at run time; the tests turn on checking for the whole package (tests/conftest.py).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, UInt8
    except ImportError:

        class _Plain:
            def __class_getitem__(cls, item: Any) -> Any:
                return item[0]

        Bool = Float = Int = UInt8 = _Plain

__all__ = ["Bool", "Float", "Int", "UInt8"]
