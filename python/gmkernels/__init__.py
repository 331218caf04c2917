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

__all__ = ["__version__", "distributions", "nn", "ops", "reference"]
