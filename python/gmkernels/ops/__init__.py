"""Functions on tensors: differentiable, safe under torch.compile, on CPU and CUDA."""

from .random import philox_normal, philox_uniform

__all__ = ["philox_normal", "philox_uniform"]
