"""Every op in plain torch: readable, exact in float64, the oracle of the tests and the fallback."""

from . import diffusion, random

__all__ = ["diffusion", "random"]
