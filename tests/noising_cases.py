"""Schedules and the float64 oracles that the tests of ops.add_noise, denoising_loss and flow_pair share."""

import torch

import cases
from gmkernels import ops, reference
from gmkernels.reference.noising import TARGETS, WEIGHTS

F64 = torch.float64
__all__ = ["F64", "TARGETS", "WEIGHTS", "flow_oracle", "loss_oracle", "noise", "oracle", "sample_times", "schedule"]


def schedule(times=11, device="cpu", dtype=torch.float32):
    """Variance preserving, from nearly no noise to nearly no data."""
    angle = torch.linspace(0.1, 1.5, times, dtype=F64)
    return torch.stack((angle.cos(), angle.sin()), -1).to(device, dtype)


def sample_times(b, device="cpu", times=11):
    return (torch.arange(b, device=device) * 7 + 3) % times


def noise(x, seed, step=0, stream=8):
    """z of an op, as float64 on the CPU."""
    with cases.cpu_kernels():
        seed = seed.cpu() if isinstance(seed, torch.Tensor) else seed
        return ops.philox_normal(tuple(x.shape), seed, step, stream).double()


def wide(t):
    return None if t is None else t.detach().cpu().double() if t.dtype.is_floating_point else t.cpu()


def oracle(x0, t, pairs, target, seed=None, step=0, noise=None):
    z = wide(noise) if noise is not None else globals()["noise"](x0, seed, step)
    return reference.noising.add_noise_target(wide(x0), wide(t), wide(pairs), z, None, TARGETS.index(target))


def loss_oracle(pred, x0, t, pairs, seed, target, weight=None, gamma=5.0, step=0):
    """(loss, gradient for pred)."""
    p = wide(pred).requires_grad_()
    alpha, sigma = reference.noising.pairs(wide(pairs), wide(t), p)
    want = oracle(pred if x0 is None else x0, t, pairs, target, seed, step)[1]
    weighting = WEIGHTS.index("given" if isinstance(weight, torch.Tensor) else weight)
    w = reference.noising.weights(alpha, sigma, wide(weight) if weighting == 1 else None, weighting, gamma, target, p)
    loss = (w * (p - want) ** 2).mean()
    return loss, torch.autograd.grad(loss, p)[0] if p.numel() else torch.zeros_like(p)


def flow_oracle(x0, x1, t, sigma, seed, step=0):
    a, b, s = wide(x0), wide(x1), wide(t).reshape(-1, *(1,) * (x0.dim() - 1))
    return (1 - s) * a + s * b + sigma * noise(x0, seed, step, 9), b - a
