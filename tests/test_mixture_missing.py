"""Missing values: exact EM beside a plain row-by-row form, marginal densities, imputation and its numbers."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.impute import KNNImputer
from sklearn.model_selection import train_test_split

from gmkernels import GaussianMixture, _patterns
from mixture_data import TYPES, holes, quiet, rows, same_fit

X = rows()
Y = holes(X, 0.3)
LOST = np.isnan(Y)


def matrices(gm):
    """The covariances as [k, d, d]."""
    k, d = gm.means_.shape
    kind, c = gm.covariance_type, gm.covariances_
    return {"full": lambda: c, "tied": lambda: np.stack([c] * k), "diag": lambda: np.stack([np.diag(v) for v in c]),
            "spherical": lambda: np.stack([v * np.eye(d) for v in c])}[kind]()


def plain(weights, means, covariances, row):
    """log density of every component [k], conditional means [k, d], conditional covariances [k, d, d] of one row."""
    o, m = ~np.isnan(row), np.isnan(row)
    log_prob, filled, spread = [], [], []
    for w, mu, S in zip(weights, means, covariances, strict=True):
        log_prob.append(np.log(w) + (multivariate_normal.logpdf(row[o], mu[o], S[np.ix_(o, o)]) if o.any() else 0.0))
        x, C = np.where(o, row, mu), np.zeros_like(S)
        if m.any():
            gain = S[np.ix_(m, o)] @ np.linalg.inv(S[np.ix_(o, o)]) if o.any() else np.zeros((m.sum(), 0))
            x[m] += gain @ (row[o] - mu[o])
            C[np.ix_(m, m)] = S[np.ix_(m, m)] - gain @ S[np.ix_(o, m)]
        filled.append(x)
        spread.append(C)
    return np.array(log_prob), np.array(filled), np.array(spread)


def plain_iteration(kind, weights, means, covariances, data, sample_weight, reg=1e-6):
    k, d = means.shape
    r, xs, Cs = [], [], []
    for row, w in zip(data, sample_weight, strict=True):
        lp, x, C = plain(weights, means, covariances, row)
        r.append(w * np.exp(lp - logsumexp(lp)))
        xs.append(x)
        Cs.append(C)
    r, xs, Cs = np.array(r), np.array(xs), np.array(Cs)
    nk = r.sum(0)
    mu = np.einsum("nk,nkd->kd", r, xs) / nk[:, None]
    t = xs - mu
    S = (np.einsum("nk,nka,nkb->kab", r, t, t) + np.einsum("nk,nkab->kab", r, Cs)) / nk[:, None, None]
    if kind == "tied":
        S = np.stack([(S * nk[:, None, None]).sum(0) / nk.sum()] * k)
    elif kind == "diag":
        S = np.stack([np.diag(np.diag(s)) for s in S])
    elif kind == "spherical":
        S = np.stack([np.trace(s) / d * np.eye(d) for s in S])
    return nk / nk.sum(), mu, S + reg * np.eye(d)


START = dict(weights_init=[0.3, 0.7], means_init=X[[0, 5]])


def start(kind, d=3):
    return dict(START, precisions_init={"full": [np.eye(d)] * 2, "tied": np.eye(d), "diag": np.ones((2, d)),
                                        "spherical": np.ones(2)}[kind], n_components=2, covariance_type=kind)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_em(covariance_type, weighted):
    w = np.random.RandomState(0).rand(len(Y)) if weighted else np.ones(len(Y))
    gm = GaussianMixture(**start(covariance_type), max_iter=4, tol=0.0)
    with quiet():
        gm.fit(Y, sample_weight=w if weighted else None)
    p = np.array(START["weights_init"]), START["means_init"], np.stack([np.eye(3)] * 2)
    bounds = []
    for _ in range(4):
        bounds.append(np.average([logsumexp(plain(*p, row)[0]) for row in Y], weights=w))
        p = plain_iteration(covariance_type, *p, Y, w)
    np.testing.assert_allclose(gm.lower_bounds_, bounds, rtol=1e-11)
    for got, want in zip((gm.weights_, gm.means_, matrices(gm)), p, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_the_likelihood_rises(covariance_type):
    with quiet():
        gm = GaussianMixture(3, covariance_type=covariance_type, random_state=0, tol=0, max_iter=12).fit(Y)
    assert (np.diff(gm.lower_bounds_) > -1e-9).all()
    assert gm.score(Y) >= gm.lower_bounds_[-1] - 1e-9


@pytest.mark.parametrize("covariance_type", TYPES)
def test_use(covariance_type):
    """Densities, responsibilities and expectations given what is known; the order of rows does not matter."""
    gm = GaussianMixture(3, covariance_type=covariance_type, random_state=0).fit(X)
    parts = [plain(gm.weights_, gm.means_, matrices(gm), row) for row in Y]
    lp = np.array([part[0] for part in parts])
    r = np.exp(lp - logsumexp(lp, axis=1, keepdims=True))
    np.testing.assert_allclose(gm.score_samples(Y), logsumexp(lp, axis=1), rtol=1e-10)
    np.testing.assert_allclose(gm.predict_proba(Y), r, atol=1e-10)
    np.testing.assert_array_equal(gm.predict(Y), r.argmax(1))
    want = np.where(LOST, np.einsum("nk,nkd->nd", r, np.array([part[1] for part in parts])), X)
    np.testing.assert_allclose(gm.impute(Y), want, rtol=1e-10)
    assert (gm.impute(Y)[~LOST] == X[~LOST]).all() and np.isnan(Y).sum() == LOST.sum()
    np.testing.assert_array_equal(gm.impute(X), X)
    turned = np.random.RandomState(1).permutation(len(Y))
    np.testing.assert_allclose(gm.impute(Y[turned]), gm.impute(Y)[turned], rtol=1e-12)


def test_small_batches(monkeypatch):
    """Many patterns, patterns of many rows: cut into batches of a few."""
    gm, want = GaussianMixture(3, random_state=0).fit(X), None
    many, one = Y[:40], np.where(np.arange(3) == 1, np.nan, X[:40])
    for limits in ((1 << 20, 256), (20, 256), (1, 1), (50, 7)):
        monkeypatch.setattr(_patterns, "_MATRICES", limits[0])
        monkeypatch.setattr(_patterns, "_ROWS", limits[0])
        monkeypatch.setattr(_patterns, "_SLOT", limits[1])
        got = np.vstack([gm.impute(many), gm.impute(one)])
        want = got if want is None else want
        np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_draws(covariance_type):
    """Moments of many draws are the conditional ones."""
    gm = GaussianMixture(2, covariance_type=covariance_type, random_state=3).fit(X)
    row = np.array([[np.nan, X[0, 1], np.nan]])
    draws = gm.impute(row, n_draws=4000)
    assert draws.shape == (4000, 1, 3) and (draws[:, 0, 1] == X[0, 1]).all()
    lp, x, C = plain(gm.weights_, gm.means_, matrices(gm), row[0])
    r = np.exp(lp - logsumexp(lp))
    mean = r @ x
    covariance = np.einsum("k,kab->ab", r, C) + np.einsum("k,ka,kb->ab", r, x - mean, x - mean)
    lost = [0, 2]
    scale = np.sqrt(np.diag(covariance)[lost])
    assert (np.abs(draws[:, 0, lost].mean(0) - mean[lost]) < 5 * scale / np.sqrt(4000)).all()
    np.testing.assert_allclose(np.cov(draws[:, 0, lost].T), covariance[np.ix_(lost, lost)],
                               atol=0.12 * scale.max() ** 2)
    np.testing.assert_array_equal(gm.impute(Y, n_draws=3), gm.impute(Y, n_draws=3))  # random_state is an int
    assert (gm.impute(Y, n_draws=2)[0] != gm.impute(Y, n_draws=2)[1]).sum() == LOST.sum()
    with pytest.raises(ValueError, match="n_draws must be None or an int of at least 1, got 0"):
        gm.impute(Y, n_draws=0)


@pytest.mark.parametrize("covariance_type", ["full", "tied"])
def test_draws_are_correlated(covariance_type):
    S = np.array([[1.0, 0.0, 2.7], [0.0, 1.0, 0.0], [2.7, 0.0, 9.0]])
    P = np.linalg.inv(S)
    gm = GaussianMixture(weights_init=[1.0], means_init=[[0.0, 0.0, 0.0]], covariance_type=covariance_type, max_iter=0,
                         precisions_init=P if covariance_type == "tied" else [P], random_state=0).fit(X)
    draws = gm.impute(np.full((2, 3), np.nan), n_draws=4000)
    for row in (0, 1):
        np.testing.assert_allclose(np.cov(draws[:, row].T), S, atol=0.5)
    assert np.abs(np.corrcoef(draws[:, 0].T, draws[:, 1].T)[:3, 3:]).max() < 0.1  # of different rows: none


def test_empty_rows_and_columns():
    """A row without any entry counts nowhere, has log-density 0 and is imputed by the mean; a column is refused."""
    none = np.full((5, 3), np.nan)
    with quiet():
        a = GaussianMixture(2, random_state=0).fit(np.vstack([none, Y, none]))
        b = GaussianMixture(2, random_state=0).fit(Y)
    same_fit(a, b, rtol=1e-10)
    np.testing.assert_allclose(a.score_samples(none), 0.0, atol=1e-12)
    np.testing.assert_allclose(a.impute(none), np.stack([a.weights_ @ a.means_] * 5))
    np.testing.assert_allclose(a.predict_proba(none), np.stack([a.weights_] * 5))
    column = Y.copy()
    column[:, 1] = np.nan
    with pytest.raises(ValueError, match=r"Input X has features without any observed value: \[1\]"):
        GaussianMixture(2).fit(column)
    weights = np.where(np.isnan(Y[:, 1]), 1.0, 0.0)  # only rows that lack it count
    with pytest.raises(ValueError, match=r"Input X has features without any observed value: \[1\]"):
        GaussianMixture(2).fit(Y, sample_weight=weights)
    with pytest.raises(ValueError, match=r"features without any observed value: \[0, 1, 2\]"):
        GaussianMixture().fit(none)
    with pytest.raises(ValueError, match="Expected n_samples >= n_components but got n_components = 3, n_samples = 2"):
        GaussianMixture(3).fit(np.vstack([none, X[:2]]))


def test_no_complete_row():
    lacks = np.where(np.arange(3) == np.arange(len(X))[:, None] % 3, np.nan, X)
    with quiet():
        gm = GaussianMixture(2, random_state=0).fit(lacks)
    assert np.isfinite(gm.score_samples(lacks)).all() and not np.isnan(gm.impute(lacks)).any()


def test_weight_of_nothing():
    """Rows of weight 0 may hold anything."""
    w = np.r_[np.ones(100), np.zeros(20)]
    with quiet():
        same_fit(GaussianMixture(2, random_state=0).fit(Y, sample_weight=w),
                 GaussianMixture(2, random_state=0).fit(Y[:100]), rtol=1e-9)


def test_kinds():
    x = torch.from_numpy(Y).float()
    with quiet():
        gm = GaussianMixture(2, random_state=0, max_iter=8).fit(x)
    full = gm.impute(x)
    assert full.dtype == torch.float32 and not full.isnan().any()
    assert gm.impute(x, n_draws=2).shape == (2, *x.shape) and gm.means_.dtype == np.float32
    with quiet():
        wide = GaussianMixture(2, random_state=0, max_iter=8).fit(x.double())
    np.testing.assert_allclose(gm.means_, wide.means_, rtol=1e-3)


@pytest.mark.parametrize("init_params", ["kmeans", "k-means++", "random", "random_from_data"])
def test_starts(init_params):
    with quiet():
        gm = GaussianMixture(3, init_params=init_params, random_state=0, n_init=2, max_iter=8).fit(holes(X, 0.1))
    assert np.isfinite(gm.lower_bound_)


def test_nearly_singular():
    """Columns that are copies of each other: the factorisation gets by."""
    twice = np.hstack([Y, Y[:, :1] * 2, X[:, :1]])
    for kind in TYPES:
        with quiet():
            gm = GaussianMixture(2, covariance_type=kind, random_state=0, reg_covar=1e-12, max_iter=10).fit(twice)
        full = gm.impute(twice)
        assert np.isfinite(full).all() and np.isfinite(gm.score_samples(twice)).all()
        if kind == "full":
            np.testing.assert_allclose(full[:, 0], X[:, 0], atol=1e-3)
        assert np.isfinite(gm.impute(twice, n_draws=2)).all()


def held_out_error(load, seed, gm):
    """Fit on 70 % of the rows, complete; 20 % of the entries of the rest, at random, are lost: RMSE in units of the
    standard deviations of the training rows."""
    train, test = train_test_split(load().data, test_size=0.3, random_state=seed)
    train, test = (train - train.mean(0)) / train.std(0), (test - train.mean(0)) / train.std(0)
    lost = np.random.RandomState(seed).rand(*test.shape) < 0.2
    given = np.where(lost, np.nan, test)
    return [np.sqrt(np.mean((full - test)[lost] ** 2))
            for full in (gm.fit(train).impute(given), KNNImputer().fit(train).transform(given))]


@pytest.mark.parametrize("load, most", [
    pytest.param(load_breast_cancer, 0.36, id="breast_cancer", marks=pytest.mark.slow),
    pytest.param(load_wine, 0.70, id="wine"),
])
def test_imputation_error(load, most):
    errors = np.mean([held_out_error(load, seed, GaussianMixture(3, covariance_type="tied", random_state=0))
                      for seed in range(8)], axis=0)
    print(errors)
    assert errors[0] <= most
