"""gmkernels: the fast path for generative models in PyTorch."""

import os as _os

import torch as _torch  # noqa: F401  first: its OpenMP runtime must be the one that _C binds to

from . import _C

__version__ = "0.1.0"

if _isa := _os.environ.get("GMKERNELS_ISA"):
    if _isa not in _C.isas():
        raise ImportError(f"GMKERNELS_ISA must be one of {', '.join(_C.isas())} on this machine, got {_isa!r}")
    _C.set_isa(_isa)

from . import distributions, nn, ops, reference  # noqa: E402
from ._packed import keep_packed_weights  # noqa: E402

__all__ = ["GaussianMixture", "__version__", "distributions", "keep_packed_weights", "mixture", "models", "nn", "ops",
           "reference", "schedulers"]


def __getattr__(name):
    """Models and estimators load on first use, and scikit-learn with them; schedulers, and diffusers with them."""
    if name in ("GaussianMixture", "mixture"):
        from importlib import import_module

        mixture = import_module(".mixture", __name__)
        return mixture if name == "mixture" else mixture.GaussianMixture
    if name in ("models", "schedulers"):
        from importlib import import_module

        return import_module("." + name, __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
