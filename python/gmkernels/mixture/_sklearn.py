"""What the estimator takes of scikit-learn beyond its public API, all in this file."""

import inspect
import warnings

import numpy as np
from sklearn import config_context
from sklearn.mixture import GaussianMixture as Parent
from sklearn.utils.validation import _check_sample_weight, validate_data

FLOATS = [np.float64, np.float32]


def check_parameters(estimator):
    """Every parameter against ``_parameter_constraints``."""
    estimator._validate_params()


def check_array(estimator, X, *, reset, least_rows=1, finite=True):
    """X as a float array, NaN allowed; n_features_in_ and feature_names_in_ set (reset) or compared."""
    with config_context(array_api_dispatch=False):
        return validate_data(estimator, X, reset=reset, dtype=FLOATS, ensure_min_samples=least_rows,
                             ensure_all_finite="allow-nan" if finite else False)


def check_weights(sample_weight, X, all_zero=False):
    """One not negative number per row, not all zero unless that is allowed."""
    allow = "allow_all_zero_weights"
    more = {allow: True} if all_zero and allow in inspect.signature(_check_sample_weight).parameters else {}
    with config_context(array_api_dispatch=False):
        weights = _check_sample_weight(sample_weight, X, dtype=X.dtype, ensure_non_negative=True, **more)
    if not all_zero and not weights.any():  # scikit-learn 1.7 and older let it pass
        raise ValueError("Sample weights must contain at least one non-zero number.")
    return weights


def check_start(estimator, d, dtype):
    """weights_init, means_init, precisions_init as arrays or None; the estimator's own stay as they are."""
    given = {name: getattr(estimator, name) for name in ("weights_init", "means_init", "precisions_init")}
    if all(value is None for value in given.values()):
        return None, None, None
    checked = Parent(estimator.n_components, covariance_type=estimator.covariance_type, **given)
    more = {"xp": np} if "xp" in inspect.signature(checked._check_parameters).parameters else {}
    with config_context(array_api_dispatch=False):
        checked._check_parameters(np.empty((0, d), dtype), **more)
    return tuple(getattr(checked, name) for name in given)


class Report:
    """scikit-learn's messages for ``verbose``."""

    def __init__(self, estimator):
        self._e = estimator

    def begin(self, init):
        self._e._print_verbose_msg_init_beg(init)

    def iteration(self, n_iter, change):
        self._e._print_verbose_msg_iter_end(n_iter, change)

    def end(self, lower_bound, converged):
        more = (converged,) if len(inspect.signature(self._e._print_verbose_msg_init_end).parameters) > 1 else ()
        with warnings.catch_warnings():
            self._e._print_verbose_msg_init_end(lower_bound, *more)
        for name in ("_init_prev_time", "_iter_prev_time"):
            self._e.__dict__.pop(name, None)
