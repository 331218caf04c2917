"""Convolution over a list of live taps in plain torch: one 1x1 convolution per tap, added up.

z[b, o, p] = bias[o] + sum over live taps t, i of weight[o, i, t] x[b, i, p + offset(t)], with x = 0 outside the image.
A tap is an index ky * kw + kx into the kernel. A tap that is not live is never touched, so NaN there means nothing.
"""

import torch
import torch.nn.functional as F


def taps(kh, kw, mask_type, mask_order="raster", data_channels=1):
    """Live taps, ascending. "raster": rows above, and left of the centre. "vertical": rows above, with "B" the own row.
    "horizontal": the own row's left. The centre itself with "B"; with "A" where data channels have an order."""
    row, centre = kh // 2 * kw, kh // 2 * kw + kw // 2
    if mask_order == "vertical":
        return list(range(row + kw * (mask_type == "B")))
    last = centre + (mask_type == "B" or data_channels > 1)
    return list(range(row if mask_order == "horizontal" else 0, last))


def mask(kh, kw, mask_type, mask_order="raster", data_channels=1, device=None):
    """The same as a boolean [kh, kw]: True where the tap is used."""
    mask = torch.zeros(kh * kw, dtype=torch.bool, device=device)
    mask[taps(kh, kw, mask_type, mask_order, data_channels)] = True
    return mask.view(kh, kw)


def data_channel(channels, data_channels, halves=1):
    """The data channel that each of `channels` belongs to: c * data_channels // channels, in each half of a gate."""
    half = channels // halves
    return [c % half * data_channels // half for c in range(channels)] if half else []


def centre_mask(c_out, c_in, mask_type, data_channels, gated):
    """[c_out, c_in], True where the centre tap may be used: data channels before the output's, "B": and its own."""
    seen = torch.tensor(data_channel(c_in, data_channels), dtype=torch.int64)
    own = torch.tensor(data_channel(c_out, data_channels, 2 if gated else 1), dtype=torch.int64)[:, None]
    return seen <= own if mask_type == "B" else seen < own


def _shifts(x, kh, kw, taps, dilation, sign=1):
    """(ky, kx, x shifted so that a pixel shows what tap (ky, kx) sees from there) for each live tap."""
    h, w = x.shape[-2:]
    reach_y, reach_x = kh // 2 * dilation[0], kw // 2 * dilation[1]
    padded = F.pad(x, (reach_x, reach_x, reach_y, reach_y))
    for tap in taps:
        ky, kx = tap // kw, tap % kw
        y = reach_y + sign * (ky - kh // 2) * dilation[0]
        x0 = reach_x + sign * (kx - kw // 2) * dilation[1]
        yield ky, kx, padded[..., y : y + h, x0 : x0 + w]


def gated(z, gate):
    """z itself, or of its halves a and b: tanh(a) sigmoid(b), a sigmoid(b)."""
    if gate is None:
        return z
    a, b = z.chunk(2, -3)
    return (torch.tanh(a) if gate == "tanh_sigmoid" else a) * torch.sigmoid(b)


def masked_conv2d(x, weight, bias, cond, residual, taps, dilation, gate):
    """[b, c_in, h, w], [c_out, c_in, kh, kw] -> [b, c_out, h, w]; half the channels with a gate.

    bias [c_out], cond [b, c_out] or [b, c_out, h, w], and residual, of the output's shape, are None or added.
    """
    return masked_conv2d_and_z(x, weight, bias, cond, residual, taps, dilation, gate, True)[0]


def masked_conv2d_and_z(x, weight, bias, cond, residual, taps, dilation, gate, keep):
    """That, and what enters the gate, or where keep is False an empty tensor."""
    z = x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:])
    for ky, kx, seen in _shifts(x, *weight.shape[2:], taps, dilation):
        z = z + torch.einsum("oi,bihw->bohw", weight[:, :, ky, kx], seen)
    if bias is not None:
        z = z + bias.view(-1, 1, 1)
    if cond is not None:
        z = z + (cond if cond.dim() == 4 else cond[..., None, None])
    out = gated(z, gate)
    return out if residual is None else out + residual, z.clone() if keep else x.new_empty((0,))


def masked_conv2d_backward_input(grad, weight, taps, dilation):
    """The gradient for x from that of the ungated output."""
    dx = grad.new_zeros(grad.shape[0], weight.shape[1], *grad.shape[2:])
    for ky, kx, seen in _shifts(grad, *weight.shape[2:], taps, dilation, sign=-1):
        dx = dx + torch.einsum("oi,bohw->bihw", weight[:, :, ky, kx], seen)
    return dx


def masked_conv2d_backward_weight(grad, x, kh, kw, taps, dilation):
    """The gradients for weight (zero for taps that are not live) and bias from that of the ungated output."""
    live = {
        (ky, kx): torch.einsum("bohw,bihw->oi", grad, seen) for ky, kx, seen in _shifts(x, kh, kw, taps, dilation)
    }
    dead = grad.new_zeros(grad.shape[1], x.shape[1])
    rows = [torch.stack([live.get((ky, kx), dead) for kx in range(kw)], -1) for ky in range(kh)]
    return torch.stack(rows, -2), grad.sum((0, 2, 3))


def masked_conv2d_gate_backward(grad, x, weight, bias, cond, taps, dilation, gate):
    """The gradient for the ungated output z from that of f(z1) sigmoid(z2), f being tanh or the identity."""
    return gate_backward(grad, masked_conv2d(x, weight, bias, cond, None, taps, dilation, None), gate)


def gate_backward(grad, z, gate):
    """The gradient for z = (a, b) from that of f(a) sigmoid(b)."""
    a, b = z.chunk(2, -3)
    s = torch.sigmoid(b)
    f, df = (torch.tanh(a), 1 - torch.tanh(a) ** 2) if gate == "tanh_sigmoid" else (a, torch.ones_like(a))
    return torch.cat((grad * s * df, grad * f * s * (1 - s)), -3)
