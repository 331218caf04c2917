"""The rival of models.PixelCNN: the same network in plain torch, each convolution cropped to its live taps by hand."""

import torch
import torch.nn.functional as F


def _cropped(x, weight, bias, mask_type, mask_order):
    """Padding on the sides that are seen only: what one writes to avoid masked taps ("rows above", "left")."""
    kh, kw = weight.shape[2:]
    cy, cx, own = kh // 2, kw // 2, mask_type == "B"
    if mask_order == "vertical":
        x = F.pad(x, (cx, cx, cy, 0)) if own else F.pad(x, (cx, cx, cy, 0))[:, :, :-1]
        return F.conv2d(x, weight[:, :, : cy + own], bias)
    x = F.pad(x, (cx, 0)) if own else F.pad(x, (cx, 0))[..., :-1]
    return F.conv2d(x, weight[..., : cx + own], bias)


def _gate(z):
    a, b = z.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


def network(model, values, memory_format=torch.contiguous_format):
    """`model.network(values)` for grey images without classes, from the first layer on in `memory_format`."""
    v = h = None
    for layer, (vertical, horizontal, link, out) in enumerate(
            zip(model.vertical, model.horizontal, model.link, model.out, strict=True)):
        kind = "B" if layer else "A"
        above = _gate(_cropped(v if layer else values, vertical.weight, vertical.bias, kind, "vertical"))
        v = above + v if layer else above.contiguous(memory_format=memory_format)
        z = _cropped(h if layer else values, horizontal.weight, horizontal.bias, kind, "horizontal")
        added = F.conv2d(_gate(z + F.conv2d(v, link.weight)), out.weight, out.bias)
        h = added + h if layer else added.contiguous(memory_format=memory_format)
    h = F.conv2d(F.relu(h), model.head1.weight, model.head1.bias)
    return F.conv2d(F.relu(h), model.head2.weight, model.head2.bias)
