"""Gaussian mixtures in use: samples, the score, and what a noisy observation says of the clean one."""

import torch

from .. import reference
from .._call import DTYPE_CODE, Kernel, Op, check_floating, check_int, check_tensor, split_seed
from . import gmm

_sample = Kernel("gmm_sample")
_TYPES = reference.gmm.COVARIANCE_TYPES


def _sample_outputs(means, precisions_cholesky, cdf, seeds, n, seed, covariance_type, out=None):
    p = precisions_cholesky
    lead = p.shape[: p.dim() - gmm._TRAILING[covariance_type]]
    batch = torch.broadcast_shapes(means.shape[:-2], cdf.shape[:-1], lead)
    return means.new_empty((*batch, n, means.shape[-1])), means.new_empty((*batch, n), dtype=torch.int64)


def _sample_launch(outs, means, precisions_cholesky, cdf, seeds, n, seed, covariance_type):
    batch = outs[1].shape[:-1]
    trailing = 1, 2, gmm._TRAILING[covariance_type]
    tensors, strides = zip(*(gmm._flat(t, batch, m) for t, m in zip((cdf, means, precisions_cholesky), trailing,
                                                                   strict=True)), strict=True)
    b, (k, d) = batch.numel(), means.shape[-2:]
    seed_rows = seeds.numel() if seeds is not None else 1
    _sample(outs, (tensors[0], None if seeds is None else seeds.contiguous(), *tensors[1:]), strides, b, n, k, d,
            seed & (2**64 - 1), seed_rows, DTYPE_CODE[means.dtype], _TYPES.index(covariance_type))


_sample_op = Op(
    "gmm_sample(Tensor means, Tensor precisions_cholesky, Tensor cdf, Tensor? seeds, SymInt n, int seed,"
    " str covariance_type) -> (Tensor, Tensor)",
    outputs=_sample_outputs,
    launch=_sample_launch,
    reference=reference.gmm.gmm_sample,
    kernel=_sample,
)


def gmm_sample(n, log_weights, means, precisions_cholesky, covariance_type="full", *, seed=None):
    r"""``n`` samples of a Gaussian mixture, and the component of each: reproducible on every device.

    Row r takes component ``c``, the first whose cumulative weight exceeds a 32-bit uniform (word r of Philox stream
    3), and ``x = means[c] + t`` with ``t P_c = z``, ``z`` the normals ``r d ... r d + d - 1`` of stream 4: t has
    covariance ``(P_c P_c^T)^-1``. The same component on every device, x to rounding (docs/random-numbers.md).

    Args:
        n: rows to draw of each mixture.
        log_weights: ``[..., k]``, normalised here.
        means, precisions_cholesky, covariance_type: as in :func:`gmm_log_prob`; leading dimensions broadcast.
        seed: ``None`` draws one from torch's default generator; an int counts over all rows of all mixtures; an int64
            tensor ``[b]`` gives each of b mixtures numbers of its own, whatever the batch.

    Returns: ``(x [..., n, d], component [..., n] int64)``, without gradients. A component of weight 0 (``-inf``), or
    with a zero on the diagonal of its P, is never drawn; a mixture without any other gives NaN and component -1.

    Errors: ``ValueError`` for shapes, a negative ``n`` and seeds out of range, ``TypeError`` for dtypes.

    Source: Box and Muller, 1958; Salmon et al., SC 2011. ``sklearn.mixture.GaussianMixture.sample`` orders its rows by
    component, this does not.

    >>> log_weights, means = torch.tensor([0.3, 0.7]).log(), torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    >>> x, component = gmm_sample(1000, log_weights, means, torch.ones(2), "spherical", seed=0)
    """
    batch = gmm.check_mixture(log_weights, means, precisions_cholesky, covariance_type)
    n = check_int("n", n, 0, 2**60)
    seeds, seed = split_seed(seed, means.device, batch[0] if len(batch) == 1 else None)
    with torch.no_grad():
        p = precisions_cholesky.detach()
        diagonal = p.diagonal(dim1=-2, dim2=-1) if covariance_type in ("full", "tied") else p
        if covariance_type == "tied":
            diagonal = diagonal[..., None, :]
        dead = (diagonal == 0).any(-1) if covariance_type != "spherical" else diagonal == 0
        weights = torch.where(dead, -torch.inf, log_weights.detach().double())
        cdf = weights.softmax(-1).cumsum(-1)
        cdf = cdf / cdf[..., -1:]  # exactly 1 from the last component with weight on
        return _sample_op(means.detach(), p, cdf, seeds, n, seed, covariance_type)


def gmm_score(x, log_weights, means, precisions_cholesky, covariance_type="full"):
    r"""The score of a Gaussian mixture in closed form: an exact score model, differentiable.

    ``s_i = grad_x log p(x_i) = sum_k r_ik P_k P_k^T (means[k] - x_i)`` with the responsibilities ``r_ik``.

    Arguments and errors as in :func:`gmm_log_prob`.

    Returns: ``[..., n, d]`` over the whole broadcast batch. 0 for rows whose log-density is ``-inf``; NaN for a row
    with a NaN. Nothing of size ``n k`` is held; the derivative of the score, in plain torch, holds ``n k d`` numbers.

    Source: Hyvarinen, "Estimation of non-normalized statistical models by score matching", JMLR 2005.

    >>> s = gmm_score(torch.randn(5, 2), torch.zeros(1), torch.zeros(1, 2), torch.ones(1), "spherical")
    """
    lp = gmm.gmm_log_prob(x, log_weights, means, precisions_cholesky, covariance_type)
    return gmm.gradients(lp, x, log_weights, means, precisions_cholesky, covariance_type)


def smoothed_precisions(precisions_cholesky, covariance_type, noise_std):
    """P' with P' P'^T = (Sigma + noise_std^2 I)^-1, where P P^T = Sigma^-1. Neither P nor Sigma is inverted."""
    p = precisions_cholesky.double()
    variance = torch.as_tensor(noise_std, dtype=torch.float64, device=p.device).square()
    variance = variance[(..., *(None,) * gmm._TRAILING[covariance_type])]
    if covariance_type in ("diag", "spherical"):
        smoothed = p / (1 + variance * p.square()).sqrt()
    else:
        p = p.triu()
        eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        lower, _ = torch.linalg.cholesky_ex(eye + variance * (p.mT @ p))
        smoothed = torch.linalg.solve_triangular(lower.mT, p, upper=True, left=False)
    return smoothed.to(precisions_cholesky.dtype)


def gmm_posterior_mean(y, log_weights, means, precisions_cholesky, covariance_type="full", *, noise_std):
    r"""The clean row behind a noisy one: ``E[x | y]`` for ``y = x + noise_std * normal``, x from the mixture.

    ``E[x | y] = y + noise_std^2 grad_y log p(y)``, p the mixture with covariances ``Sigma_k + noise_std^2 I``
    (Tweedie's formula): the denoiser with the least mean squared error.

    Args:
        y: ``[..., n, d]``.
        log_weights, means, precisions_cholesky, covariance_type: the mixture of the clean rows, as in
            :func:`gmm_log_prob`.
        noise_std: the noise's standard deviation, in units of y: a number, or a tensor ``[...]`` that broadcasts with
            the leading dimensions (one per mixture, not per row). Not negative.

    Returns: ``[..., n, d]``, differentiable in everything. A row whose density underflows comes back as it is.

    Errors: as :func:`gmm_log_prob`; ``ValueError`` for a negative ``noise_std``.

    Source: Efron, "Tweedie's formula and selection bias", JASA 2011; Zoran and Weiss, ICCV 2011, for image patches.

    >>> mixture = torch.zeros(1), torch.zeros(1, 2), torch.ones(1), "spherical"
    >>> x = gmm_posterior_mean(torch.randn(5, 2), *mixture, noise_std=0.1)
    """
    check_tensor("y", y)
    check_floating("y", y)
    check_tensor("precisions_cholesky", precisions_cholesky)
    gmm.check_covariance_type(covariance_type)
    if isinstance(noise_std, torch.Tensor):
        std = noise_std.to(y.dtype)
    else:
        if not noise_std >= 0:
            raise ValueError(f"noise_std must not be negative, got {noise_std}")
        std = torch.tensor(float(noise_std), dtype=y.dtype, device=y.device)
    smoothed = smoothed_precisions(precisions_cholesky, covariance_type, std)
    return y + std[..., None, None].square() * gmm_score(y, log_weights, means, smoothed, covariance_type)
