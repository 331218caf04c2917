"""`nn.Module` twins of the ops."""

from .mixture import GaussianMixture, MixtureDensity

__all__ = ["GaussianMixture", "MixtureDensity"]
