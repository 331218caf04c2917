"""The network of models.PixelCNN in plain torch, each convolution cropped to its live taps by hand: what rivals run."""

import torch
import torch.nn.functional as F


def gate(z):
    a, b = z.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


def cropped(vertical, horizontal):
    """Of each layer's kernels the rows above and the pixels to the left; behind the first layer also the own ones."""
    return ([w[:, :, : w.shape[2] // 2 + (l > 0)] for l, w in enumerate(vertical)],
            [w[..., : w.shape[3] // 2 + (l > 0)] for l, w in enumerate(horizontal)])


def forward(layers, head, values, memory_format=torch.contiguous_format):
    """`layers`: of each the cropped vertical kernel, its bias, the horizontal one, its bias, link, out and its bias.
    `head`: weight, bias, weight, bias. From the first layer on in `memory_format`."""
    v = h = None
    for l, (vertical, bias_v, horizontal, bias_h, link, out, bias) in enumerate(layers):
        side = vertical.shape[3] // 2  # padded on the sides that are seen only: what one writes to avoid masked taps
        if l == 0:
            above = F.pad(values, (side, side, side, 0))[:, :, :-1]
            left = F.pad(values, (side, 0))[..., :-1]
        else:
            above, left = F.pad(v, (side, side, side, 0)), F.pad(h, (side, 0))
        z = gate(F.conv2d(above, vertical, bias_v))
        v = z + v if l else z.contiguous(memory_format=memory_format)
        z = F.conv2d(gate(F.conv2d(left, horizontal, bias_h) + F.conv2d(v, link)), out, bias)
        h = z + h if l else z.contiguous(memory_format=memory_format)
    return F.conv2d(F.relu(F.conv2d(F.relu(h), *head[:2])), *head[2:])


def network(model, values, memory_format=torch.contiguous_format):
    """`model.network(values)` for grey images without classes."""
    stacks = model.vertical, model.horizontal, model.link, model.out
    kernels = cropped(*([m.weight for m in stack] for stack in stacks[:2]))
    layers = [(vertical, v.bias, horizontal, h.bias, link.weight, out.weight, out.bias)
              for vertical, horizontal, v, h, link, out in zip(*kernels, *stacks, strict=True)]
    head = model.head1.weight, model.head1.bias, model.head2.weight, model.head2.bias
    return forward(layers, head, values, memory_format)
