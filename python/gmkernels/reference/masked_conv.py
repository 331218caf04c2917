"""Convolution over a list of live taps in plain torch: one 1x1 convolution per tap, added up.

z[b, o, p] = bias[o] + sum over live taps t, i of weight[o, i, t] x[b, i, p + offset(t)], with x = 0 outside the image.
A tap is an index ky * kw + kx into the kernel. A tap that is not live is never touched, so NaN there means nothing.
"""

import torch
import torch.nn.functional as F


def raster_taps(kh, kw, mask_type):
    """Taps before the centre in raster order; "B": and the centre."""
    return list(range(kh // 2 * kw + kw // 2 + (mask_type == "B")))


def raster_mask(kh, kw, mask_type, device=None):
    """The same as a boolean [kh, kw]: True where the tap is used."""
    mask = torch.zeros(kh * kw, dtype=torch.bool, device=device)
    mask[raster_taps(kh, kw, mask_type)] = True
    return mask.view(kh, kw)


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


def tanh_sigmoid(z):
    """tanh of the first half of the channels times sigmoid of the second."""
    a, b = z.chunk(2, -3)
    return torch.tanh(a) * torch.sigmoid(b)


def masked_conv2d(x, weight, bias, taps, dilation, gated):
    """[b, c_in, h, w], [c_out, c_in, kh, kw], [c_out] or None -> [b, c_out, h, w]; half the channels with a gate."""
    z = x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:])
    for ky, kx, seen in _shifts(x, *weight.shape[2:], taps, dilation):
        z = z + torch.einsum("oi,bihw->bohw", weight[:, :, ky, kx], seen)
    if bias is not None:
        z = z + bias.view(-1, 1, 1)
    return tanh_sigmoid(z) if gated else z


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


def masked_conv2d_gate_backward(grad, x, weight, bias, taps, dilation):
    """The gradient for the ungated output z from that of tanh(z1) sigmoid(z2)."""
    a, b = masked_conv2d(x, weight, bias, taps, dilation, False).chunk(2, 1)
    t, s = torch.tanh(a), torch.sigmoid(b)
    return torch.cat((grad * s * (1 - t * t), grad * t * s * (1 - s)), 1)
