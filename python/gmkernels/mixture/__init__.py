"""Gaussian mixtures with scikit-learn's API on the fused EM kernels. Loads scikit-learn, so `import gmkernels` does not
load this."""

from ._fit import Progress
from ._gaussian_mixture import GaussianMixture

__all__ = ["GaussianMixture", "Progress"]
