"""Functions on tensors: differentiable, safe under torch.compile, on CPU and CUDA."""

from .gmm import gmm_log_prob
from .random import philox_normal, philox_uniform

__all__ = ["gmm_log_prob", "philox_normal", "philox_uniform"]
