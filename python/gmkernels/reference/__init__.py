"""Every op in plain torch: readable, exact in float64, the oracle of the tests and the fallback."""

from . import diffusion, ema, gmm, gmm_em, gmm_fit, kmeans, likelihood, masked_conv, noising, pixelcnn, random

__all__ = ["diffusion", "ema", "gmm", "gmm_em", "gmm_fit", "kmeans", "likelihood", "masked_conv", "noising", "pixelcnn",
           "random"]
