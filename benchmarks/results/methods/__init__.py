"""The methods that are compared, one family a file.

A new one is a `Method` in a file of its own, entered below.
"""

from . import dense, lora, magnitude, movement, one_shot, pst
from .protocol import Method

METHODS: dict[str, Method] = {
    **dense.METHODS,
    **lora.METHODS,
    **magnitude.METHODS,
    **movement.METHODS,
    **one_shot.METHODS,
    **pst.METHODS,
}

__all__ = ["METHODS", "Method"]
