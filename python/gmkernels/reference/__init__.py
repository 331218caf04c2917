"""Every op in plain torch: readable, exact in float64, the oracle of the tests and the fallback."""

from . import random

__all__ = ["random"]
