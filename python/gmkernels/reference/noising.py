"""Adding noise to data, and the losses of what a model says of it, in plain torch."""

import math

import torch

from .diffusion import real_dtype, term
from .random import philox_fill

TARGETS = ("epsilon", "x0", "v", "score", "velocity")  # csrc/training/noising.h
WEIGHTS = (None, "given", "min_snr")
STREAM_ADD_NOISE, STREAM_FLOW_PAIR = 8, 9  # csrc/core/philox.h


def per_sample(values, x):
    """[b] or [] as [b, 1, ..., 1], in x's arithmetic."""
    values = values.to(real_dtype(x))
    return values.reshape(values.shape[0], *(1,) * (x.dim() - 1)) if values.dim() else values


def pairs(schedule, t, x):
    """alpha and sigma of each sample; NaN where t is outside the schedule."""
    rows = schedule
    if t is not None:
        inside = (t >= 0) & (t < schedule.shape[0])
        rows = torch.where(inside.unsqueeze(-1), schedule[torch.where(inside, t, 0)], math.nan)
    return per_sample(rows[..., 0], x), per_sample(rows[..., 1], x)


def target_pair(alpha, sigma, target):
    """(p, q) of target = p x0 + q z."""
    zero, one = torch.zeros_like(alpha) * alpha, torch.ones_like(alpha) + 0 * alpha  # NaN stays
    return {"epsilon": (zero, one), "x0": (one, zero), "v": (-sigma, alpha), "score": (zero, -1.0 / sigma),
            "velocity": (-one, one)}[target]


def draw(x, seeds, seed, step, stream):
    size = x.numel() if seeds is None or seeds.dim() == 0 else x[:1].numel()
    return philox_fill(seeds, seed, size, step, stream, True, torch.float32, x.device).reshape(x.shape)


def add_noise_target(x0, t, schedule, z=None, seeds=None, target=0, seed=0, step=0):
    """(x_t, target) of :func:`gmkernels.ops.add_noise`; `target` is an index into TARGETS."""
    z = (draw(x0, seeds, seed, step, STREAM_ADD_NOISE) if z is None else z).to(real_dtype(x0))
    x = x0.to(real_dtype(x0))
    alpha, sigma = pairs(schedule, t, x0)
    p, q = target_pair(alpha, sigma, TARGETS[target])
    return (term(alpha, x) + term(sigma, z)).to(x0.dtype), (term(p, x) + term(q, z)).to(x0.dtype)


def add_noise(x0, t, schedule, z=None, seeds=None, seed=0, step=0):
    return add_noise_target(x0, t, schedule, z, seeds, 0, seed, step)[0]


def min_snr(alpha, sigma, gamma, target):
    """min(snr, gamma), over what a loss of this target is to a loss of x0; the limits where snr is 0 or infinite."""
    snr = alpha**2 / sigma**2
    if target == "x0":
        return snr.clamp(max=gamma)
    if target == "v":
        return torch.where(snr < gamma, alpha**2 / (alpha**2 + sigma**2), gamma / (snr + 1.0))
    return torch.where(snr < gamma, 1.0, gamma / snr)


def weights(alpha, sigma, weight, weighting, gamma, target, like):
    if WEIGHTS[weighting] == "given":
        return per_sample(weight, like)
    if WEIGHTS[weighting] == "min_snr":
        return min_snr(alpha, sigma, gamma, target)
    return torch.ones_like(alpha)


def denoising_loss(pred, x0, t, schedule, weight=None, seeds=None, target=0, weighting=0, gamma=5.0, with_grad=False,
                   seed=0, step=0):
    """(loss, its gradient for pred or an empty tensor) of :func:`gmkernels.ops.denoising_loss`."""
    real = real_dtype(pred)
    z = draw(pred, seeds, seed, step, STREAM_ADD_NOISE).to(real)
    alpha, sigma = pairs(schedule, t, pred)
    p, q = target_pair(alpha, sigma, TARGETS[target])
    want = term(q, z)
    if x0 is not None:
        want = want + term(p, x0.to(real))
    w = weights(alpha, sigma, weight, weighting, gamma, TARGETS[target], pred)
    difference = pred.to(real) - want
    loss = (w * difference * difference).double().mean().to(real)
    grad = (2.0 / max(pred.numel(), 1) * w * difference).to(pred.dtype) if with_grad else pred.new_empty(0)
    return loss, grad.detach()


def flow_pair(x0, x1, t, seeds=None, sigma=0.0, seed=0, step=0):
    """(x_t, u_t) of :func:`gmkernels.ops.flow_pair`."""
    real = real_dtype(x0)
    a, b, s = x0.to(real), x1.to(real), per_sample(t, x0)
    xt = (1.0 - s) * a + s * b
    if sigma:
        xt = xt + sigma * draw(x0, seeds, seed, step, STREAM_FLOW_PAIR).to(real)
    return xt.to(x0.dtype), (b - a).to(x0.dtype)
