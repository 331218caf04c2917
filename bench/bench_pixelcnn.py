"""pixelcnn_sample beside an incremental sampler in eager torch, and beside a full forward pass for every pixel.

28x28 grey images of 256 levels; 64 features, a 7x7 layer and twelve of 3x3, a head 64 -> 256 -> 256. The eager sampler
keeps what ours keeps (the vertical stack of a row and of the one above, the horizontal stack of a pixel and of the one
to its left); its weights are transposed before the clock starts, ours are packed within the call.
"""

import torch
import torch.nn.functional as F

from .. import _C, ops, reference
from . import pixelcnn_torch
from .case import Case
from .pixelcnn_torch import gate

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


class CachedEager:
    """The incremental sampler, as one would write it in torch: conv2d per layer and row, addmm per layer and pixel."""

    def __init__(self, weights):
        self.w = weights
        vertical, horizontal = pixelcnn_torch.cropped(weights.vertical, weights.horizontal)
        self.vertical = [w.contiguous() for w in vertical]
        self.horizontal = [w[:, :, 0].permute(2, 1, 0).flatten(0, 1).contiguous() for w in horizontal]
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
                z = gate(F.conv2d(source, self.vertical[l], w.bias_vertical[l, 0]))
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
                    a = gate(torch.addmm(links[l][x], source, self.horizontal[l]))
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
        w = weights
        vertical, horizontal = ([k.contiguous() for k in kernels]
                                for kernels in pixelcnn_torch.cropped(w.vertical, w.horizontal))
        link, out, (head1, head2) = ([t[..., None, None] for t in ts] for ts in (w.link, w.out, (w.head1, w.head2)))
        self.layers = list(zip(vertical, w.bias_vertical[:, 0], horizontal, w.bias_horizontal[:, 0], link, out,
                               w.bias_out, strict=True))
        self.head = head1, w.bias_head1, head2, w.bias_head2

    @torch.no_grad()
    def __call__(self, x):
        return pixelcnn_torch.forward(self.layers, self.head, x)


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
    points = _C.pixelcnn_panel(torch.device(device).type == "cuda", k, _SIDE)[2]  # for two pixels
    macs += (_LAYERS - 1) * 2 * c * c * ((points / 2 or k) * 2 + 2)
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
