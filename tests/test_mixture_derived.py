"""Conditional and marginal mixtures, thresholds for anomalies, files."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture as Peer

from gmkernels import GaussianMixture
from mixture_data import LEARNED, TYPES, holes, quiet, rows, same_fit

X = rows(200, d=4)


def fitted(covariance_type, **params):
    with quiet():
        return GaussianMixture(3, covariance_type=covariance_type, random_state=0, **params).fit(X)


# condition, marginal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance_type", TYPES)
def test_marginal(covariance_type):
    gm = fitted(covariance_type)
    for features in ([1], [0, 2], [3, 1, 0], [0, 1, 2, 3]):
        made = gm.marginal(features)
        alone = np.full_like(X, np.nan)
        alone[:, features] = X[:, features]
        np.testing.assert_allclose(made.score_samples(X[:, features]), gm.score_samples(alone), rtol=1e-9)
        assert made.n_features_in_ == len(features) and made.sample(3)[0].shape == (3, len(features))
    same = gm.marginal(range(4))
    for name in LEARNED:
        np.testing.assert_allclose(getattr(same, name), getattr(gm, name), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_condition(covariance_type):
    """p(rest | known) = p(all) / p(known)."""
    gm = fitted(covariance_type)
    for known in ([2], [3, 0], [0, 1, 3]):
        rest = [i for i in range(4) if i not in known]
        value = X[7, known]
        made = gm.condition(dict(zip(known, value, strict=True)))
        x = X[:20].copy()
        x[:, known] = value
        want = gm.score_samples(x) - gm.marginal(known).score_samples(x[:, known])
        np.testing.assert_allclose(made.score_samples(x[:, rest]), want, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(made.predict_proba(x[:, rest]), gm.predict_proba(x), atol=1e-8)
        lacks = x[:1].copy()
        lacks[:, rest] = np.nan
        np.testing.assert_allclose(made.weights_ @ made.means_, gm.impute(lacks)[0, rest], rtol=1e-9)
        assert isinstance(made, Peer) and made.weights_.sum() == pytest.approx(1)
        full = made.covariance_type in ("full", "tied")
        product = made.covariances_ @ made.precisions_ if full else made.covariances_ * made.precisions_
        np.testing.assert_allclose(product, np.broadcast_to(np.eye(len(rest)), product.shape) if full else 1, atol=1e-8)
    np.testing.assert_allclose(gm.condition({}).score_samples(X), gm.score_samples(X), rtol=1e-9)


def test_conditioned_rows():
    """Samples of the conditional mixture are those of the mixture near the given value."""
    gm = fitted("full")
    drawn = gm.set_params(random_state=1).sample(200_000)[0]
    near = drawn[np.abs(drawn[:, 1] - X[3, 1]) < 0.05][:, [0, 2, 3]]
    made = gm.condition({1: X[3, 1]}).sample(20_000)[0]
    scale = near.std(0)
    np.testing.assert_allclose(made.mean(0) / scale, near.mean(0) / scale, atol=0.12)
    np.testing.assert_allclose(made.std(0), scale, rtol=0.08)


def test_names_of_features():
    gm = fitted("full")
    gm.feature_names_in_ = np.array(["a", "b", "c", "d"], dtype=object)
    made = gm.condition({"b": 1.0, 3: 2.0})
    assert list(made.feature_names_in_) == ["a", "c"] and list(gm.marginal(["d", "a"]).feature_names_in_) == ["d", "a"]
    assert list(gm.marginal("c").feature_names_in_) == ["c"]
    with pytest.raises(ValueError, match="feature 'z' is none of those seen in fit: 'a', 'b', 'c', 'd'"):
        gm.marginal(["z"])


def test_dtype_and_use_of_derived():
    with quiet():
        gm = GaussianMixture(2, random_state=0).fit(torch.from_numpy(X).float())
    made = gm.condition({0: float(X[0, 0])})
    assert made.means_.dtype == np.float32 and made.sample(2)[0].dtype == torch.float32
    made.partial_fit(X[:50, 1:])
    assert made.impute(holes(X[:, 1:])).shape == (200, 3)


@pytest.mark.parametrize("call, error, message", [
    (lambda gm: gm.condition({4: 1.0}), ValueError, "a feature must be a name or a number from 0 to 3, got 4"),
    (lambda gm: gm.condition({-1: 1.0}), ValueError, "a feature must be a name or a number from 0 to 3, got -1"),
    (lambda gm: gm.condition({True: 1.0}), ValueError, "a feature must be a name or a number"),
    (lambda gm: gm.condition({"a": 1.0}), ValueError, "fitted without feature names"),
    (lambda gm: gm.condition({0: np.nan}), ValueError, "the values of features must be finite numbers"),
    (lambda gm: gm.condition({0: [1.0, 2.0]}), ValueError, "the values of features must be finite numbers"),
    (lambda gm: gm.condition([0, 1]), TypeError, "values must be a dict of features and their values, got list"),
    (lambda gm: gm.condition(dict.fromkeys(range(4), 0.0)), ValueError, "at least one feature that is not given"),
    (lambda gm: gm.marginal([]), ValueError, "features must hold at least one feature"),
    (lambda gm: gm.marginal([1, 1]), ValueError, r"features must differ, got \[1, 1\]"),
])
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(fitted("full"))


# anomalies ------------------------------------------------------------------------------------------------------------


def test_threshold():
    gm = fitted("full")
    fresh = gm.set_params(random_state=1).sample(999)[0]
    assert gm.fit_threshold(fresh, contamination=0.05) is gm
    found = gm.predict_outlier(fresh)
    assert set(found) == {1, -1} and (found == -1).sum() == 49  # 50 of 1000 reach the threshold, the 50th is it
    np.testing.assert_array_equal(found == -1, gm.anomaly_score(fresh) > gm.threshold_)
    np.testing.assert_array_equal(gm.anomaly_score(fresh), -gm.score_samples(fresh))
    assert (gm.predict_outlier(fresh + 50) == -1).all()
    x = torch.from_numpy(fresh)
    assert torch.equal(gm.predict_outlier(x), torch.from_numpy(found))
    assert GaussianMixture(3, random_state=0).fit(X).fit_threshold(x, 0.05).threshold_ == gm.threshold_


def test_rate_of_false_alarms():
    """At most contamination, on average, for any number of rows."""
    gm = fitted("diag")
    rng = np.random.RandomState(0)
    pool = gm.set_params(random_state=rng).sample(50_000)[0]
    rng.shuffle(pool)
    for n in (19, 30, 99):
        rates = [(gm.fit_threshold(part, 0.05).predict_outlier(pool[-5000:]) == -1).mean()
                 for part in pool[: 200 * n].reshape(200, n, 4)]
        want = np.floor(0.05 * (n + 1)) / (n + 1)
        assert abs(np.mean(rates) - want) < 5 * np.std(rates) / np.sqrt(200)


def test_threshold_input():
    gm = fitted("full")
    with pytest.raises(NotFittedError):
        gm.predict_outlier(X)
    for wrong in (0, 1, -0.1, "0.1", None):
        with pytest.raises(ValueError, match="contamination must be a number between 0 and 1"):
            gm.fit_threshold(X, wrong)
    with pytest.raises(ValueError, match="contamination=0.01 needs at least 99 rows, got 98"):
        gm.fit_threshold(X[:98])
    assert gm.fit_threshold(X[:99]).threshold_ == gm.anomaly_score(X[:99]).max()
    with quiet():
        gm.fit(X)
    assert not hasattr(gm, "threshold_")  # it belonged to another mixture


# files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance_type", TYPES)
def test_save_and_load(covariance_type, tmp_path):
    gm = fitted(covariance_type, means_init=X[:3], n_init=2, tol=1e-2).fit_threshold(X)
    gm.feature_names_in_ = np.array(["a", "b", "c", "é"], dtype=object)
    gm.save(tmp_path / "gm.safetensors")
    back = GaussianMixture.load(tmp_path / "gm.safetensors")
    del back.feature_names_in_, gm.feature_names_in_
    same_fit(back, gm, rtol=0)
    np.testing.assert_array_equal(back.score_samples(X), gm.score_samples(X))
    np.testing.assert_array_equal(back.predict_outlier(X), gm.predict_outlier(X))
    np.testing.assert_array_equal(back.sample(5)[0], gm.sample(5)[0])
    theirs, ours = back.get_params(), gm.get_params()
    np.testing.assert_array_equal(theirs.pop("means_init"), ours.pop("means_init"))
    assert theirs == ours
    assert {**vars(back), "means_init": 0}.keys() == {**vars(gm), "means_init": 0}.keys()
    assert back.lower_bounds_ == gm.lower_bounds_
    back.set_params(means_init=None).partial_fit(X[:20])


def test_file_of_float32(tmp_path):
    with quiet():
        gm = GaussianMixture(2, random_state=np.int64(0), max_iter=0).fit(torch.from_numpy(X).float())
    gm.save(str(tmp_path / "gm"))
    back = GaussianMixture.load(str(tmp_path / "gm"))
    assert back.means_.dtype == np.float32 and isinstance(back.sample(1)[0], torch.Tensor)
    assert back.lower_bound_ == -np.inf and back.random_state == 0
    with safe_open(tmp_path / "gm", framework="numpy") as file:
        assert json.loads(file.metadata()["gmkernels"])["format"] == "gmkernels.GaussianMixture"


def test_files_that_are_none(tmp_path):
    (tmp_path / "a").write_text("no")
    with pytest.raises(ValueError, match="is no safetensors file"):
        GaussianMixture.load(tmp_path / "a")
    save_file({"x": np.ones(2)}, tmp_path / "b")
    with pytest.raises(ValueError, match="holds no gmkernels.GaussianMixture"):
        GaussianMixture.load(tmp_path / "b")
    header = json.dumps({"format": "gmkernels.GaussianMixture", "version": 99})
    save_file({"x": np.ones(2)}, tmp_path / "c", metadata={"gmkernels": header})
    with pytest.raises(ValueError, match="has version 99 of its format; this gmkernels reads up to 1"):
        GaussianMixture.load(tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        GaussianMixture.load(tmp_path / "d")
    with pytest.raises(TypeError, match="random_state must be None or an int for a mixture that is saved"):
        GaussianMixture(random_state=np.random.RandomState(0)).fit(X).save(tmp_path / "e")
