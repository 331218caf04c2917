"""`nn.Module` twins of the ops."""

from .masked_conv import GatedMaskedConv2d, MaskedConv2d
from .mixture import GaussianMixture, MixtureDensity

__all__ = ["GatedMaskedConv2d", "GaussianMixture", "MaskedConv2d", "MixtureDensity"]
