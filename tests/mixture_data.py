"""What the tests of the estimator share: overlapping data, comparison of fits."""

import warnings
from contextlib import contextmanager

import numpy as np
from sklearn.exceptions import ConvergenceWarning

TYPES = ("full", "tied", "diag", "spherical")
LEARNED = ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_")


def rows(n=120, d=3, seed=0, spread=2.0):
    """Three clusters that overlap, correlated, away from the origin."""
    rng = np.random.RandomState(seed)
    centres = spread * rng.randn(3, d)
    mix = rng.randn(d, d) / d + np.eye(d)
    return (centres[rng.randint(3, size=n)] + rng.randn(n, d)) @ mix + 5.0


def holes(X, share=0.2, seed=0):
    """X with that share of NaN; no row of NaN only."""
    rng = np.random.RandomState(seed)
    lost = rng.rand(*X.shape) < share
    lost[lost.all(1), 0] = False
    return np.where(lost, np.nan, X)


@contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def same_fit(a, b, rtol=1e-8):
    """Two fits with the same path and parameters."""
    assert (a.n_iter_, a.converged_) == (b.n_iter_, b.converged_)
    np.testing.assert_allclose(a.lower_bound_, b.lower_bound_, rtol=rtol)
    for name in LEARNED:
        x, y = getattr(a, name), getattr(b, name)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max(), err_msg=name)
