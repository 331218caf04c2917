"""What a convolution's mask leaves: a list of live taps, and for data channels a mask of the centre tap."""

import functools

import torch

from .. import reference
from .._call import check_int, is_compiling

_ref = reference.masked_conv
_ORDERS = ("raster", "vertical", "horizontal")


def check_mask(mask_type, mask_order, data_channels):
    """The options as they are used: `mask_type` "A", "B" or a boolean tensor."""
    if mask_order not in _ORDERS:
        raise ValueError(f'mask_order must be "raster", "vertical" or "horizontal", got {mask_order!r}')
    data_channels = check_int("data_channels", data_channels, 1, 2**31)
    if isinstance(mask_type, str):
        if mask_type not in ("A", "B"):
            raise ValueError(f'mask_type must be "A", "B" or a boolean [kh, kw], got {mask_type!r}')
        return mask_type, mask_order, data_channels
    try:
        mask_type = torch.as_tensor(mask_type)
    except (TypeError, ValueError, RuntimeError):
        kind = type(mask_type).__name__
        raise TypeError(f'mask_type must be "A", "B" or a boolean [kh, kw], got {kind}') from None
    if mask_type.dtype is not torch.bool:
        raise TypeError(f'mask_type must be "A", "B" or a boolean [kh, kw], got {mask_type.dtype}')
    if mask_order != "raster" or data_channels != 1:
        raise ValueError('mask_order and data_channels need mask_type "A" or "B", got a boolean mask')
    return mask_type, mask_order, data_channels


def live_taps(kh, kw, mask_type, mask_order, data_channels):
    """Indices ky * kw + kx, ascending. A boolean mask is read on the host."""
    if isinstance(mask_type, str):
        return _ref.taps(kh, kw, mask_type, mask_order, data_channels)
    if tuple(mask_type.shape) != (kh, kw):
        raise ValueError(f"mask_type must be [kh, kw] = {(kh, kw)} as weight, got {tuple(mask_type.shape)}")
    return [t for t, used in enumerate(mask_type.flatten().tolist()) if used]


def ordered_weight(weight, mask_type, mask_order, data_channels, gated):
    """`weight`, with zeros in the centre tap where the order of data channels forbids it; differentiable."""
    if data_channels == 1 or mask_order == "vertical":  # the centre of a vertical mask has no data of its own row
        return weight
    allowed = _allowed.__wrapped__ if is_compiling() else _allowed  # dynamo warns of caches
    return torch.where(allowed(*weight.shape, mask_type, data_channels, gated).to(weight.device), weight, 0)


@functools.lru_cache(maxsize=64)
def _allowed(c_out, c_in, kh, kw, mask_type, data_channels, gated):
    allowed = torch.ones(c_out, c_in, kh, kw, dtype=torch.bool)
    allowed[:, :, kh // 2, kw // 2] = _ref.centre_mask(c_out, c_in, mask_type, data_channels, gated)
    return allowed
