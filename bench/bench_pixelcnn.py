"""pixelcnn_sample beside an incremental sampler in eager torch, and beside a full forward pass for every pixel.

28x28 grey images of 256 levels; 64 features, a 7x7 layer and twelve of 3x3, a head 64 -> 256 -> 256. The eager sampler
keeps what ours keeps (the vertical stack of a row and of the one above, the horizontal stack of a pixel and of the one
to its left); its weights are transposed before the clock starts, ours are packed within the call.
"""

import torch
import torch.nn.functional as F

from .. import _C, ops, reference
from .case import Case

OPS = ("pixelcnn_sample",)
_C_, _LAYERS, _HIDDEN, _LEVELS, _SIDE, _K0 = 64, 13, 256, 256, 28, 7
_PIXELS = _SIDE * _SIDE
_FORWARD = "full forward x 784"
_GOALS = {16: {"cached eager": 6.0, _FORWARD: 500.0}, 1: {"cached eager": 12.0, _FORWARD: 500.0}}


def cases(quick, device):
    gpu = torch.device(device).type == "cuda"
    for n in (64, 1024) if gpu else (16,) if quick else (16, 1):
        yield _case(n, device)


def _weights(device):
    count = 0

    def w(*shape):
        nonlocal count
        count += 1
        scale = max(1, torch.Size(shape[1:]).numel()) ** -0.5
        return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(count))).to(device)

    def kernels(high):
        sizes = [_K0] + [3] * (_LAYERS - 1)
        return tuple(w(2 * _C_, _C_ if l else 1, k if high else 1, k) for l, k in enumerate(sizes))

    return ops.PixelCNNWeights(
        kernels(True), kernels(False), tuple(w(2 * _C_, _C_) for _ in range(_LAYERS)),
        tuple(w(_C_, _C_) for _ in range(_LAYERS)), w(_LAYERS, 1, 2 * _C_), w(_LAYERS, 1, 2 * _C_), w(_LAYERS, _C_),
        w(_HIDDEN, _C_), w(_HIDDEN), w(_LEVELS, _HIDDEN), w(_LEVELS),
    )


def _gate(z, dim):
    a, b = z.chunk(2, dim)
    return torch.tanh(a) * torch.sigmoid(b)


class CachedEager:
    """The incremental sampler, as one would write it in torch: conv2d per layer and row, addmm per layer and pixel."""

    def __init__(self, weights):
        self.w = weights
        self.vertical = [w[:, :, : w.shape[-1] // 2 + (l > 0)].contiguous() for l, w in enumerate(weights.vertical)]
        first, *rest = weights.horizontal  # [left and own pixel's channels, outputs]
        self.horizontal = [first[:, 0, 0, : _K0 // 2].t().contiguous()]
        self.horizontal += [w[:, :, 0, :2].permute(2, 1, 0).flatten(0, 1).contiguous() for w in rest]
        self.link = [w[..., None, None] for w in weights.link]
        self.out = [w.t().contiguous() for w in weights.out]
        self.head1, self.head2 = weights.head1.t().contiguous(), weights.head2.t().contiguous()
        self.values = reference.pixelcnn.image_values(_LEVELS, torch.float32, weights.head1.device)

    @torch.no_grad()
    def __call__(self, u):
        w, n, half = self.w, u.shape[0], _K0 // 2
        image = u.new_zeros(n, 1, half + _SIDE, _SIDE + 2 * half)
        drawn = torch.empty(n, 1, _SIDE, _SIDE, dtype=torch.int64, device=u.device)
        rows = [u.new_zeros(n, _C_, 2, _SIDE + 2) for _ in range(_LAYERS)]  # padded; the row above, the own one
        seen = [u.new_zeros(n, 2 * _C_) for _ in range(_LAYERS)]  # the pixel to the left, the own one
        for y in range(_SIDE):
            links = []
            for l in range(_LAYERS):
                source = image[:, :, y : y + half] if l == 0 else rows[l - 1]
                z = _gate(F.conv2d(source, self.vertical[l], w.bias_vertical[l, 0]), 1)
                v = z if l == 0 else rows[l - 1][:, :, 1:, 1:-1] + z
                rows[l][:, :, 1:, 1:-1] = v
                links.append(F.conv2d(v, self.link[l], w.bias_horizontal[l, 0])[:, :, 0].permute(2, 0, 1).contiguous())
            for t in rows:
                t[:, :, 0] = t[:, :, 1]
            for t in seen:
                t.zero_()
            for x in range(_SIDE):
                for l in range(_LAYERS):
                    source = image[:, 0, half + y, x : x + half] if l == 0 else seen[l - 1]
                    a = _gate(torch.addmm(links[l][x], source, self.horizontal[l]), 1)
                    h = torch.addmm(w.bias_out[l], a, self.out[l])
                    if l:
                        h += seen[l - 1][:, _C_:]
                    seen[l][:, _C_:] = h
                hidden = torch.addmm(w.bias_head1, torch.relu(h), self.head1).relu_()
                p = torch.softmax(torch.addmm(w.bias_head2, hidden, self.head2), 1)
                level = torch.searchsorted(p.cumsum(1), u[:, :, y, x].contiguous(), right=True).clamp_(max=_LEVELS - 1)
                drawn[:, :, y, x] = level
                image[:, :, half + y, half + x] = self.values[level]
                for t in seen:
                    t[:, :_C_] = t[:, _C_:]
        return drawn


class FullForward:
    """The network on whole images, kernels cropped to the taps that count."""

    def __init__(self, weights):
        self.w = weights
        self.vertical = [w[:, :, : w.shape[-1] // 2 + (l > 0)].contiguous() for l, w in enumerate(weights.vertical)]
        self.horizontal = [w[..., : w.shape[-1] // 2 + (l > 0)].contiguous() for l, w in enumerate(weights.horizontal)]
        self.pointwise = [[w[..., None, None] for w in t] for t in (weights.link, weights.out)]

    @torch.no_grad()
    def __call__(self, x):
        w, r = self.w, _K0 // 2
        v = h = x
        for l in range(_LAYERS):
            if l == 0:
                above, left = F.pad(x, (r, r, r, 0))[:, :, :_SIDE + r - 1], F.pad(x, (r, 0))[..., :_SIDE + r - 1]
            else:
                above, left = F.pad(v, (1, 1, 1, 0)), F.pad(h, (1, 0))
            z = _gate(F.conv2d(above, self.vertical[l], w.bias_vertical[l, 0]), 1)
            v = z if l == 0 else v + z
            link = F.conv2d(v, self.pointwise[0][l], w.bias_horizontal[l, 0])
            a = _gate(F.conv2d(left, self.horizontal[l]).add_(link), 1)
            z = F.conv2d(a, self.pointwise[1][l], w.bias_out[l])
            h = z if l == 0 else h + z
        hidden = F.conv2d(h.relu_(), w.head1[..., None, None], w.bias_head1).relu_()
        return F.conv2d(hidden, w.head2[..., None, None], w.bias_head2)


def _safe(outputs, drawn):
    """Uniforms in the middle of what each drawn level has of [0, 1): rounding decides no pixel, and all draw these."""
    p = torch.softmax(outputs.double(), 1)
    ends = p.cumsum(1).gather(1, drawn)
    return (ends - p.gather(1, drawn) / 2).clamp(0, 1 - 2.0**-24).float()


def _case(n, device):
    weights, shape = _weights(device), (1, _SIDE, _SIDE)
    drawn, outputs = ops.pixelcnn_sample(weights, n, shape, levels=_LEVELS, seed=0, return_logits=True)
    u = _safe(outputs, drawn)
    cached, full = CachedEager(weights), FullForward(weights)
    x = reference.pixelcnn.image_values(_LEVELS, torch.float32, device)[drawn]

    def error_of(outputs):
        want = FullForward(weights.to(torch.float64))(x.double())
        return ((outputs.double() - want).abs().max() / want.abs().max()).item()

    def ours():
        return ops.pixelcnn_sample(weights, n, shape, levels=_LEVELS, uniforms=u)

    def error():
        again, outputs = ops.pixelcnn_sample(weights, n, shape, levels=_LEVELS, uniforms=u, return_logits=True)
        return error_of(outputs) if torch.equal(again, drawn) else float("nan")

    c, k = _C_, 3
    macs = 2 * c * (_K0 * (_K0 // 2) + _K0 // 2) + _LAYERS * (2 * c * c + c * c) + _HIDDEN * (c + _LEVELS)
    macs += (_LAYERS - 1) * 2 * c * c * (k * 2 + 2)
    return Case(
        "pixelcnn_sample",
        f"28x28, C=64, 12 layers, n={n}",
        ours=ours,
        rivals={"cached eager": lambda: cached(u), _FORWARD: lambda: full(x)},
        flops=2.0 * macs * _PIXELS * n,
        exps=4.0 * _LAYERS * c * _PIXELS * n,
        error=error,
        rival_error=lambda: error_of(full(x)),
        parts={_FORWARD: 1 / _PIXELS},
        goals=_GOALS.get(n, {}) if _C.isa() == "avx512" else {},
        note="k0=7, k=3, E=256, 256 levels; x 784: extrapolated from one forward pass",
    )
