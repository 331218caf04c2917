"""Mixtures derived from a fitted one: of some features, given the others."""

import math
import numbers
from collections.abc import Mapping

import numpy as np
import torch
from sklearn.base import clone

from .. import ops
from .._factors import covariances_of


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


def _made(estimator, features, weights, mixture):
    """A fitted mixture of the features; weights and mixture are float64 tensors."""
    means, factors = mixture.means, mixture.precisions_cholesky
    covariances = covariances_of(factors, estimator.covariance_type)
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
    return _made(estimator, index, p.weights, ops.gmm_marginal(index, *p.arguments, p.covariance_type))


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
    p = estimator._parameters("cpu", torch.float64)
    if not known:
        return marginal(estimator, rest)
    of_rows = ops.gmm_condition(torch.from_numpy(numbers_)[None], known, *p.arguments, p.covariance_type)
    made = ops.GmmArguments(*(t[0] for t in of_rows))
    return _made(estimator, rest, made.log_weights.exp(), made)
