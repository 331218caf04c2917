"""Fits of rows that come in batches: streams, files, partial_fit."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gmkernels import GaussianMixture, mixture
from gmkernels.mixture import _em, _rows
from mixture_data import TYPES, holes, quiet, rows, same_fit

X = rows(300)


class Batches:
    """What a user would write: starts again on every iter."""

    def __init__(self, x, size=37):
        self.x, self.size, self.passes = x, size, 0

    def __iter__(self):
        self.passes += 1
        for i in range(0, len(self.x), self.size):
            yield self.x[i : i + self.size]


def memmap(folder, x):
    file = np.memmap(folder / "rows", dtype=x.dtype, mode="w+", shape=x.shape)
    file[:] = x
    file.flush()
    return np.memmap(folder / "rows", dtype=x.dtype, mode="r", shape=x.shape)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_the_bits_of_memory(covariance_type, monkeypatch, tmp_path):
    """Any batches, any kind of stream: the same start, the same sums."""
    monkeypatch.setattr(_rows, "STREAM_ROWS", 2048)
    x = np.vstack([rows(1500, seed=1), rows(1300, seed=2)]).astype(np.float32)
    w = np.random.RandomState(0).rand(len(x)).astype(np.float32)
    params = dict(n_components=3, covariance_type=covariance_type, random_state=0, max_iter=3)
    tensor = torch.from_numpy(x)
    with quiet():
        want, weighted = GaussianMixture(**params).fit(x), GaussianMixture(**params).fit(x, sample_weight=w)
        for stream in (Batches(x, 99), Batches(tensor, 2800), Batches(x, 2047), memmap(tmp_path, x),
                       DataLoader(TensorDataset(tensor), batch_size=1000), DataLoader(tensor, batch_size=4096)):
            same_fit(GaussianMixture(**params).fit(stream), want, rtol=0)
        for stream in (Batches(x, 97), memmap(tmp_path, x)):
            same_fit(GaussianMixture(**params).fit(stream, sample_weight=w), weighted, rtol=0)


def test_missing_values():
    Y = holes(X)
    with quiet():
        same_fit(GaussianMixture(2, random_state=0, max_iter=5).fit(Batches(Y)),
                 GaussianMixture(2, random_state=0, max_iter=5).fit(Y))


def test_passes(monkeypatch):
    """One to begin with, one per iteration; never more rows at once than a block and a batch."""
    most = []
    original = _em.Memory.__init__
    monkeypatch.setattr(_em.Memory, "__init__", lambda self, x, *more: most.append(len(x)) or original(self, x, *more))
    monkeypatch.setattr(_rows, "STREAM_ROWS", 128)
    stream = Batches(X)
    with quiet():
        GaussianMixture(2, random_state=0, max_iter=4, tol=0.0, n_init=2).fit(stream)
    assert stream.passes == 1 + 2 * 4 and max(most) == 128


def test_reservoir(monkeypatch):
    """The start comes from a sample: uniform, seeded, with the weights of its rows."""
    monkeypatch.setattr(_rows, "RESERVOIR_ROWS", 50)
    x = np.arange(400.0)[:, None]
    found = []
    for seed in range(40):
        stream = _rows.Stream(GaussianMixture(), Batches(x), x[:, 0] + 1, reset=True)
        kept, weights = stream.open(np.random.RandomState(seed))
        assert len(set(kept[:, 0].tolist())) == 50 and stream.n == 400
        assert torch.equal(weights, kept[:, 0] + 1)
        found.append(kept[:, 0].numpy())
        again = _rows.Stream(GaussianMixture(), Batches(x, 399), None, reset=True).open(np.random.RandomState(seed))
        assert torch.equal(kept, again[0]) and again[1] is None
    counts = np.histogram(np.concatenate(found), bins=8, range=(0, 400))[0]  # 250 in each
    assert ((counts - 250) ** 2 / 250).sum() < 24.3  # chi-square, 7 degrees of freedom: p = 0.001
    with quiet():
        gm = GaussianMixture(3, random_state=0).fit(Batches(X))
        assert gm.score(X) == pytest.approx(GaussianMixture(3, random_state=0).fit(X).score(X), abs=0.2)


def test_warm_start():
    gm = GaussianMixture(2, random_state=0, warm_start=True, max_iter=2)
    with quiet():
        first = gm.fit(Batches(X)).lower_bound_
        assert gm.fit(Batches(X)).lower_bound_ > first
    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 3"):
        gm.fit(Batches(X[:, :2]))


class Shrinking(Batches):
    def __iter__(self):
        self.x = self.x[:-1]
        return super().__iter__()


@pytest.mark.parametrize("stream, error, message", [
    (iter([X]), TypeError, "X is an iterator, which can be read only once"),
    ((x for x in [X]), TypeError, "X is an iterator, which can be read only once"),
    (Batches(X[:0]), ValueError, "X gave no batch of rows"),
    (Batches(X[:1]), ValueError, "a minimum of 2 is required"),
    (Batches(X[:3]), ValueError, "Expected n_samples >= n_components but got n_components = 4, n_samples = 3"),
    (Batches(X[0]), ValueError, "Expected 2D array, got 1D array instead"),
    (Batches(np.where(X > 6, np.inf, X)), ValueError, "Input X contains infinity"),
    (Shrinking(X), ValueError, "X gave 299 rows when it was read first and 298 later"),
    ({1, 2}, ValueError, "Expected 2D array, got scalar array instead"),
])
def test_refused(stream, error, message):
    with pytest.raises(error, match=message):
        GaussianMixture(4).fit(stream)


def test_refused_features_and_order():
    class Uneven(Batches):
        def __iter__(self):
            return iter([X, X[:, :2]])

    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 3"):
        GaussianMixture(2).fit(Uneven(X))
    shuffled = DataLoader(TensorDataset(torch.from_numpy(X)), batch_size=100, shuffle=True)
    with pytest.raises(ValueError, match="sample_weight needs rows in a fixed order, but this DataLoader shuffles"):
        GaussianMixture(2).fit(shuffled, sample_weight=np.ones(300))
    with pytest.raises(ValueError, match=r"sample_weight.shape == \(7,\), expected \(300,\)"):
        GaussianMixture(2).fit(Batches(X), sample_weight=np.ones(7))
    with pytest.raises(TypeError, match="fit_predict takes an array"):
        GaussianMixture(2).fit_predict(Batches(X))
    assert GaussianMixture(2, random_state=0).fit(shuffled).converged_


def test_file_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(_rows, "STREAM_ROWS", 64)
    file = memmap(tmp_path, X)
    labels = GaussianMixture(2, random_state=0).fit_predict(file)
    np.testing.assert_array_equal(labels, GaussianMixture(2, random_state=0).fit_predict(X))
    own = np.memmap(tmp_path / "rows", dtype=X.dtype, mode="c", shape=X.shape)
    own[0] = 0.0  # of this process only; must survive
    GaussianMixture(2, random_state=0).fit(own)
    assert (own[0] == 0).all()


MEASURE = """
import sys, numpy as np, warnings
warnings.simplefilter("ignore")
from gmkernels import GaussianMixture


def kilobytes(name):
    return [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)][0]


def resident():
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew: it outlives fork and exec
    return kilobytes("VmRSS")


"""
RESIDENT = """
k = np.eye(4, 16) * 3
start = dict(means_init=k, weights_init=[0.25] * 4, precisions_init=np.ones((4, 16)), covariance_type="diag")
GaussianMixture(4, **start, max_iter=1).fit(np.random.RandomState(0).randn(300000, 16).astype(np.float32))
before = resident()
file = np.memmap(sys.argv[1], dtype=np.float32, mode="r", shape=(6_000_000, 16))
GaussianMixture(4, **start, max_iter=2).fit(file)
"""
IN_MEMORY = """
rng = np.random.default_rng(0)
centres = 30 * rng.normal(size=(64, 16))
X = np.empty((1_000_000, 16), np.float32)
for rows in np.split(X, 10):
    rows[:] = centres[rng.integers(0, 64, len(rows))] + rng.standard_normal(rows.shape)
GaussianMixture(64, covariance_type=sys.argv[1], random_state=0, max_iter=2).fit(X[:20000])
before = resident()
GaussianMixture(64, covariance_type=sys.argv[1], random_state=0, max_iter=2).fit(X)
"""
reads_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def megabytes(script, argument):
    """The peak above `before`, which the script sets, in a process of its own."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(mixture.__file__)))
    script = f'{MEASURE}{script}print((kilobytes("VmHWM") - before) / 1024)'
    done = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": package}, check=True)
    return float(done.stdout)


@pytest.mark.slow
@reads_proc
def test_memory_is_bounded(tmp_path):
    """A file of 366 MB costs less than 64 MB."""
    file = np.memmap(tmp_path / "rows", dtype=np.float32, mode="w+", shape=(6_000_000, 16))
    for i in range(0, len(file), 1_000_000):
        file[i : i + 1_000_000] = np.random.RandomState(i).randn(1_000_000, 16)
    file.flush()
    assert megabytes(RESIDENT, tmp_path / "rows") < 64


@pytest.mark.slow
@reads_proc
@pytest.mark.parametrize("kind", ["diag", "full"])
def test_memory_beyond_the_data(kind):
    """k-means, the first M-step and EM: four bytes per row (below the 6.4 that make 64 MB for ten million) and 12 MB
    that do not grow with the rows; the data have 61 MB."""
    assert megabytes(IN_MEMORY, kind) < 12 + 4 * 1_000_000 / 2**20


# partial_fit ----------------------------------------------------------------------------------------------------------


def moments(gm, shift):
    """Statistics per row that the parameters are the M-step of: [nk], [s1], [s2], as full matrices."""
    w, delta = gm.weights_, gm.means_ - shift
    S = gm.covariances_ - gm.reg_covar * np.eye(len(shift))
    return w, w[:, None] * delta, w[:, None, None] * (S + delta[:, :, None] * delta[:, None, :])


def test_step_of_partial_fit():
    """s += (t + 2)^-0.6 (s_batch - s), written out."""
    gm = GaussianMixture(2, random_state=0, max_iter=3, tol=0.0)
    with quiet():
        gm.fit(X[:100])
    batch, shift = X[100:200], np.zeros(3)
    old, bound = moments(gm, shift), gm.lower_bound_
    r, likelihood = gm.predict_proba(batch), gm.score(batch)
    new = r.sum(0), r.T @ batch, np.einsum("nk,na,nb->kab", r, batch, batch)
    step = (3 + 2) ** -0.6
    w, s1, s2 = (a + step * (b / 100 - a) for a, b in zip(old, new, strict=True))
    gm.partial_fit(batch)
    np.testing.assert_allclose(gm.weights_, w, rtol=1e-9)
    np.testing.assert_allclose(gm.means_, s1 / w[:, None], rtol=1e-9)
    mean = s1 / w[:, None]
    np.testing.assert_allclose(gm.covariances_, s2 / w[:, None, None] - mean[:, :, None] * mean[:, None, :]
                               + 1e-6 * np.eye(3), rtol=1e-7, atol=1e-9)
    assert gm.lower_bound_ == pytest.approx(bound + step * (likelihood - bound)) and gm.n_iter_ == 4


@pytest.mark.parametrize("covariance_type", TYPES)
def test_partial_fit_learns(covariance_type):
    stream = [rows(200, seed=0)[i % 4 * 50 :][:50] for i in range(40)]
    whole = rows(200, seed=0)
    for dtype in (np.float64, np.float32):
        gm = GaussianMixture(3, covariance_type=covariance_type, random_state=0)
        with quiet():
            for batch in stream:
                gm.partial_fit(batch.astype(dtype))
            best = GaussianMixture(3, covariance_type=covariance_type, random_state=0).fit(whole)
        assert gm.n_iter_ == 40 and not gm.converged_ and gm.means_.dtype == dtype
        assert gm.score(whole) > best.score(whole) - 0.15


@pytest.mark.parametrize("covariance_type", TYPES)
def test_partial_fit_of_the_same_rows_is_em(covariance_type):
    """At a fixed point of EM a batch of the whole data changes nothing."""
    gm = GaussianMixture(2, covariance_type=covariance_type, random_state=0, tol=1e-12, max_iter=3000).fit(X)
    means = gm.means_.copy()
    gm.partial_fit(X).partial_fit(X, sample_weight=np.full(len(X), 7.0))
    np.testing.assert_allclose(gm.means_, means, atol=1e-4)


def test_partial_fit_input():
    gm = GaussianMixture(3, random_state=0)
    with pytest.raises(ValueError, match="Expected n_samples >= n_components"):
        gm.partial_fit(X[:2])
    with quiet():
        gm.partial_fit(X[:100]).partial_fit(X[:1]).partial_fit(holes(X[:50]), sample_weight=np.ones(50))
    before = gm.means_.copy()
    gm.partial_fit(np.full((2, 3), np.nan))  # nothing to learn from
    np.testing.assert_array_equal(gm.means_, before)
    with pytest.raises(ValueError, match="X has 2 features"):
        gm.partial_fit(X[:, :2])
    with pytest.raises(ValueError, match="Input X contains infinity"):
        gm.partial_fit(np.full_like(X, np.inf))
    with pytest.raises(ValueError, match="Sample weights must contain at least one non-zero"):
        gm.partial_fit(X, sample_weight=np.zeros(len(X)))
    with quiet():  # fit starts anew
        same_fit(gm.fit(X), GaussianMixture(3, random_state=0).fit(X), rtol=0)
