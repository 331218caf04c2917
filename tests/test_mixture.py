"""gmkernels.GaussianMixture beside scikit-learn's: fits, weights, kinds of input, bad input."""

import numpy as np
import pytest
import sklearn.mixture
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import check_estimator

import gmkernels
from gmkernels import GaussianMixture
from gmkernels.mixture import _rows
from mixture_data import LEARNED, TYPES, quiet, rows, same_fit

Peer = sklearn.mixture.GaussianMixture
X = rows()
STARTS = ("kmeans", "k-means++", "random", "random_from_data")


def both(x=X, **params):
    with quiet():
        return Peer(**params).fit(x), GaussianMixture(**params).fit(x)


# beside scikit-learn --------------------------------------------------------------------------------------------------


def test_loads_on_first_use():
    """That `import gmkernels` loads no scikit-learn is in test_build.py."""
    assert {"GaussianMixture", "mixture", "ops"} <= set(dir(gmkernels))
    assert gmkernels.GaussianMixture is gmkernels.mixture.GaussianMixture
    with pytest.raises(AttributeError, match="no attribute 'gaussian'"):
        gmkernels.gaussian  # noqa: B018


def test_is_scikit_learns():
    gm = GaussianMixture(3, tol=0.1)
    assert isinstance(gm, Peer)
    theirs = Peer(3, tol=0.1).get_params()
    assert {**theirs, "device": "auto", "allow_tf32": False} == gm.get_params() == clone(gm).get_params()


@pytest.mark.parametrize("init_params", STARTS)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_same_fit(covariance_type, init_params):
    peer, ours = both(n_components=3, covariance_type=covariance_type, init_params=init_params, random_state=1,
                      max_iter=12)
    same_fit(ours, peer)
    if hasattr(peer, "lower_bounds_"):  # not in scikit-learn 1.6; test_same_start says why 1e-6
        np.testing.assert_allclose(ours.lower_bounds_, peer.lower_bounds_, rtol=1e-6)
    np.testing.assert_array_equal(ours.predict(X), peer.predict(X))
    for name, arguments in (("predict_proba", [X]), ("score_samples", [X]), ("score", [X]), ("bic", [X]), ("aic", [X])):
        np.testing.assert_allclose(getattr(ours, name)(*arguments), getattr(peer, name)(*arguments), rtol=1e-7,
                                   atol=1e-9, err_msg=name)
    for got, want in zip(ours.sample(50), peer.sample(50), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-7)


def test_same_start():
    """The first iteration, from parameters that no E-step has made yet."""
    for kind in TYPES:
        for how in STARTS:
            peer, ours = both(n_components=3, covariance_type=kind, init_params=how, random_state=2, max_iter=1)
            # A component of one row: the variance is 1e-6, to which the peer adds its rounding of x^2.
            rounds = kind in ("diag", "spherical") and how in ("k-means++", "random_from_data")
            same_fit(ours, peer, rtol=1e-5 if rounds else 1e-8)


@pytest.mark.parametrize("given", [("means_init",), ("weights_init",), ("precisions_init",),
                                   ("weights_init", "means_init", "precisions_init")])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_given_start(covariance_type, given):
    P = np.linalg.inv(np.cov(X.T))
    full = {"weights_init": [0.5, 0.3, 0.2], "means_init": X[:3],
            "precisions_init": {"full": np.stack([P, 2 * P, P]), "tied": P, "diag": np.full((3, 3), 0.3),
                                "spherical": np.full(3, 0.3)}[covariance_type]}
    start = {name: full[name] for name in given}
    peer, ours = both(n_components=3, covariance_type=covariance_type, random_state=0, max_iter=8, **start)
    same_fit(ours, peer)
    for name, value in start.items():
        assert getattr(ours, name) is value  # parameters are left as they were


def test_several_starts():
    peer, ours = both(n_components=4, init_params="random_from_data", n_init=4, random_state=0, max_iter=30)
    same_fit(ours, peer)


def test_warm_start():
    fits = []
    for kind in (Peer, GaussianMixture):
        gm = kind(3, warm_start=True, max_iter=2, random_state=0, init_params="random")
        with quiet():
            fits.append([gm.fit(X).lower_bound_ for _ in range(4)] + [gm])
    np.testing.assert_allclose(fits[0][:4], fits[1][:4], rtol=1e-10)
    same_fit(fits[1][4], fits[0][4])
    for _ in range(2):  # the change of the first iteration is that since the last fit
        for gm in (fit[4].set_params(max_iter=200) for fit in fits):
            gm.fit(X)
        same_fit(fits[1][4], fits[0][4])
    assert fits[1][4].n_iter_ == 1
    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 3 features as input"):
        fits[1][4].fit(X[:, :2])


def test_tolerance_and_iterations():
    peer, ours = both(n_components=2, tol=0.0, max_iter=5, random_state=0)
    same_fit(ours, peer)
    assert ours.n_iter_ == 5 and not ours.converged_
    with pytest.warns(ConvergenceWarning, match="Best performing initialization did not converge"):
        GaussianMixture(3, max_iter=1, tol=0.0, random_state=0).fit(X)


def test_no_iterations():
    peer, ours = both(n_components=3, max_iter=0, random_state=0, init_params="k-means++", n_init=3)
    np.testing.assert_allclose(ours.means_, peer.means_)
    assert ours.weights_.sum() == pytest.approx(1)  # scikit-learn's sum to 3 / 120
    assert (ours.n_iter_, ours.converged_, ours.lower_bound_) == (0, False, -np.inf)


def test_labels_of_the_fit():
    gm = GaussianMixture(3, random_state=0)
    np.testing.assert_array_equal(gm.fit_predict(X), gm.predict(X))


def test_messages(capsys):
    for verbose in (1, 2):
        printed = []
        for kind in (Peer, GaussianMixture):
            kind(2, verbose=verbose, verbose_interval=1, random_state=0).fit(X)
            text = capsys.readouterr().out
            printed.append([line.split("time")[0].split("\t")[0] for line in text.splitlines()])
        assert printed[0] == printed[1] and len(printed[0]) > 2


def test_progress():
    seen = []
    gm = GaussianMixture(3, random_state=0, tol=0.0, max_iter=50, n_init=2)
    gm.fit(X, callback=lambda now: seen.append(now) or len(seen) == 3)  # no warning: it was asked to stop
    assert [now.n_iter for now in seen] == [1, 2, 3] and gm.n_iter_ == 3
    assert [now.lower_bound for now in seen] == gm.lower_bounds_
    assert seen[2].change == pytest.approx(seen[2].lower_bound - seen[1].lower_bound)


def test_estimator_checks():
    """Every check that scikit-learn's own class passes, and those for sample_weight."""
    def results(estimator):
        with quiet():
            found = check_estimator(estimator, on_fail=None, on_skip=None)
        return {r["check_name"]: r["status"] for r in found}

    ours, peer = results(GaussianMixture()), results(Peer())
    wrong = {name: status for name, status in ours.items() if status not in ("passed", "skipped")}
    assert wrong == {}
    want = {name for name, status in peer.items() if status == "passed"} - {"check_estimators_nan_inf"}  # NaN is fine
    assert want <= {name for name, status in ours.items() if status == "passed"}
    assert ours["check_sample_weight_equivalence_on_dense_data"] == "passed"


# weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance_type", TYPES)
def test_weights_are_repetitions(covariance_type):
    w = np.random.RandomState(0).randint(0, 4, size=len(X))
    start = dict(n_components=3, covariance_type=covariance_type, means_init=X[:3], weights_init=[0.2, 0.3, 0.5],
                 precisions_init={"full": [np.eye(3)] * 3, "tied": np.eye(3), "diag": np.ones((3, 3)),
                                  "spherical": np.ones(3)}[covariance_type])
    with quiet():
        weighted = GaussianMixture(**start).fit(X, sample_weight=w)
        repeated = GaussianMixture(**start).fit(X.repeat(w, axis=0))
    same_fit(weighted, repeated)
    assert weighted.score(X, sample_weight=w) == pytest.approx(repeated.score(X.repeat(w, axis=0)), rel=1e-12)


@pytest.mark.parametrize("init_params", STARTS)
def test_weights_in_the_start(init_params):
    """Weights of 0 are rows that are not there; equal weights are none."""
    params = dict(n_components=3, init_params=init_params, random_state=0, max_iter=5)
    with quiet():
        some = GaussianMixture(**params).fit(X, sample_weight=np.r_[np.ones(80), np.zeros(40)])
        less = GaussianMixture(**params).fit(X[:80], sample_weight=np.ones(80))
        same_fit(some, less)
        if init_params != "random_from_data":  # weights are another way to draw
            same_fit(GaussianMixture(**params).fit(X, sample_weight=np.full(len(X), 2.0)),
                     GaussianMixture(**params).fit(X))


@pytest.mark.parametrize("covariance_type", ["full", "tied"])
@pytest.mark.parametrize("init_params", ["kmeans", "k-means++"])
def test_start_with_weights(init_params, covariance_type):
    """The M-step of scikit-learn's weighted clusters."""
    w = np.random.RandomState(0).rand(len(X)) ** 4
    gm = GaussianMixture(3, init_params=init_params, covariance_type=covariance_type, random_state=0, max_iter=0)
    gm.fit(X, sample_weight=w)
    if init_params == "kmeans":
        labels = KMeans(3, n_init=1, random_state=np.random.RandomState(0)).fit(X, sample_weight=w).labels_
        r = (labels[:, None] == np.arange(3)) * w[:, None]
    else:
        index = kmeans_plusplus(X, 3, sample_weight=w, random_state=np.random.RandomState(0))[1]
        r = (np.arange(len(X))[:, None] == index) * w[:, None]
    nk, means = r.sum(0), r.T @ X / r.sum(0)[:, None]
    np.testing.assert_allclose(gm.weights_, nk / nk.sum())
    np.testing.assert_allclose(gm.means_, means)
    if covariance_type == "tied":  # of all rows, as scikit-learn has it
        want = ((X * w[:, None]).T @ X - (nk * means.T) @ means) / nk.sum()
    else:
        t = X - means[:, None]
        want = np.einsum("nk,kna,knb->kab", r, t, t) / nk[:, None, None]
    np.testing.assert_allclose(gm.covariances_, want + 1e-6 * np.eye(3), rtol=1e-9, atol=1e-12)


def test_weights_scale_nothing():
    w = np.random.RandomState(0).rand(len(X))
    with quiet():
        a, b = (GaussianMixture(2, random_state=0).fit(X, sample_weight=f * w) for f in (1.0, 1e6))
    same_fit(a, b)


# kinds of input -------------------------------------------------------------------------------------------------------


def test_tensors_in_tensors_out():
    x = torch.from_numpy(X)
    gm, plain = GaussianMixture(3, random_state=0).fit(x), GaussianMixture(3, random_state=0).fit(X)
    same_fit(gm, plain, rtol=0)
    for name in ("predict", "predict_proba", "score_samples", "anomaly_score", "impute"):
        got, want = getattr(gm, name)(x), getattr(gm, name)(X)
        assert isinstance(got, torch.Tensor) and isinstance(want, np.ndarray)
        assert torch.equal(got, torch.from_numpy(want)), name
    assert all(isinstance(t, torch.Tensor) for t in gm.sample(3))
    assert isinstance(gm.fit_predict(x), torch.Tensor)
    assert isinstance(gm.score(x), float) and gm.bic(x) == pytest.approx(plain.bic(X))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    x = torch.from_numpy(X).cuda()
    plain = GaussianMixture(3, random_state=0).fit(X)
    gm = GaussianMixture(3, random_state=0).fit(x)
    same_fit(gm, plain)
    assert gm.predict(x).is_cuda and gm.sample(3)[0].is_cuda
    same_fit(GaussianMixture(3, random_state=0, device="cuda").fit(X), plain)
    with pytest.raises(ValueError, match="Input X contains infinity"):
        gm.predict(x / 0)


def test_tables():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(X, columns=["a", "b", "c"], index=range(100, 100 + len(X)))
    gm = GaussianMixture(2, random_state=0).fit(table)
    assert list(gm.feature_names_in_) == ["a", "b", "c"]
    same_fit(gm, GaussianMixture(2, random_state=0).fit(X), rtol=1e-12)  # a table lies column by column
    assert isinstance(gm.predict(table), np.ndarray)
    table.loc[100, "b"] = np.nan
    full = gm.impute(table)
    assert type(full) is pandas.DataFrame and full.index.equals(table.index) and list(full.columns) == ["a", "b", "c"]
    assert not full.isna().any().any() and full.loc[101:].equals(table.loc[101:])
    assert len(gm.impute(table, n_draws=2)) == 2
    with pytest.raises(ValueError, match="feature names should match"):
        gm.predict(table.rename(columns={"a": "z"}))


def test_float32_stays():
    x = X.astype(np.float32)
    gm = GaussianMixture(3, random_state=0).fit(x)
    assert all(getattr(gm, name).dtype == np.float32 for name in LEARNED)
    assert gm.score_samples(x).dtype == gm.predict_proba(x).dtype == gm.impute(x).dtype == np.float32
    assert gm.sample(4)[0].dtype == np.float32 and gm.predict(x).dtype == np.int64
    assert gm.score_samples(X).dtype == np.float64
    wide = GaussianMixture(3, random_state=0).fit(x.astype(np.float64))
    np.testing.assert_allclose(gm.means_, wide.means_, rtol=1e-4)


def test_float32_far_from_the_origin():
    """scikit-learn #30382: it finds variances below 0 there."""
    far = (rows(n=300, d=2) + 1000).astype(np.float32)
    for kind in TYPES:
        with quiet():
            narrow = GaussianMixture(2, covariance_type=kind, random_state=0, tol=0.0, max_iter=5).fit(far)
            wide = GaussianMixture(2, covariance_type=kind, random_state=0, tol=0.0, max_iter=5).fit(far.astype(float))
        np.testing.assert_allclose(narrow.covariances_, wide.covariances_, rtol=2e-3, atol=2e-3)


def test_integers_lists_and_strides():
    whole = (10 * X).astype(np.int32)
    want = GaussianMixture(2, random_state=0).fit(whole.astype(float))
    wide = np.zeros((len(X), 50000, 3), np.int8)[:, ::25000]  # 50000 numbers from row to row
    wide[:, 1] = whole.clip(-128, 127)
    for x in (whole, whole.tolist(), torch.from_numpy(whole), np.asfortranarray(whole.astype(float)),
              whole.astype(">f8"), whole.astype(float)[::-1][::-1], whole.astype(np.int64), whole.astype(object)):
        same_fit(GaussianMixture(2, random_state=0).fit(x), want)
    same_fit(GaussianMixture(2, random_state=0).fit(wide[:, 1]),
             GaussianMixture(2, random_state=0).fit(np.ascontiguousarray(wide[:, 1])))
    same_fit(GaussianMixture(2, random_state=0).fit(torch.from_numpy(np.asfortranarray(X))[:, ::2]),
             GaussianMixture(2, random_state=0).fit(X[:, ::2]))
    half = torch.from_numpy(X).bfloat16()
    assert GaussianMixture(2, random_state=0).fit(half).means_.dtype == np.float32
    frozen = X.copy()
    frozen.flags.writeable = False
    same_fit(GaussianMixture(2, random_state=0).fit(frozen), GaussianMixture(2, random_state=0).fit(X), rtol=0)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_bits_do_not_depend_on_threads(covariance_type):
    x = np.vstack([rows(3000, seed=1), rows(3000, seed=2)])
    start = dict(n_components=3, covariance_type=covariance_type, means_init=x[:3], weights_init=[0.2, 0.3, 0.5],
                 precisions_init={"full": [np.eye(3)] * 3, "tied": np.eye(3), "diag": np.ones((3, 3)),
                                  "spherical": np.ones(3)}[covariance_type], max_iter=3)
    fits = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        with quiet():
            fits.append(GaussianMixture(**start).fit(x))
        fits[-1].scores = fits[-1].score_samples(x)
    for fit in fits[1:]:
        same_fit(fit, fits[0], rtol=0)
        np.testing.assert_array_equal(fit.scores, fits[0].scores)


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params, x, message", [
    (dict(n_components=5), X[:4], "Expected n_samples >= n_components but got n_components = 5, n_samples = 4"),
    (dict(n_components=0), X, "The 'n_components' parameter of GaussianMixture must be an int in the range"),
    (dict(n_components=2.0), X, "The 'n_components' parameter of GaussianMixture must be an int in the range"),
    (dict(covariance_type="round"), X, "The 'covariance_type' parameter of GaussianMixture must be a str among"),
    (dict(reg_covar=-1.0), X, "The 'reg_covar' parameter"),
    (dict(device="tpu"), X, "The 'device' parameter of GaussianMixture must be 'auto', 'cpu', 'cuda'"),
    (dict(device="meta"), X, "The 'device' parameter of GaussianMixture must be 'auto', 'cpu', 'cuda'"),
    (dict(device=0), X, "The 'device' parameter of GaussianMixture must be an instance of 'str'"),
    (dict(), X[:, :0], r"Found array with 0 feature\(s\)"),
    (dict(), X[:1], "a minimum of 2 is required"),
    (dict(), X[0], "Expected 2D array, got 1D array instead"),
    (dict(), X[None], "Found array with dim 3"),
    (dict(), np.where(X > 6, np.inf, X), "Input X contains infinity or a value too large for dtype"),
    (dict(), X + 1j, "Complex data not supported"),
    (dict(), [["a", "b"], ["c", "d"]], "could not convert string to float"),
    (dict(), torch.from_numpy(X) + 1j, "X must be a dense tensor of real numbers"),
    (dict(), torch.from_numpy(X)[0], "Expected 2D array, got 1D array instead"),
    (dict(), torch.from_numpy(X).to_sparse(), "X must be a dense tensor of real numbers"),
    (dict(means_init=X[:2, :2], n_components=2), X, r"The parameter 'means' should have the shape of \(2, 3\)"),
    (dict(weights_init=[0.2, 0.2], n_components=2), X, "The parameter 'weights' should be normalized"),
    (dict(weights_init=[-0.2, 1.2], n_components=2), X, r"The parameter 'weights' should be in the range \[0, 1\]"),
    (dict(precisions_init=[-np.eye(3)]), X, "'full precision' should be symmetric, positive-definite"),
    (dict(precisions_init=np.tri(3), covariance_type="tied"), X, "'tied precision' should be symmetric"),
    (dict(precisions_init=[[1.0, 1.0, 0.0]], covariance_type="diag"), X, "'diag precision' should be positive"),
    (dict(precisions_init=[-1.0], covariance_type="spherical"), X, "'spherical precision' should be positive"),
])
def test_refused(params, x, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**params).fit(x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
def test_no_gpu():
    with pytest.raises(ValueError, match="device='cuda', but torch finds no GPU"):
        GaussianMixture(device="cuda").fit(X)


@pytest.mark.parametrize("weights, message", [
    (np.r_[-1.0, np.ones(119)], "Negative values in data passed to `sample_weight`"),
    (np.zeros(120), "Sample weights must contain at least one non-zero number"),
    (np.r_[np.nan, np.ones(119)], "Input sample_weight contains NaN"),
    (np.r_[np.inf, np.ones(119)], "Input sample_weight contains infinity"),
    (np.ones(7), r"sample_weight.shape == \(7,\), expected \(120,\)!"),
    (np.ones((120, 1)), "Sample weights must be 1D array or scalar"),
    (np.r_[np.ones(2), np.zeros(118)], "Expected n_samples >= n_components but got n_components = 3, n_samples = 2"),
])
def test_refused_weights(weights, message):
    for w in (weights, torch.from_numpy(weights)):
        with pytest.raises(ValueError, match=message):
            GaussianMixture(3).fit(X, sample_weight=w)


def test_refused_use():
    gm = GaussianMixture(2)
    for name in ("predict", "predict_proba", "score_samples", "score", "impute", "marginal", "condition", "save",
                 "anomaly_score", "fit_threshold", "predict_outlier"):
        with pytest.raises(NotFittedError, match="This GaussianMixture instance is not fitted yet"):
            getattr(gm, name)(X)
    gm.fit(X)
    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 3 features as input"):
        gm.predict(X[:, :2])
    with pytest.raises(ValueError, match="Input X contains infinity"):
        gm.score_samples(np.full((1, 3), np.inf))
    with pytest.raises(ValueError, match="Invalid value for 'n_samples': 0"):
        gm.sample(0)


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("what", ["constant column", "duplicate rows", "one value"])
def test_degenerate_rows(covariance_type, what):
    """With reg_covar they are fitted as scikit-learn does; without it, where it raises, components are recovered."""
    x = X.copy()
    if what == "constant column":
        x[:, 1] = 3.0
    elif what == "duplicate rows":
        x = np.repeat(x[:3], 20, axis=0)
    else:
        x[:] = 1.0
    params = dict(n_components=3, covariance_type=covariance_type, random_state=0, max_iter=6,
                  means_init=x[[0, 20, 59]], weights_init=[0.4, 0.3, 0.3])
    with quiet():
        peer, ours = both(x, **params)
    np.testing.assert_allclose(ours.means_, peer.means_, atol=1e-6)
    np.testing.assert_allclose(ours.covariances_, peer.covariances_, rtol=1e-5, atol=1e-9)
    with quiet():
        bare = GaussianMixture(reg_covar=0.0, **params).fit(x)
    assert all(np.isfinite(getattr(bare, name)).all() for name in LEARNED)
    assert np.isfinite(bare.score_samples(x)).all()
    if what == "duplicate rows" and covariance_type != "tied":
        with pytest.raises(ValueError, match="ill-defined empirical covariance"):
            Peer(reg_covar=0.0, **params).fit(x)
        assert (bare.component_status_ == 2).all()
        with pytest.warns(ConvergenceWarning, match=r"were recovered: 0 \(singular\), 1 \(singular\), 2 \(singular\)"):
            GaussianMixture(reg_covar=0.0, **params).fit(x)


@pytest.mark.filterwarnings("ignore:Best performing")
def test_a_component_far_away_comes_back():
    with pytest.warns(ConvergenceWarning, match=r"were recovered: 1 \(dead\)"):
        gm = GaussianMixture(2, means_init=[X.mean(0), X.mean(0) + 1e4], weights_init=[0.5, 0.5], max_iter=1,
                             precisions_init=[np.eye(3)] * 2).fit(X)
    assert gm.component_status_.tolist() == [0, 1] and (np.abs(gm.means_) < 50).all()
    with quiet():
        gm.set_params(max_iter=20).fit(X)
    assert gm.component_status_.tolist() == [0, 0] and gm.weights_.min() > 0.01


def test_too_large_for_float32():
    with pytest.raises(ValueError, match="the values of X are too large"), np.errstate(all="ignore"):
        GaussianMixture(2, random_state=0, init_params="random").fit((X * 1e30).astype(np.float32))


def test_reading_does_not_copy():
    assert _rows.as_tensor(X).data_ptr() == X.ctypes.data
    assert _rows.as_tensor(X[::-1]).tolist() == X[::-1].tolist()
