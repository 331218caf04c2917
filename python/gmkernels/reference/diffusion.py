"""One step of an affine sampler in plain torch."""

import torch

from .random import philox_fill

STREAM, STREAM_KNOWN = 2, 10  # csrc/core/philox.h: kStreamDiffusionStep, kStreamKnown


def term(c, t):
    """c * t, and exactly 0 where c is 0, whatever t holds. The derivative by c stays t wherever t is finite."""
    return c * torch.where((c == 0) & ~torch.isfinite(t), 0.0, t)


def real_dtype(x):
    """Arithmetic of a storage dtype: float32, and float64 for float64."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def rows(coefficients, x):
    """The eight coefficients, each [] or, if given per sample, [b, 1, ..., 1]."""
    c = coefficients.to(real_dtype(x))
    if c.dim() == 2:
        c = c.reshape(c.shape[0], *(1,) * (x.dim() - 1), c.shape[1])
    return c.unbind(-1)


def guided(model_output, uncond, scale):
    """uncond + scale (model_output - uncond); without uncond the model's output."""
    return model_output if uncond is None else uncond + scale * (model_output - uncond)


def draw(x, seeds, seed, step, stream=STREAM):
    """The normal numbers of a step: those of ``philox_normal(x.shape, seed, step, stream=2)``."""
    size = x.numel() if seeds is None or seeds.dim() == 0 else x[:1].numel()
    return philox_fill(seeds, seed, size, step, stream, True, torch.float32, x.device).reshape(x.shape)


def blend(mask, known, y):
    """y where the mask is 0, known where it is 1, whatever the other holds; between them what lies between."""
    return torch.where(mask == 0, y, torch.where(mask == 1, known, y + mask * (known - y)))


def diffusion_step(x, model_output, coefficients, uncond=None, h1=None, h2=None, h3=None, variance=None, z=None,
                   seeds=None, guidance_scale=1.0, low=-torch.inf, high=torch.inf, noise=False, seed=0, step=0, *,
                   mask=None, known=None, index=None, known_signal=1.0, known_noise=0.0, known_x0=False):
    """(out, x0) of :func:`gmkernels.ops.diffusion_step`; no clip is (-inf, inf), the noise is z or drawn."""
    real = real_dtype(x)
    if index is not None:
        coefficients, step = coefficients[index], int(index)
    if mask is not None:
        mask, known = mask.to(real), known_signal * known.to(real)
        if known_noise:
            known = known + known_noise * draw(x, seeds, seed, step, STREAM_KNOWN).to(real)
    A, B, c0, c1, c2, c3, c4, s = rows(coefficients, x)
    m = guided(model_output.to(real), None if uncond is None else uncond.to(real), guidance_scale)
    x0 = torch.clamp(term(A, x.to(real)) + term(B, m), low, high)
    if mask is not None and known_x0:
        x0 = blend(mask, known, x0)
    out = term(c0, x0) + term(c1, x.to(real))
    for c, h in ((c2, h1), (c3, h2), (c4, h3)):
        if h is not None:
            out = out + term(c, h.to(real))
    if noise or z is not None:
        z = (draw(x, seeds, seed, step) if z is None else z).to(real)
        out = out + term(s, z if variance is None else variance.to(real).sqrt() * z)
    if mask is not None and not known_x0:
        out = blend(mask, known, out)
    return out.to(x.dtype), x0.to(x.dtype)


def step_quantile(x, model_output, coefficients, uncond, guidance_scale, q):
    """[b]: quantile q of ``|A x + B m|`` over each sample, interpolated linearly; NaN where a sample has one."""
    real = real_dtype(x)
    A, B, *_ = rows(coefficients, x)
    m = guided(model_output.to(real), None if uncond is None else uncond.to(real), guidance_scale)
    y = (term(A, x.to(real)) + term(B, m)).abs().flatten(1)
    if not y.numel():
        return y.new_full(y.shape[:1], torch.nan)
    rank = q * (y.shape[1] - 1)
    below = min(int(rank), y.shape[1] - 1)
    ordered = y.sort(1).values  # torch.quantile takes 16 million elements at most
    first, second = ordered[:, below], ordered[:, min(below + 1, y.shape[1] - 1)]
    between = torch.where(first == second, first, first + (rank - below) * (second - first))
    return torch.where(y.isnan().any(1), torch.nan, between)


def guidance_rescale(model_output, uncond, guidance_scale, rescale):
    """[b]: ``rescale std(model_output) / std(m) + 1 - rescale``, the standard deviations over each sample (n - 1)."""
    real = real_dtype(model_output)
    c, u = model_output.to(real).flatten(1), uncond.to(real).flatten(1)
    return rescale * (c.std(1) / guided(c, u, guidance_scale).std(1)) + (1 - rescale)
