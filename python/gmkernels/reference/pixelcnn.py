"""The gated PixelCNN in plain torch: the whole network at once, and a sampler that runs it for every pixel.

`weights` is an ops.PixelCNNWeights; arithmetic is in the dtype of x.
"""

import torch
import torch.nn.functional as F

from . import likelihood, masked_conv


def image_values(levels, dtype=torch.float64, device=None):
    """What the network sees of level 0 .. levels - 1: equal steps from -1 to 1, rounded to float32."""
    steps = torch.arange(levels, dtype=torch.float64, device=device)
    return (2 * steps / (levels - 1) - 1).float().to(dtype)


def _conv(x, weight, kind, order, groups=1):
    """The taps that masked_conv2d uses, and at the own pixel what a group of the outputs may see."""
    kh, kw = weight.shape[2:]
    used = masked_conv.mask(kh, kw, kind, order, groups, x.device).repeat(*weight.shape[:2], 1, 1)
    if order == "horizontal":
        used[..., kh // 2, kw // 2] &= masked_conv.centre_mask(*weight.shape[:2], kind, groups, True).to(x.device)
    return F.conv2d(x, torch.where(used, weight, 0), padding=(kh // 2, kw // 2))


def _pointwise(x, weight, bias, groups=1):
    used = masked_conv.centre_mask(*weight.shape, "B", groups, False).to(x.device)
    return torch.einsum("oi,bihw->bohw", torch.where(used, weight, 0), x) + bias[:, None, None]


def _gate(z):
    return masked_conv.gated(z, "tanh_sigmoid")


def forward(weights, x, groups=1):
    """[n, c, h, w] in [-1, 1] -> [n, outputs, h, w]."""
    w = weights.to(x.device, x.dtype)
    v = h = None
    for l in range(len(w.out)):
        first, kind = l == 0, "B" if l else "A"
        z = _gate(_conv(x if first else v, w.vertical[l], kind, "vertical") + w.bias_vertical[l][..., None, None])
        v = z if first else v + z
        link = torch.einsum("oi,bihw->bohw", w.link[l], v) + w.bias_horizontal[l][..., None, None]
        a = _gate(_conv(x if first else h, w.horizontal[l], kind, "horizontal", groups) + link)
        z = _pointwise(a, w.out[l], w.bias_out[l], groups)
        h = z if first else h + z
    hidden = torch.relu(_pointwise(torch.relu(h), w.head1, w.bias_head1, groups))
    return _pointwise(hidden, w.head2, w.bias_head2, groups)


def categorical(logits, u, temperature):
    """(levels, bad): of each row of logits [..., levels] the first whose cumulative softmax exceeds u [...]."""
    bad = logits.isnan().any(-1) | ~logits.amax(-1).isfinite()
    if temperature == 0:
        return torch.where(bad, 0, logits.argmax(-1)), bad
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)).double() / temperature, -1)
    level = (p.cumsum(-1) <= u.double()[..., None]).sum(-1).clamp(max=logits.shape[-1] - 1)
    return torch.where(bad, 0, level), bad


def pixelcnn_sample(weights, n, shape, levels, head="categorical", num_mixtures=10, parametrization="openai", groups=1,
                    temperature=1.0, seeds=None, seed=0, uniforms=None, given=None, given_mask=None,
                    dtype=torch.float64):
    """(levels [n, c, h, w], outputs [n, outputs, h, w], bad [n]), by one forward pass for each pixel and group."""
    c, height, width = shape
    device = weights.out[0].device
    values = image_values(levels, dtype, device)
    known = torch.zeros(n, c, height, width, dtype=torch.bool, device=device) if given_mask is None else given_mask
    given = torch.zeros(known.shape, dtype=torch.int64, device=device) if given is None else given
    drawn, bad = torch.zeros_like(given), torch.zeros(n, dtype=torch.bool, device=device)
    for y in range(height):
        for x in range(width):
            for g in range(groups):
                y_all = forward(weights, values[drawn], groups)
                if head == "categorical":
                    here = slice(None) if groups == 1 else slice(g, g + 1)
                    logits = y_all[:, :, y, x].reshape(n, c, levels)[:, here]
                    u = None if uniforms is None else uniforms[:, here, y, x]
                    level, wrong = categorical(logits, u, temperature)
                else:
                    here = slice(None)
                    fixed = torch.where(known, given, -1)
                    all_pixels = likelihood.discretized_logistic_mixture_sample(
                        y_all, seeds, num_mixtures, parametrization, -1.0, 1.0, levels, c, seed, temperature, fixed)
                    value = all_pixels[:, :, y, x]
                    wrong = value.isnan()
                    level = ((value.nan_to_num(nan=-1.0) + 1) / 2 * (levels - 1)).round().long()
                level = torch.where(wrong, 0, level)
                drawn[:, here, y, x] = torch.where(known[:, here, y, x], given[:, here, y, x], level)
                bad |= (wrong & ~known[:, here, y, x]).any(1)
    return drawn, forward(weights, values[drawn], groups), bad
