"""Parameters, pixels and the float64 oracle that the tests of the likelihood heads share."""

import torch

import cases
from gmkernels import ops, reference

F32, F64 = torch.float32, torch.float64
KINDS = {"openai": {}, "classic": {"mode": "openai"}, "tfp": {"parametrization": "tfp"}}
WIDTH = {1: 3, 3: 10}  # channels of params for each component


def pixels(b, channels, *rest, levels=256, low=-1.0, high=1.0, seed=1):
    """On the grid, the lowest and the highest value among them."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, levels, (b, channels, *rest), generator=generator)
    index.flatten()[::5] = 0
    index.flatten()[1::7] = levels - 1
    return low + (high - low) * index.double() / (levels - 1)


def trained(params, x, m, kind):
    """Means within 0.05 of x (in [-1, 1]), log-scales -6 .. -3, in place."""
    channels = x.shape[1]
    u = torch.rand(x.shape[0], 2, channels, m, *x.shape[2:], dtype=F64, generator=torch.Generator().manual_seed(3))
    offset, log_scale = u[:, 0] * 0.1 - 0.05, -3 - 3 * u[:, 1]
    if kind == "tfp":
        p = params.view(x.shape[0], m, -1, *x.shape[2:])
        means, scales, k = p[:, :, 1 : 1 + channels], p[:, :, 1 + channels : 1 + 2 * channels], p[:, :, 7:]
        means, scales, k = (t.transpose(1, 2) for t in (means, scales, k))
        log_scale = torch.log(torch.expm1(log_scale.exp() - 0.9e-3).clamp(min=1e-3))
        used = k
    else:
        p = params[:, m:].view(x.shape[0], channels, -1, m, *x.shape[2:])
        means, scales, k = p[:, :, 0], p[:, :, 1], p[:, :, 2] if channels == 3 else None
        used = None if k is None else k.tanh()
    scales.copy_(log_scale)
    means.copy_(x[:, :, None] + offset)
    if channels == 3:
        means[:, 1] -= used[:, 0] * x[:, :1]
        means[:, 2] -= used[:, 1] * x[:, :1] + used[:, 2] * x[:, 1:2]
    return params


def problem(b=2, channels=3, rest=(3, 5), m=4, kind="openai", dtype=F64, device="cpu", levels=256, near=False, low=-1.0,
            high=1.0):
    x = pixels(b, channels, *rest, levels=levels)
    params = cases.data(b, WIDTH[channels] * m, *rest)
    if near:
        trained(params, x, m, kind)
    x = low + (x + 1) / 2 * (high - low)
    return params.to(device, dtype), x.to(device, dtype)


def loss_and_gradient(params, x, m, reduction="none", factor=None, **options):
    params = params.detach().requires_grad_()
    loss = ops.discretized_logistic_mixture_nll(params, x, m, reduction=reduction, **options)
    (gradient,) = torch.autograd.grad(loss, params, torch.ones_like(loss) if factor is None else factor)
    return loss.detach(), gradient


def oracle(params, x, m, kind="openai", low=-1.0, high=1.0, levels=256, reduction="none"):
    """(loss, gradient) by the reference, in float64."""
    return reference.likelihood.discretized_logistic_mixture_nll(
        params.detach().cpu().double(), x.detach().cpu().double(), m, kind, low, high, levels, reduction, 1)


def close(got, want, rtol=None):
    """Against the largest value: nll and gradients are sums of terms of that size."""
    for g, w in zip(got, want, strict=True):
        finite = w[w.isfinite()]
        size = finite.abs().max().item() if finite.numel() else 0.0
        bound = rtol or (1e-13 if g.dtype is F64 else 1e-5)
        cases.close(g, w, rtol=0, atol=bound * max(size, 1e-2))
