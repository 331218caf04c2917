"""Gaussian mixtures in plain torch: every row meets every component, [..., n, k, d] numbers in memory."""

import math

import torch

from .random import philox_fill, philox_words

COVARIANCE_TYPES = ("full", "tied", "diag", "spherical")
TRAILING = {"full": 3, "tied": 2, "diag": 2, "spherical": 1}  # dimensions of covariances and precisions_cholesky


def covariance_shape(covariance_type, k, d):
    """Of the covariances, and of precisions_cholesky, of one mixture."""
    return {"full": (k, d, d), "tied": (d, d), "diag": (k, d), "spherical": (k,)}[covariance_type]


def _scaled_residuals(x, means, precisions_cholesky, covariance_type):
    """y = (x - mean) P [..., n, k, d], and the diagonals of the P [..., k, d]."""
    t = x[..., :, None, :] - means[..., None, :, :]
    p, d = precisions_cholesky, x.shape[-1]
    if covariance_type == "full":
        return torch.einsum("...nkd,...kde->...nke", t, p.triu()), p.diagonal(dim1=-2, dim2=-1)
    if covariance_type == "tied":
        return torch.einsum("...nkd,...de->...nke", t, p.triu()), p.diagonal(dim1=-2, dim2=-1)[..., None, :]
    scales = p if covariance_type == "diag" else p[..., None].expand(*p.shape, d)
    return t * scales[..., None, :, :], scales


def gmm_component_log_prob(x, log_weights, means, precisions_cholesky, covariance_type="full"):
    """log w_k + log N(x_i; mu_k, Sigma_k): [..., n, k]; -inf, without gradients, where a component has no weight."""
    y, diagonals = _scaled_residuals(x, means, precisions_cholesky, covariance_type)
    dead = ((log_weights == -math.inf) | (diagonals == 0).any(-1))[..., None, :]
    log_det = torch.where(diagonals == 0, 1.0, diagonals).abs().log().sum(-1)
    normal = log_weights + log_det - 0.5 * x.shape[-1] * math.log(2 * math.pi)
    square = torch.where(dead[..., None], 0.0, y).square().sum(-1)
    return torch.where(dead, -math.inf, normal[..., None, :] - 0.5 * square)


def _without_infinities(x):
    """x with its rows that hold an infinity and no NaN set to zero, and which rows those are [..., n]."""
    infinite = x.isinf().any(-1) & ~x.isnan().any(-1)
    return torch.where(infinite[..., None], 0.0, x), infinite


def gmm_log_prob(x, log_weights, means, precisions_cholesky, covariance_type="full"):
    """log p(x_i): [..., n]. See :func:`gmkernels.ops.gmm_log_prob`."""
    x, infinite = _without_infinities(x)
    lp = gmm_component_log_prob(x, log_weights, means, precisions_cholesky, covariance_type)
    if lp.shape[-1] == 0:
        return lp.sum(-1) - math.inf
    top = lp.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(lp.dtype).min)
    total = (lp - top).exp().sum(-1)
    empty = (total == 0) | infinite  # torch.logsumexp has NaN gradients there
    return torch.where(empty, -math.inf, top[..., 0] + torch.where(empty, 1.0, total).log())


def gmm_log_prob_backward(
    grad, log_prob, x, log_weights, means, precisions_cholesky, covariance_type, need_x=True, need_parameters=True
):
    """Gradients for x, log_weights, means and precisions_cholesky, each over the whole broadcast batch.

    `log_prob` is not read: the responsibilities are a softmax of what is recomputed here, so that differentiating this
    function once more is right without a gradient for `log_prob`.
    """
    batch = grad.shape[:-1]
    x, infinite = _without_infinities(x)
    args = [x, log_weights, means, precisions_cholesky]
    trailing = [2, 1, 2, TRAILING[covariance_type]]
    x, log_weights, means, p = (t.expand(*batch, *t.shape[t.dim() - m :]) for t, m in zip(args, trailing, strict=True))
    nothing = grad.new_empty(0)
    lp = gmm_component_log_prob(x, log_weights, means, p, covariance_type)
    dead = lp.isneginf()
    empty = dead.all(-1, keepdim=True) | infinite[..., None]
    r = torch.where(dead | empty, 0.0, torch.softmax(torch.where(empty, 0.0, lp), -1))
    w = r * torch.where(infinite, 0.0, grad)[..., None]
    y, diagonals = _scaled_residuals(x, means, p, covariance_type)
    wy = torch.where((dead | empty)[..., None], 0.0, w[..., None] * y)
    if covariance_type in ("full", "tied"):
        upper = (p if covariance_type == "full" else p[..., None, :, :]).triu()
        pull = (wy[..., None, :] @ upper.mT[..., None, :, :, :])[..., 0, :]  # P w y
    else:
        pull = wy * diagonals[..., None, :, :]
    grad_x = -pull.sum(-2) if need_x else nothing
    if not need_parameters:
        return grad_x, nothing, nothing, nothing
    mass = w.sum(-2)
    alive = mass != 0
    inverse = torch.where(alive[..., None], mass[..., None] / torch.where(alive[..., None], diagonals, 1.0), 0.0)
    t = x[..., :, None, :] - means[..., None, :, :]
    if covariance_type == "full":
        grad_p = torch.diag_embed(inverse) - torch.einsum("...nka,...nkb->...kab", t, wy).triu()
    elif covariance_type == "tied":
        grad_p = torch.diag_embed(inverse.sum(-2)) - torch.einsum("...nka,...nkb->...ab", t, wy).triu()
    else:
        grad_p = inverse - (t * wy).sum(-3)
        grad_p = grad_p if covariance_type == "diag" else grad_p.sum(-1)
    return grad_x, mass, pull.sum(-3), grad_p


def gmm_sample(means, precisions_cholesky, cdf, seeds, n, seed, covariance_type):
    """(x [..., n, d], component [..., n]): see :func:`gmkernels.ops.gmm_sample`. `cdf` [..., k] ascends to 1."""
    dtype, means, p = means.dtype, means.double(), precisions_cholesky.double()
    k, d = means.shape[-2:]
    trailing = TRAILING[covariance_type]
    batch = torch.broadcast_shapes(means.shape[:-2], cdf.shape[:-1], p.shape[: p.dim() - trailing])
    seeds = torch.tensor([seed], device=means.device) if seeds is None else seeds.reshape(-1)
    rows = batch.numel() * n // len(seeds)
    blocks = torch.arange((rows + 3) // 4, device=means.device)
    words = philox_words(blocks, 0, 3, seeds[:, None]).flatten(1)[:, :rows]
    u = ((words.double() + 0.5) * 2.0**-32).reshape(*batch, n)
    z = philox_fill(seeds, 0, rows * d, 0, 4, True, torch.float32, means.device).double().reshape(*batch, n, d)
    component = (~(cdf[..., None, :] > u[..., None])).sum(-1)
    none = component == k
    if k == 0:
        return torch.full_like(z, math.nan, dtype=dtype), torch.full_like(component, -1)
    c = torch.where(none, 0, component)
    mean = torch.take_along_dim(means.expand(*batch, k, d), c[..., None], -2)
    p = p.expand(*batch, *p.shape[p.dim() - trailing :])
    if covariance_type == "tied":
        t = torch.linalg.solve_triangular(p.triu(), z, upper=True, left=False)
    elif covariance_type == "full":
        chosen = torch.take_along_dim(p.triu(), c[..., None, None], -3)
        t = torch.linalg.solve_triangular(chosen, z[..., None, :], upper=True, left=False)[..., 0, :]
    elif covariance_type == "diag":
        t = z / torch.take_along_dim(p, c[..., None], -2)
    else:
        t = z / torch.take_along_dim(p, c, -1)[..., None]
    return torch.where(none[..., None], math.nan, mean + t).to(dtype), torch.where(none, -1, component)
