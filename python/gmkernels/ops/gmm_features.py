"""Gaussian mixtures of some features: their marginal, what they say of the others, rows that lack some."""

import math

import torch

from .. import _patterns
from .._call import check_floating, check_int, check_same_dtype, check_tensor
from .._factors import cholesky_of_precisions, covariances_of, factors_of_scale_tril
from . import gmm
from .gmm import GmmArguments


def gmm_marginal(features, log_weights, means, precisions_cholesky, covariance_type="full"):
    r"""The mixture of some of the features: ``p(x_f) = sum_k w_k N(x_f; mu_f, Sigma_ff)``.

    Args:
        features: their numbers, from 0 to d - 1, all different, in the order that is wanted.
        log_weights, means, precisions_cholesky, covariance_type: as in :func:`gmm_log_prob`.

    Returns: ``GmmArguments`` of the same covariance_type, with ``d = len(features)``; differentiable, in plain torch.
    The log_weights are those given.

    Errors: ``ValueError`` for shapes and features, ``TypeError`` for dtypes.

    Source: Bishop, Pattern Recognition and Machine Learning, 2006, equation 2.98.

    >>> mixture = torch.zeros(1), torch.zeros(1, 3), torch.eye(3)[None]
    >>> lp = gmm_log_prob(torch.randn(5, 2), *gmm_marginal([0, 2], *mixture))
    """
    gmm.check_mixture(log_weights, means, precisions_cholesky, covariance_type)
    index = _index(features, means)
    p = _wide(precisions_cholesky)
    if covariance_type in ("full", "tied"):
        covariances = covariances_of(p.triu(), covariance_type)[..., index, :][..., index]
        p = factors_of_scale_tril(torch.linalg.cholesky(covariances))
    elif covariance_type == "diag":
        p = p[..., index]
    return GmmArguments(log_weights, means[..., index], p.to(means.dtype))


def gmm_condition(given, features, log_weights, means, precisions_cholesky, covariance_type="full"):
    r"""The mixture of the other features, given some: one mixture for every row of ``given``.

    With o the features that are given, m the others and ``A_k = P_k P_k^T``:

    ``log w'_k = log w_k + log N(g; mu_o, Sigma_oo) - log sum_j w_j N(g; mu_o, Sigma_oo)``,
    ``mu'_k = mu_m - A_mm^-1 A_mo (g - mu_o)``, ``A'_k = A_mm``.

    Args:
        given: ``[..., n, len(features)]``, the values.
        features: which those are: their numbers, from 0 to d - 1, all different; not all of them.
        log_weights, means, precisions_cholesky, covariance_type: as in :func:`gmm_log_prob`; leading dimensions
            broadcast.

    Returns: ``GmmArguments`` with the leading dimensions ``[..., n]``, so that ``x`` of :func:`gmm_log_prob` and the
    other ops is ``[..., n, rows, d - len(features)]``; the factors, which do not depend on the values, have 1 in the
    place of n. The features keep their order. Normalised, differentiable, in plain torch. A row with NaN gives NaN.

    Errors: ``ValueError`` for shapes and features, ``TypeError`` for dtypes.

    Source: Bishop, Pattern Recognition and Machine Learning, 2006, equations 2.73, 2.75 and 2.96.

    >>> mixture = torch.zeros(1), torch.zeros(1, 3), torch.eye(3)[None]
    >>> rest = gmm_condition(torch.randn(5, 1), [1], *mixture)
    >>> x, component = gmm_sample(10, *rest, seed=0)
    """
    check_tensor("given", given)
    check_floating("given", given)
    gmm.check_mixture(log_weights, means, precisions_cholesky, covariance_type)
    check_same_dtype("means", means, given=given)
    index = _index(features, means)
    d, dtype = means.shape[-1], means.dtype
    rest = [i for i in range(d) if i not in index]
    if not rest:
        raise ValueError(f"features must leave at least one of the {d} features, got all of them")
    if given.dim() < 2 or given.shape[-1] != len(index):
        raise ValueError(f"given must be [..., n, {len(index)}], as there are {len(index)} features, got"
                         f" {tuple(given.shape)}")
    gmm._batch(means.new_empty((*given.shape[:-1], d)), log_weights, means, precisions_cholesky, covariance_type)
    given, log_weights, means, p = map(_wide, (given, log_weights, means, precisions_cholesky))
    marginal = gmm_marginal(index, log_weights, means, p, covariance_type)
    distance = given[..., None, :] - marginal.means[..., None, :, :]  # [..., n, k, o]
    q, shifted = marginal.precisions_cholesky, means[..., None, :, rest].expand(*distance.shape[:-1], len(rest))
    if covariance_type in ("full", "tied"):
        tied = covariance_type == "tied"
        p, q = (p.triu()[..., None, :, :], q[..., None, :, :]) if tied else (p.triu(), q)
        own = p[..., rest, :]
        precisions = own @ own.mT
        pull = torch.linalg.solve(precisions, own @ p[..., index, :].mT)  # [..., k, m, o]
        shifted = shifted - (pull[..., None, :, :, :] @ distance[..., None])[..., 0]
        factors = cholesky_of_precisions(precisions, covariance_type)
        factors = factors[..., 0, :, :] if tied else factors
        z = (distance[..., None, :] @ q[..., None, :, :, :])[..., 0, :]
        log_det = q.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    else:
        q = q if covariance_type == "diag" else q[..., None].expand(marginal.means.shape)
        z, log_det = distance * q[..., None, :, :], q.abs().log().sum(-1)
        factors = p[..., rest] if covariance_type == "diag" else p
    log_prob = log_det[..., None, :] - 0.5 * (z.square().sum(-1) + len(index) * math.log(2 * math.pi))
    log_weights = (log_weights[..., None, :] + log_prob).log_softmax(-1)
    factors = factors[(..., None, *(slice(None),) * gmm._TRAILING[covariance_type])]
    return GmmArguments(log_weights.to(dtype), shifted.to(dtype), factors.to(dtype))


def gmm_impute(x, log_weights, means, precisions_cholesky, covariance_type="full"):
    r"""``x`` with its NaN replaced by their expectation, given what the row has: ``E[x_m | x_o]``.

    The rows of a pattern (the same features missing) are one group: a factorisation for each, not for each row.

    Args:
        x: ``[..., n, d]``.
        log_weights, means, precisions_cholesky, covariance_type: as in :func:`gmm_log_prob`; leading dimensions
            broadcast.

    Returns: ``[..., n, d]`` over the whole broadcast batch, what was there unchanged; a row of NaN only gets the mean
    of the mixture. Differentiable in everything, in plain torch and float64. An infinity in a row makes what it lacks
    NaN.

    Errors: as :func:`gmm_log_prob`.

    Source: Ghahramani and Jordan, "Supervised learning from incomplete data via an EM approach", 1994.

    >>> mixture = torch.zeros(1), torch.zeros(1, 2), torch.ones(1), "spherical"
    >>> x = gmm_impute(torch.tensor([[1.0, math.nan]]), *mixture)
    """
    check_tensor("x", x)
    check_floating("x", x)
    gmm.check_mixture(log_weights, means, precisions_cholesky, covariance_type)
    check_same_dtype("x", x, means=means)
    batch = gmm._batch(x, log_weights, means, precisions_cholesky, covariance_type)
    trailing = 2, 1, 2, gmm._TRAILING[covariance_type]
    whole = [t.expand(*batch, *t.shape[t.dim() - m :]).flatten(0, len(batch) - 1) if batch else t[None]
             for t, m in zip((x, log_weights, means, precisions_cholesky), trailing, strict=True)]
    done = [_patterns.impute(one, _patterns.Mixture(*mixture, covariance_type))
            for one, *mixture in zip(*whole, strict=True)]
    return torch.stack(done).reshape(*batch, *x.shape[-2:]) if done else x.new_empty((*batch, *x.shape[-2:]))


def _wide(t):
    """Half precision has no matrix decompositions."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _index(features, means):
    d = means.shape[-1]
    index = [check_int("features", f, 0, d) for f in features]
    if not index or len(set(index)) < len(index):
        raise ValueError(f"features must be different numbers from 0 to {d - 1}, at least one, got {list(features)}")
    return index
