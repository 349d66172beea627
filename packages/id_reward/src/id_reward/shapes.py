"""jaxtyping's annotations of array shapes, for free: importing jaxtyping takes longer than everything else in this package.

Type checkers see jaxtyping. At run time the annotations are jaxtyping's where it has been imported before, as its import hook does that
checks shapes in tests; otherwise they are plain stand-ins that nobody looks at.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

__all__ = ["Bool", "Float", "UInt8"]

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, UInt8
else:

    class _Shaped:
        """``Float[np.ndarray, "r f"]`` is ``np.ndarray``."""

        def __class_getitem__(cls, item: tuple[type, str]) -> type:
            return item[0]

    Bool = Float = UInt8 = _Shaped
