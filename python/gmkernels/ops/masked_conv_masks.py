"""What a convolution's mask leaves: a list of live taps, and for data channels a mask of the centre tap."""

import functools

import torch

from .. import reference
from .._call import check_int, is_compiling

_ref = reference.masked_conv
_ORDERS = ("raster", "vertical", "horizontal")


def check_mask(mask_type, mask_order, data_channels):
    """The options as they are used: `mask_type` "A", "B" or rows of booleans."""
    if mask_order not in _ORDERS:
        raise ValueError(f'mask_order must be "raster", "vertical" or "horizontal", got {mask_order!r}')
    data_channels = check_int("data_channels", data_channels, 1, 2**31)
    if isinstance(mask_type, str):
        if mask_type not in ("A", "B"):
            raise ValueError(f'mask_type must be "A", "B" or a boolean [kh, kw], got {mask_type!r}')
        return mask_type, mask_order, data_channels
    rows = mask_type.tolist() if hasattr(mask_type, "tolist") else mask_type  # tensors, arrays
    if not isinstance(rows, (list, tuple)) or not all(isinstance(r, (list, tuple)) for r in rows):
        raise TypeError(f'mask_type must be "A", "B" or a boolean [kh, kw], got {_described(mask_type)}')
    if not all(isinstance(used, bool) for row in rows for used in row):
        raise TypeError(f'mask_type must be "A", "B" or a boolean [kh, kw], got {_described(mask_type)}')
    if mask_order != "raster" or data_channels != 1:
        raise ValueError('mask_order and data_channels need mask_type "A" or "B", got a boolean mask')
    return rows, mask_order, data_channels


def _described(mask):
    kind = type(mask).__name__
    return f"{mask.dtype} {tuple(mask.shape)}" if hasattr(mask, "dtype") else kind


def live_taps(kh, kw, mask_type, mask_order, data_channels):
    """Indices ky * kw + kx, ascending in a row. A boolean mask is read on the host.

    Where zeros in the weight of the centre stand for the order of data channels, the centre comes first: kernels add up
    weights of taps that follow each other in a row, and what a zero forbids would come back as rounding.
    """
    if isinstance(mask_type, str):
        taps, centre = _ref.taps(kh, kw, mask_type, mask_order, data_channels), kh * kw // 2
        partial = data_channels > 1 and mask_order != "vertical" and centre in taps
        return [centre, *(t for t in taps if t != centre)] if partial else taps
    sizes = {len(row) for row in mask_type}
    if len(mask_type) != kh or sizes != {kw}:
        raise ValueError(f"mask_type must be [kh, kw] = {(kh, kw)} as weight, got {len(mask_type)} rows of {sizes}")
    return [y * kw + x for y, row in enumerate(mask_type) for x, used in enumerate(row) if used]


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
