"""Functions on tensors: differentiable, safe under torch.compile, on CPU and CUDA."""

from .diffusion import diffusion_step
from .random import philox_normal, philox_uniform

__all__ = ["diffusion_step", "philox_normal", "philox_uniform"]
