"""Functions on tensors: differentiable, safe under torch.compile, on CPU and CUDA."""

from .masked_conv import masked_conv2d
from .random import philox_normal, philox_uniform

__all__ = ["masked_conv2d", "philox_normal", "philox_uniform"]
