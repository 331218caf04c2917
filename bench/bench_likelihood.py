"""The likelihood heads beside the forms that a torch user writes.

Parameters as of a trained network (means within 0.05 of the pixel, log-scales -6 to -3); pixels of china.jpg.
"""

import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image

from .. import ops, reference
from .case import Case

OPS = ("discretized_logistic_mixture_nll", "discretized_logistic_mixture_sample")
_MIXTURES, _SIDE = 10, 32
_GOALS = {"avx512": {"eager": 9.0, "torch.compile": 8.0}}  # of forward + backward, contiguous


def cases(quick, device):
    batch = 16 if torch.device(device).type == "cpu" else 256
    yield _loss(batch, device, backward=True, last=False, quick=quick)
    yield _loss(batch, device, backward=False, last=False, quick=quick)
    if not quick:
        yield _loss(batch, device, backward=True, last=True, quick=quick)
        yield _loss(1, device, backward=True, last=False, quick=quick)
    yield _sample(batch, device)


def _problem(batch, device):
    """(params [b, 100, 32, 32], x [b, 3, 32, 32] in [-1, 1])"""
    pixels = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    patches = F.unfold(pixels, _SIDE, stride=_SIDE // 2).view(3, _SIDE, _SIDE, -1).permute(3, 0, 1, 2)
    x = patches[:batch].contiguous()
    m, g = _MIXTURES, torch.Generator().manual_seed(0)
    params = torch.randn(batch, 10 * m, _SIDE, _SIDE, generator=g)
    p = params[:, m:].view(batch, 3, 3, m, _SIDE, _SIDE)  # channel, (mean, log-scale, coefficient), component
    p[:, :, 1] = -3 - 3 * torch.rand(p[:, :, 1].shape, generator=g)
    k, near = p[:, :, 2].tanh(), 0.1 * torch.rand(p[:, :, 0].shape, generator=g) - 0.05
    red, green = x[:, 0, None], x[:, 1, None]
    p[:, :, 0] = x[:, :, None] + near
    p[:, 1, 0] -= k[:, 0] * red
    p[:, 2, 0] -= k[:, 1] * red + k[:, 2] * green
    return params.to(device), x.to(device)


def _parts(params, x):
    """logits, means given x, log-scales: [b, (3,) m, h, w]."""
    m, (b, _, h, w) = _MIXTURES, params.shape
    p = params[:, m:].reshape(b, 3, 3, m, h, w)
    k, red, green = torch.tanh(p[:, :, 2]), x[:, 0, None], x[:, 1, None]
    means = torch.stack((p[:, 0, 0], p[:, 1, 0] + k[:, 0] * red, p[:, 2, 0] + k[:, 1] * red + k[:, 2] * green), 1)
    return params[:, :m], means, p[:, :, 1].clamp(min=-7.0)


def classic(params, x):
    """The loss of PixelCNN++ as everybody writes it: mean over pixels."""
    logits, means, log_scales = _parts(params, x)
    x = x[:, :, None]
    centered, inverse = x - means, torch.exp(-log_scales)
    plus, minus, middle = inverse * (centered + 1 / 255), inverse * (centered - 1 / 255), inverse * centered
    delta = torch.sigmoid(plus) - torch.sigmoid(minus)
    log_pdf = middle - log_scales - 2 * F.softplus(middle) - math.log(127.5)
    inner = torch.where(delta > 1e-5, torch.log(delta.clamp(min=1e-12)), log_pdf)
    log_p = torch.where(x < -0.999, plus - F.softplus(plus), torch.where(x > 0.999, -F.softplus(minus), inner))
    return -torch.logsumexp(log_p.sum(1) + torch.log_softmax(logits, 1), 1).mean()


def _loss(batch, device, backward, last, quick):
    params, x = _problem(batch, device)
    if last:
        params = params.to(memory_format=torch.channels_last)
    params.requires_grad_(backward)
    compiled = torch.compile(classic)

    def run(f):
        return (lambda: torch.autograd.grad(f(params, x), params)) if backward else (lambda: f(params, x))

    def error_of(f):
        def error():
            want = reference.likelihood.discretized_logistic_mixture_nll(
                params.detach().double(), x.double(), _MIXTURES, "openai", -1.0, 1.0, 256, "mean", 1)[backward]
            got = run(f)()
            got = (got[0] if backward else got).detach().double()
            return ((got - want).abs().max() / want.abs().max()).item()

        return error

    pixels = batch * _SIDE * _SIDE
    return Case(
        "discretized_logistic_mixture_nll",
        f"{batch}x{_SIDE}x{_SIDE}x3, {_MIXTURES} mixtures, {'channels_last' if last else 'contiguous'}, "
        + ("forward + backward" if backward else "forward"),
        ours=run(ops.discretized_logistic_mixture_nll),
        rivals={"eager": run(classic), "torch.compile": run(compiled)},
        bytes=4.0 * (params.numel() * (2 if backward else 1) + x.numel()),
        exps=pixels * _MIXTURES * 14.0,
        error=error_of(ops.discretized_logistic_mixture_nll),
        rival_error=error_of(classic),
        goals=_goals() if backward and not last and batch > 1 else {},
        note="eager and torch.compile: the classic loss with its 1e-5 branch",
    )


def _goals():
    from .. import _C

    return _GOALS.get(_C.isa(), {})


def _sample(batch, device):
    params, _ = _problem(batch, device)
    generator = torch.Generator(device).manual_seed(0)

    def uniform(like):
        return torch.rand(like.shape, device=device, generator=generator).clamp(1e-5, 1 - 1e-5)

    def usual(params):
        m = _MIXTURES
        logits, p = params[:, :m], params[:, m:].reshape(batch, 3, 3, m, _SIDE, _SIDE)
        pick = (logits - torch.log(-torch.log(uniform(logits)))).argmax(1)[:, None, None, None]
        means, log_scales, k = p.gather(3, pick.expand(-1, 3, 3, 1, -1, -1))[:, :, :, 0].unbind(2)
        u, k = uniform(means), torch.tanh(k)
        noise = torch.exp(log_scales.clamp(min=-7.0)) * (torch.log(u) - torch.log1p(-u))

        def rounded(value):
            return torch.round((value.clamp(-1, 1) + 1) * 127.5) / 127.5 - 1

        red = rounded(means[:, 0] + noise[:, 0])
        green = rounded(means[:, 1] + noise[:, 1] + k[:, 0] * red)
        blue = rounded(means[:, 2] + noise[:, 2] + k[:, 1] * red + k[:, 2] * green)
        return torch.stack((red, green, blue), 1)

    def error():
        want = reference.likelihood.discretized_logistic_mixture_sample(
            params.double(), None, _MIXTURES, "openai", -1.0, 1.0, 256, 3, 0, 1.0)
        return (ops.discretized_logistic_mixture_sample(params, seed=0) - want).abs().max().item()

    return Case(
        "discretized_logistic_mixture_sample",
        f"{batch}x{_SIDE}x{_SIDE}x3, {_MIXTURES} mixtures",
        ours=lambda: ops.discretized_logistic_mixture_sample(params, seed=0),
        rivals={"eager": lambda: usual(params), "torch.compile": "its generator is not the same one"},
        bytes=4.0 * (params.numel() + 3 * params.shape[0] * _SIDE * _SIDE),
        error=error,
    )
