"""Every op in plain torch: readable, exact in float64, the oracle of the tests and the fallback."""

from . import masked_conv, random

__all__ = ["masked_conv", "random"]
