"""Every op in plain torch: readable, exact in float64, the oracle of the tests and the fallback."""

from . import gmm, random

__all__ = ["gmm", "random"]
