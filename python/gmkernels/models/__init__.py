"""Small complete models. Every one has `fit`, `sample`, `log_prob`, `impute`, `anomaly_score`, `save` and `load`."""

from .pixelcnn import PixelCNN

__all__ = ["PixelCNN"]
