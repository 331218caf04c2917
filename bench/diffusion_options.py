"""Rows of diffusion_step with more than x and the model's output: guidance, histories, a row of coefficients for each
sample, statistics of whole samples, known data."""

import torch

from .. import ops, reference
from ..ops import diffusion_coefficients as coefficients
from . import diffusion_rows as common
from .case import Case


def cases(images, device):
    cpu = torch.device(device).type == "cpu"
    yield _guided(images, device)
    yield _histories(images, device)
    yield _points(device)
    yield _threshold(images, device, {"diffusers": 20.0} if cpu else {})
    yield _rescale(images, device, {"diffusers": 8.0} if cpu else {})
    yield _inpainting(images, device)


def _guided(shape, device):
    x, m, u = common.tensors(3, shape, device)
    out, theirs = torch.empty_like(x), torch.empty_like(x)
    values = coefficients.ddim(common.ALPHA, common.ALPHA_NEXT)
    row = common.row(values, device)
    A, B, c0, c1 = values[:4]
    scale, shift, guidance = c0 * A + c1, c0 * B, 3.0

    def eager():
        return torch.mul(x, scale, out=theirs).add_(torch.lerp(u, m, guidance), alpha=shift)

    def ours():
        return ops.diffusion_step(x, m, row, uncond=u, guidance_scale=guidance, out=out)

    return Case(
        "diffusion_step", f"DDIM with guidance {common.name(shape)}, out=", ours,
        {"eager": eager, "torch.compile": torch.compile(eager)},
        bytes=4 * x.numel() * x.element_size(), error=common.error(ours, (x, m), row, uncond=u, guidance=guidance),
        share_goal=0.9,
    )


def _histories(shape, device):
    """All that is read without noise: guidance and three old results, with x0 written."""
    x, m, u, *old = common.tensors(6, shape, device)
    out, x0, theirs = (torch.empty_like(x) for _ in range(3))
    values = *coefficients.dpmpp_2m(common.ALPHA, common.ALPHA_NEXT, common.ALPHA_BEFORE)[:5], 0.2, -0.1, 0.0
    row = common.row(values, device)
    A, B, c0, c1, *more = values[:7]
    guidance = 3.0

    def eager():
        now = torch.mul(x, A, out=theirs).add_(torch.lerp(u, m, guidance), alpha=B)
        result = (c0 * now).add_(x, alpha=c1)
        for h, c in zip(old, more, strict=True):
            result.add_(h, alpha=c)
        return result, now

    def ours():
        return ops.diffusion_step(x, m, row, uncond=u, guidance_scale=guidance, history=old, out=out, x0_out=x0)

    return Case(
        "diffusion_step", f"guidance and a history of three {common.name(shape)}, out=", ours,
        {"eager, folded": eager, "torch.compile": torch.compile(eager)},
        bytes=8 * x.numel() * x.element_size(), share_goal=0.9,
        error=common.error(ours, (x, m), row, history=old, uncond=u, guidance=guidance),
    )


def _points(device):
    """Two-dimensional data, each point at its own time: a row of coefficients for every two numbers."""
    shape = (65536, 2)
    x, m = common.tensors(2, shape, device)
    out, theirs = torch.empty_like(x), torch.empty_like(x)
    times = torch.linspace(0.1, 0.8, shape[0]).tolist()
    rows = common.row([coefficients.ddim(a, a + 0.1) for a in times], device)
    A, B, c0, c1 = rows.unsqueeze(-1).unbind(1)[:4]
    scale, shift = c0 * A + c1, c0 * B

    def eager():
        return torch.addcmul(torch.mul(x, scale, out=theirs), m, shift, out=theirs)

    def ours():
        return ops.diffusion_step(x, m, rows, out=out)

    return Case(
        "diffusion_step", f"DDIM {common.name(shape)}, coefficients per sample", ours,
        {"eager": eager, "torch.compile": torch.compile(eager)},
        bytes=3 * x.numel() * x.element_size() + rows.numel() * 4, error=common.error(ours, (x, m), rows),
    )


def _threshold(shape, device, goals):
    """DDIM with the quantile of every sample."""
    x, m = common.tensors(2, shape, device)
    values = coefficients.ddim(common.ALPHA, common.ALPHA_NEXT)
    row = common.row(values, device)
    A, B, c0, c1 = values[:4]
    q, largest = 0.995, 100.0

    def eager():
        x0 = (A * x).add_(m, alpha=B)
        s = torch.quantile(x0.abs().flatten(1), q, dim=1).clamp_(1, largest).reshape(-1, *(1,) * (x.dim() - 1))
        x0 = torch.clamp(x0, -s, s).div_(s)
        return x0.mul_(c0).add_(x, alpha=c1)

    def ours():
        return ops.diffusion_step(x, m, row, dynamic_threshold=(q, largest))

    def error():
        a, b = x.double(), m.double()
        s = torch.quantile((A * a + B * b).abs().flatten(1), q, dim=1).clamp(1, largest).reshape(-1, 1, 1, 1)
        want = c0 * torch.clamp(A * a + B * b, -s, s) / s + c1 * a
        return ((ours().double() - want).abs().max() / want.abs().max()).item()

    return Case(
        "diffusion_step", f"DDIM with dynamic threshold {common.name(shape)}", ours,
        {"eager": eager, "torch.compile": torch.compile(eager),
         "diffusers": common.scheduler("DDIMScheduler", x, m, clip_sample=False, thresholding=True,
                                 sample_max_value=largest)},
        bytes=5 * x.numel() * x.element_size(), error=error, goals=goals, note="x and m are read twice",
    )


def _rescale(shape, device, goals):
    """DDIM with guidance, rescaled by the ratio of two standard deviations of every sample."""
    x, m, u = common.tensors(3, shape, device)
    values = coefficients.ddim(common.ALPHA, common.ALPHA_NEXT)
    row = common.row(values, device)
    A, B, c0, c1 = values[:4]
    guidance, phi = 7.5, 0.7
    step = common.scheduler("DDIMScheduler", x, m, clip_sample=False)
    axes = tuple(range(1, x.dim()))

    def guided(m, u):
        g = u + guidance * (m - u)
        rescaled = g * (m.std(dim=axes, keepdim=True) / g.std(dim=axes, keepdim=True))
        return phi * rescaled + (1 - phi) * g

    def eager():
        return torch.mul(x, c0 * A + c1).add_(guided(m, u), alpha=c0 * B)

    def diffusers():
        guided(m, u)  # the lines of its pipelines; the scheduler's step costs the same for any output
        return step()

    def ours():
        return ops.diffusion_step(x, m, row, uncond=u, guidance_scale=guidance, guidance_rescale=phi)

    def error():
        a = x.double()
        want = (c0 * A + c1) * a + c0 * B * guided(m.double(), u.double())
        return ((ours().double() - want).abs().max() / want.abs().max()).item()

    return Case(
        "diffusion_step", f"DDIM with guidance rescale {common.name(shape)}", ours,
        {"eager": eager, "torch.compile": torch.compile(eager),
         "diffusers": step if isinstance(step, str) else diffusers},
        bytes=6 * x.numel() * x.element_size(), error=error, goals=goals, note="model_output and uncond are read twice",
    )


def _inpainting(shape, device):
    """DDPM, and the known half of each image at the noise level of the next step."""
    x, m, known = common.tensors(3, shape, device)
    mask = torch.zeros_like(x)
    mask[..., : shape[-1] // 2] = 1
    values = coefficients.ddpm(common.ALPHA, common.ALPHA_NEXT)
    row = common.row(values, device)
    A, B, c0, c1, *_, s = values
    scale = common.ALPHA_NEXT**0.5, (1 - common.ALPHA_NEXT) ** 0.5

    def eager():
        x0 = (A * x + B * m).clamp_(-1, 1)
        y = x0.mul_(c0).add_(x, alpha=c1).add_(torch.randn_like(x), alpha=s)
        return mask * (scale[0] * known + scale[1] * torch.randn_like(x)) + (1 - mask) * y

    def ours():
        return ops.diffusion_step(x, m, row, clip=1.0, noise=True, seed=0, mask=mask, known=known, known_scale=scale)

    def error():
        wide = [t.double() for t in (x, m, row)]
        want = reference.diffusion.diffusion_step(*wide, noise=True, low=-1.0, high=1.0, mask=mask.double(),
                                                  known=known.double(), known_signal=scale[0], known_noise=scale[1])[0]
        return ((ours().double() - want).abs().max() / want.abs().max()).item()

    return Case(
        "diffusion_step", f"DDPM, half of it known {common.name(shape)}", ours,
        {"eager": eager, "torch.compile": torch.compile(eager)},
        bytes=5 * x.numel() * x.element_size(), normals=2 * x.numel(), error=error,
    )
