"""Likelihood heads in plain torch: the discretized logistic mixture of PixelCNN++, and its sampler."""

import math

import torch
import torch.nn.functional as F

from .._loss import reduced, weight, with_gradient
from .random import philox_words

STREAM = 7  # csrc/core/philox.h: kStreamLogisticMixture
KINDS = ("openai", "classic", "tfp")  # csrc/likelihood/likelihood.h: LogisticKind


def edge(levels):
    """A quarter of half a bin: |x| > 1 - edge is an outermost bin (0.999 of 256 levels), |x| > 1 + edge is outside."""
    return 0.255 / (levels - 1)


def parameters(params, channels, m, kind):
    """[b, n, ...] -> logits [b, m, ...]; means, reciprocal scales [b, channels, m, ...]; coefficients, in tfp's order
    [b, 3, m, ...]: of red for green, of red for blue, of green for blue."""
    b, rest = params.shape[0], params.shape[2:]
    if kind == "tfp":
        p = params.reshape(b, m, params.shape[1] // m, *rest).transpose(1, 2)
        logits, means, raw, k = p[:, 0], p[:, 1 : 1 + channels], p[:, 1 + channels : 1 + 2 * channels], p[:, 7:]
        return logits, means, 1 / (math.exp(-7) - F.logsigmoid(-raw)), k
    logits, p = params[:, :m], params[:, m:].reshape(b, channels, (params.shape[1] // m - 1) // channels, m, *rest)
    return logits, p[:, :, 0], torch.exp(-p[:, :, 1].clamp(min=-7)), torch.tanh(p[:, :, 2]) if channels == 3 else None


def mixture_means(means, k, x):
    """Of every component, given the channels before: x [b, channels, 1, ...] in [-1, 1]."""
    if means.shape[1] == 1:
        return means
    red, green = x[:, 0], x[:, 1]
    return torch.stack((means[:, 0], means[:, 1] + k[:, 0] * red, means[:, 2] + k[:, 1] * red + k[:, 2] * green), 1)


def log_mixture(params, x, num_mixtures, kind, low, high, levels):
    """-log P of every pixel, [b, ...]."""
    half = 1 / (levels - 1)
    x = (2 / (high - low) * x - (high + low) / (high - low))[:, :, None]
    logits, means, inverse, k = parameters(params, x.shape[1], num_mixtures, kind)
    distance = x - mixture_means(means, k, x)
    p, q, d = inverse * (distance + half), inverse * (distance - half), 2 * inverse * half
    lowest, highest = x < edge(levels) - 1, x > 1 - edge(levels)
    inner = ~(lowest | highest)
    log_p = torch.where(highest, 0.0, F.logsigmoid(p)) + torch.where(lowest, 0.0, F.logsigmoid(-q))
    log_p = log_p + torch.where(inner, torch.log(-torch.expm1(-d)), 0.0)
    if kind == "classic":  # the density in the middle of the bin, times its width
        z = inverse * distance
        density = F.logsigmoid(z) + F.logsigmoid(-z) + torch.log(inverse) + math.log(2 * half)
        log_p = torch.where(inner & (log_p <= math.log(1e-5)), density, log_p)
    nll = -torch.logsumexp(torch.log_softmax(logits, 1) + log_p.sum(1), 1)
    valid = (x.abs() <= 1 + edge(levels)).all(1)[:, 0]
    return nll * torch.where(valid, 1.0, math.nan)


def discretized_logistic_mixture_nll(params, x, num_mixtures, kind, low, high, levels, reduction, need):
    """(loss, gradient); half types in float32."""
    real = params.dtype if params.dtype is torch.float64 else torch.float32

    def loss(p):
        return log_mixture(p.to(real), x.to(real), num_mixtures, kind, low, high, levels).sum()

    nll = log_mixture(params.to(real), x.to(real), num_mixtures, kind, low, high, levels)
    _, gradient = with_gradient(loss, params, need)
    value = reduced(nll, reduction).to(params.dtype)
    return value, gradient * weight(nll.numel(), reduction)


def discretized_logistic_mixture_sample(params, seeds, num_mixtures, kind, low, high, levels, channels, seed,
                                        temperature, fixed=None):
    """x [b, channels, ...]: one Philox block a pixel, counted over the tensor or, with seeds [b], over the image.

    fixed [b, channels, ...]: levels of channels that are given, negative where they are not; PixelCNN completes images.
    """
    logits, means, inverse, k = parameters(params.double(), channels, num_mixtures, kind)
    b, pixels = logits.shape[0], logits[0, 0].numel()
    blocks = torch.arange(b * pixels, device=params.device).view(b, pixels)
    if seeds is None:
        seeds = torch.tensor(seed, device=params.device)
    elif seeds.dim():
        blocks, seeds = blocks % max(pixels, 1), seeds[:, None]
    words = philox_words(blocks, 0, STREAM, seeds).view(b, *logits.shape[2:], 4)
    u = ((words.double() + 0.5) * 2.0**-32).unbind(-1)
    bad = logits.isnan().any(1) | ~logits.amax(1).isfinite()
    if temperature:
        weights = torch.exp((logits - logits.amax(1, keepdim=True)) / temperature)
        cumulative = weights.cumsum(1)
        component = (cumulative <= (u[0] * cumulative[:, -1])[:, None]).sum(1).clamp(max=num_mixtures - 1)
    else:
        component = logits.nan_to_num(nan=-math.inf).argmax(1)
    means, inverse, k = (None if t is None or not t.numel() else t.gather(2, component[:, None, None].expand(
        -1, t.shape[1], 1, *t.shape[3:]))[:, :, 0] for t in (means, inverse, k))
    x = []
    for c in range(channels):
        value = means[:, c]
        for before in range(c):
            value = value + k[:, c * (c - 1) // 2 + before] * x[before]
        if temperature:
            value = value + temperature / inverse[:, c] * (torch.log(u[1 + c]) - torch.log1p(-u[1 + c]))
        bad = bad | value.isnan() | inverse[:, c].isnan()
        level = torch.floor((value + 1) / 2 * (levels - 1) + 0.5).clamp(0, levels - 1)
        if fixed is not None:
            level = torch.where(fixed[:, c] < 0, level, fixed[:, c].to(level))
        x.append(2 * level / (levels - 1) - 1)
    out = (torch.stack(x, 1) + 1) / 2 * (high - low) + low
    return torch.where(bad[:, None], math.nan, out).to(params.dtype)
