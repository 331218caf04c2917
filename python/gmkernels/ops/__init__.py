"""Functions on tensors: differentiable, safe under torch.compile, on CPU and CUDA."""

from .diffusion import diffusion_step
from .gmm import gmm_log_prob
from .gmm_inference import gmm_posterior_mean, gmm_sample, gmm_score
from .masked_conv import masked_conv2d
from .random import philox_normal, philox_uniform

__all__ = [
    "diffusion_step",
    "gmm_log_prob",
    "gmm_posterior_mean",
    "gmm_sample",
    "gmm_score",
    "masked_conv2d",
    "philox_normal",
    "philox_uniform",
]
