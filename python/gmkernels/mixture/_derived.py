"""Mixtures derived from a fitted one: of some features, given the others."""

import math
import numbers
from collections.abc import Mapping

import numpy as np
import torch
from sklearn.base import clone

from .._factors import cholesky_of_precisions, covariances_of, factors_of_scale_tril
from . import _missing


def _index(estimator, feature):
    """The number of a feature, given by number or by name."""
    if isinstance(feature, str):
        names = getattr(estimator, "feature_names_in_", None)
        if names is None:
            raise ValueError(f"feature {feature!r} is a name, but the mixture was fitted without feature names")
        found = np.flatnonzero(names == feature)
        if not len(found):
            raise ValueError(f"feature {feature!r} is none of those seen in fit: {', '.join(map(repr, names))}")
        return int(found[0])
    d = estimator.n_features_in_
    if not isinstance(feature, numbers.Integral) or isinstance(feature, bool) or not 0 <= feature < d:
        raise ValueError(f"a feature must be a name or a number from 0 to {d - 1}, got {feature!r}")
    return int(feature)


def _features(estimator, given):
    index = [_index(estimator, feature) for feature in given]
    if len(set(index)) < len(index):
        raise ValueError(f"features must differ, got {list(given)}")
    return index


def _made(estimator, features, weights, means, covariances, factors):
    """A fitted mixture of the features; the parameters are float64 tensors."""
    made = clone(estimator).set_params(weights_init=None, means_init=None, precisions_init=None)
    dtype = estimator.means_.dtype
    made.weights_, made.means_ = weights.numpy().astype(dtype), means.numpy().astype(dtype)
    made.covariances_ = covariances.numpy().astype(dtype)
    made.precisions_cholesky_ = factors.numpy().astype(dtype)
    full = estimator.covariance_type in ("full", "tied")
    made.precisions_ = (factors @ factors.mT if full else factors**2).numpy().astype(dtype)
    made.component_status_ = np.zeros(len(weights), np.uint8)
    made.n_features_in_ = len(features)
    if hasattr(estimator, "feature_names_in_"):
        made.feature_names_in_ = estimator.feature_names_in_[features]
    made.converged_, made.n_iter_ = estimator.converged_, estimator.n_iter_
    made.lower_bound_, made.lower_bounds_ = -math.inf, []  # it was not fitted to rows
    made._torch_device = estimator._torch_device
    return made


def marginal(estimator, features):
    index = _features(estimator, [features] if isinstance(features, (str, numbers.Integral)) else list(features))
    if not index:
        raise ValueError("features must hold at least one feature")
    p = estimator._parameters("cpu", torch.float64)
    covariances, kind = p.covariances, estimator.covariance_type
    if kind in ("full", "tied"):
        covariances = covariances_of(p.precisions_cholesky, kind)[..., index, :][..., index]
        factors = factors_of_scale_tril(torch.linalg.cholesky(covariances))
    else:
        covariances = covariances[:, index] if kind == "diag" else covariances
        factors = p.precisions_cholesky[:, index] if kind == "diag" else p.precisions_cholesky
    return _made(estimator, index, p.weights, p.means[:, index], covariances, factors)


def condition(estimator, values):
    if not isinstance(values, Mapping):
        raise TypeError(f"values must be a dict of features and their values, got {type(values).__name__}")
    known = _features(estimator, values)
    numbers_ = np.asarray(list(values.values()), dtype=np.float64)
    if numbers_.shape != (len(known),) or not np.isfinite(numbers_).all():
        raise ValueError(f"the values of features must be finite numbers, got {values}")
    rest = [i for i in range(estimator.n_features_in_) if i not in known]
    if not rest:
        raise ValueError("condition needs at least one feature that is not given; score_samples has the density")
    p, kind = estimator._parameters("cpu", torch.float64), estimator.covariance_type
    row = torch.full((1, estimator.n_features_in_), math.nan, dtype=torch.float64)
    row[0, known] = torch.from_numpy(numbers_)
    means, covariances = p.means[:, rest], p.covariances
    weights = _missing.responsibilities(row, p)[0] if known else p.weights
    if kind in ("full", "tied"):
        precisions = p.precisions_cholesky @ p.precisions_cholesky.mT
        own = precisions[..., rest, :]
        factors = cholesky_of_precisions(own[..., rest], kind)
        if known:
            means = means - torch.linalg.solve(
                own[..., rest], own[..., known] @ (row[0, known] - p.means[:, known])[..., None])[..., 0]
        covariances = covariances_of(factors, kind)
    elif kind == "diag":
        covariances, factors = covariances[:, rest], p.precisions_cholesky[:, rest]
    else:
        factors = p.precisions_cholesky
    return _made(estimator, rest, weights, means, covariances, factors)
