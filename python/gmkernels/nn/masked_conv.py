"""Masked convolutions as modules."""

import math

import torch
from torch import nn

from .. import ops
from .._call import check_int
from ..ops.masked_conv import MAX_TAPS
from ..ops.masked_conv_masks import check_mask, live_taps


class MaskedConv2d(nn.Module):
    r""":func:`gmkernels.ops.masked_conv2d` with its parameters: ``forward(x, cond=None, residual=None)``.

    Weights begin as those of :class:`torch.nn.Conv2d`, uniform in ``+-1 / sqrt(fan_in)``, but fan_in counts live taps
    only, and masked taps are zero (they are never read, and have no gradient).

    Args:
        in_channels, out_channels: as of the output; with a gate the weight has twice as many output channels.
        kernel_size: odd, an int or a pair.
        mask_type, mask_order, data_channels, dilation: as in the op.
        bias: whether there is one.

    >>> layer = MaskedConv2d(3, 16, 7, "A")
    >>> layer(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    gate = None

    def __init__(self, in_channels, out_channels, kernel_size, mask_type="B", *, mask_order="raster", data_channels=1,
                 dilation=1, bias=True, device=None, dtype=None):
        super().__init__()
        self.in_channels = check_int("in_channels", in_channels, 1, 2**31)
        self.out_channels = check_int("out_channels", out_channels, 1, 2**30)
        pair = isinstance(kernel_size, (tuple, list))
        if pair and len(kernel_size) != 2:
            raise ValueError(f"kernel_size must be an int or a pair, got {kernel_size!r}")
        sizes = kernel_size if pair else (kernel_size, kernel_size)
        self.kernel_size = tuple(check_int("kernel_size", k, 1, 2**15) for k in sizes)
        if not all(k % 2 for k in self.kernel_size):
            raise ValueError(f"kernel_size must be odd (an even kernel has no centre), got {self.kernel_size}")
        self.mask_type, self.mask_order, self.data_channels = check_mask(mask_type, mask_order, data_channels)
        self._taps = live_taps(*self.kernel_size, self.mask_type, self.mask_order, self.data_channels)
        if len(self._taps) > MAX_TAPS:
            raise ValueError(f"kernel_size must leave at most {MAX_TAPS} live taps, got {len(self._taps)} of "
                             f"{self.kernel_size}")
        self.dilation = dilation
        rows = self.out_channels * (1 if self.gate is None else 2)
        self.weight = nn.Parameter(torch.empty(rows, self.in_channels, *self.kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        bound = 1 / math.sqrt(max(1, self.in_channels * len(self._taps)))
        self.weight.uniform_(-bound, bound)
        live = torch.zeros(self.kernel_size[0] * self.kernel_size[1], dtype=torch.bool)
        live[self._taps] = True
        self.weight[..., ~live.view(self.kernel_size)] = 0
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    def forward(self, x, cond=None, residual=None):
        return ops.masked_conv2d(x, self.weight, self.bias, self.mask_type, mask_order=self.mask_order,
                                 data_channels=self.data_channels, gate=self.gate, cond=cond, residual=residual,
                                 dilation=self.dilation)

    def extra_repr(self):
        mask = self.mask_type if isinstance(self.mask_type, str) else "boolean mask"
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {mask}, {self.mask_order}"
        text += f", data_channels={self.data_channels}" if self.data_channels > 1 else ""
        text += f", dilation={self.dilation}" if self.dilation != 1 else ""
        text += f", gate={self.gate}" if self.gate else ""
        return text + ("" if self.bias is not None else ", bias=False")


class GatedMaskedConv2d(MaskedConv2d):
    r""":class:`MaskedConv2d` with a gate: ``f(z[:, :out_channels]) sigmoid(z[:, out_channels:]) + residual``.

    Args:
        gate: ``"tanh_sigmoid"`` (f = tanh) or ``"identity_sigmoid"``; the others as there. ``cond`` of ``forward`` has
            ``2 out_channels`` channels.

    >>> layer = GatedMaskedConv2d(16, 16, 3)
    >>> x = torch.randn(2, 16, 8, 8)
    >>> layer(x, cond=torch.randn(2, 32), residual=x).shape
    torch.Size([2, 16, 8, 8])
    """

    def __init__(self, in_channels, out_channels, kernel_size, mask_type="B", *, gate="tanh_sigmoid", **options):
        if gate not in ("tanh_sigmoid", "identity_sigmoid"):
            raise ValueError(f'gate must be "tanh_sigmoid" or "identity_sigmoid", got {gate!r}')
        self.gate = gate
        super().__init__(in_channels, out_channels, kernel_size, mask_type, **options)
