"""Covariances, precisions and the factor P of the mixtures: (P P^T)^-1 = Sigma, P upper triangular."""

import torch


def cholesky_of_precisions(precisions, covariance_type):
    """Upper triangular P with P P^T = precisions: the Cholesky factor of the matrix read backwards."""
    if covariance_type in ("diag", "spherical"):
        return precisions.sqrt()
    return torch.linalg.cholesky(precisions.flip(-1, -2)).flip(-1, -2)


def factors_of_scale_tril(lower):
    """P = L^-T for Sigma = L L^T."""
    return torch.linalg.solve_triangular(lower, torch.eye(lower.shape[-1]).to(lower), upper=False).mT


def covariances_of(factors, covariance_type):
    """(P P^T)^-1; what lies below the diagonal of P is not read."""
    if covariance_type in ("diag", "spherical"):
        return 1 / factors**2
    inverse = torch.linalg.solve_triangular(factors, torch.eye(factors.shape[-1]).to(factors), upper=True)
    return inverse.mT @ inverse
