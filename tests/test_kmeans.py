"""k-means++ and Lloyd's iteration: beside scikit-learn, beside the reference, bits, weights, bad input."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.datasets import load_breast_cancer, load_iris, load_wine

import cases
from gmkernels import _C, GaussianMixture, ops, reference
from gmkernels.ops.kmeans import local_trials
from kmeans_cases import F32, F64, clusters, uniforms_of, weights_of
from mixture_data import quiet, rows

# n, d, k: around the words of every instruction set, the blocks of 4 centres, the groups of 2048 rows
SHAPES = [(1, 1, 1), (5, 3, 5), (33, 2, 3), (70, 17, 4), (131, 16, 7), (300, 5, 33), (2049, 3, 6), (4100, 9, 13)]


def same(got, want, rtol=1e-12):
    """Results with one path: labels, iterations, centres and inertia to rounding."""
    assert got.centers.dtype == want[0].dtype and torch.equal(got.labels, want[1]) and torch.equal(got.n_iter, want[3])
    scale = max(want[0].abs().max().item(), 1e-300) if want[0].numel() else 1.0
    cases.close(got.centers, want[0], rtol=0, atol=rtol * scale)
    cases.close(got.inertia, want[2], rtol=10 * rtol, atol=1e-20)


def test_choice_at_any_scale(isa):
    """The squared distances that are kept between centres have 20 digits in float64, and its whole range."""
    x = clusters(3000, 5)
    want = ops.kmeans_plus_plus(x, 12, uniforms=uniforms_of(12, 0))[1]
    for power in (-480, -60, 100, 480):
        got = ops.kmeans_plus_plus(x * 2.0**power, 12, uniforms=uniforms_of(12, 0))[1]
        assert torch.equal(got, want)
    tiny = torch.arange(8, dtype=F64)[:, None] * 1e-158  # squared distances are subnormal
    got = ops.kmeans_plus_plus(tiny, 4, sample_weight=torch.tensor([0.0] + 7 * [1.0]).double(), seed=0)[1]
    assert len(set(got.tolist()) - {0}) == 4


# beside scikit-learn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_scikit_learns_path(weighted):
    for n, d, k in SHAPES[1:]:
        x = clusters(n, d)
        w = weights_of(n) if weighted else None
        for tol in (0.0,) if weighted else (0.0, 1e-2):  # its tolerance does not count weights
            start = x[:k] + 0.1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peer = KMeans(k, init=start.numpy(), n_init=1, tol=tol, algorithm="lloyd")
                peer.fit(x.numpy(), sample_weight=None if w is None else w.numpy())
            want = (torch.from_numpy(peer.cluster_centers_), torch.from_numpy(peer.labels_).long(),
                    torch.tensor(peer.inertia_, dtype=F64), torch.tensor(peer.n_iter_))
            same(ops.kmeans(x, init=start, tol=tol, sample_weight=w), want)


@pytest.mark.parametrize("weighted", [False, True])
def test_scikit_learns_choice(weighted):
    """The same rows for the same RandomState."""
    for seed in range(3):
        for n, d, k in SHAPES:
            x, w = clusters(n, d, seed), weights_of(n) if weighted else None
            want = kmeans_plusplus(x.numpy(), k, sample_weight=None if w is None else w.numpy(), random_state=seed)
            got = ops.kmeans_plus_plus(x, k, sample_weight=w, uniforms=uniforms_of(k, seed))
            assert got[1].tolist() == want[1].tolist()
            assert torch.equal(got[0], x[got[1]])


def test_empty_centres_as_scikit_learn():
    """One centre that no row is near: it takes the farthest row."""
    x = clusters(200, 3)
    start = torch.cat([x[:3], torch.full((1, 3), 1e3)])
    peer = KMeans(4, init=start.numpy(), n_init=1, tol=0, algorithm="lloyd").fit(x.numpy())
    got = ops.kmeans(x, init=start, tol=0.0)
    assert got.labels.tolist() == peer.labels_.tolist() and got.n_iter == peer.n_iter_
    np.testing.assert_allclose(got.centers, peer.cluster_centers_, rtol=1e-12)


def test_start_is_as_good():
    """Philox instead of RandomState: what is left after k-means++, mean of 40 seeds, beside scikit-learn's."""
    x = clusters(1000, 4, spread=4.0)
    ours = np.mean([ops.kmeans(x, init=ops.kmeans_plus_plus(x, 20, seed=s)[0], max_iter=0).inertia for s in range(40)])
    theirs = np.mean([ops.kmeans(x, init=torch.from_numpy(kmeans_plusplus(x.numpy(), 20, random_state=s)[0]),
                                 max_iter=0).inertia for s in range(40)])
    assert abs(ours / theirs - 1) < 0.02  # standard error of the ratio: 0.005
    one = np.mean([ops.kmeans(x, init=ops.kmeans_plus_plus(x, 20, n_local_trials=1, seed=s)[0], max_iter=0).inertia
                   for s in range(40)])
    assert one > 1.05 * ours  # candidates help


# beside the reference -------------------------------------------------------------------------------------------------


def check(n, d, k, dtype, device="cpu", weighted=True):
    x = clusters(n, d, dtype=dtype)
    w = weights_of(n, dtype=dtype) if weighted else None
    exact = None if w is None else w.double()
    u = uniforms_of(k, 0)
    on = [None if t is None else t.to(device) for t in (x, w, u)]
    start, chosen = (t.cpu() for t in ops.kmeans_plus_plus(on[0], k, sample_weight=on[1], uniforms=on[2]))
    assert chosen.tolist() == reference.kmeans.kmeans_plus_plus(x.double(), u, exact, k, local_trials(k))[1].tolist()
    iterations = 40 if dtype is F64 else 1  # rounding decides the path of float32
    got = ops.kmeans(on[0], init=start.to(device), sample_weight=on[1], max_iter=iterations, tol=1e-3)
    want = reference.kmeans.kmeans(x.double(), start.double(), exact, iterations, 1e-3)
    if dtype is F64:
        same(got._replace(**{name: t.cpu() for name, t in got._asdict().items()}), want)
    else:
        cases.close(got.centers, want[0], rtol=1e-5, atol=1e-5)
        cases.close(got.inertia, want[2], rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_reference(device, dtype):
    for i, (n, d, k) in enumerate(SHAPES):
        if not device.simt or n * k < 20000:
            check(n, d, k, dtype, device.torch, weighted=i % 2 == 0)


def test_every_instruction_set(isa):
    for dtype in cases.FLOATS:
        for n, d, k in [(67, 3, 5), (2100, 17, 6), (129, 33, 11)]:
            check(n, d, k, dtype)


def test_sizes(isa):
    for size in cases.SIZES:
        for n, d, k in [(size, 3, 2), (40, size, 3), (130, 3, size)]:
            if 1 <= k <= n:
                check(n, d, k, F64, weighted=False)


def test_by_hand(device):
    x = torch.tensor([[0.0], [1.0], [10.0], [14.0]], dtype=F64, device=device.torch)
    w = torch.tensor([3.0, 1.0, 1.0, 1.0], dtype=F64, device=device.torch)
    got = ops.kmeans(x, init=x[1:3].clone(), sample_weight=w)
    assert got.centers.tolist() == [[0.25], [12.0]] and got.labels.tolist() == [0, 0, 1, 1]
    assert got.inertia == 3 * 0.0625 + 0.5625 + 8 and got.n_iter == 2
    none = ops.kmeans(x, init=got.centers + 1, max_iter=0)
    assert none.n_iter == 0 and none.inertia == 1.25**2 + 0.25**2 + 9 + 1 and torch.equal(none.centers, got.centers + 1)
    tie = ops.kmeans(x, init=x[[1, 1, 3]], max_iter=0)
    assert tie.labels.tolist() == [0, 0, 2, 2]  # the first of equals


def test_ends():
    """No label changes; tolerance; max_iter. Labels and inertia belong to the centres that come back."""
    x = clusters(500, 3)
    start = ops.kmeans_plus_plus(x, 9, seed=0)[0]
    whole = ops.kmeans(x, init=start, tol=0.0)
    loose = ops.kmeans(x, init=start, tol=0.5)
    short = ops.kmeans(x, init=start, tol=0.0, max_iter=3)
    assert whole.n_iter > 4 > loose.n_iter and short.n_iter == 3
    for got in (whole, loose, short):
        again = ops.kmeans(x, init=got.centers, max_iter=0)
        assert torch.equal(again.labels, got.labels) and torch.equal(again.inertia, got.inertia)
    assert whole.inertia < short.inertia < ops.kmeans(x, init=start, max_iter=0).inertia
    for c in range(9):
        cases.close(whole.centers[c], x[whole.labels == c].mean(0))


def test_far_from_the_origin():
    """float32, clusters 1000 apart, 1e4 from the origin: no label is lost to cancellation."""
    x = clusters(3000, 4)
    x[::2] += 1000.0
    x = (x + 1e4).float()
    start = x[:8].clone()
    got, want = ops.kmeans(x, init=start, max_iter=5), ops.kmeans(x.double(), init=start.double(), max_iter=5)
    assert (got.labels != want.labels).sum() <= 3
    assert abs(got.inertia / want.inertia - 1) < 1e-4


# empty centres, duplicates --------------------------------------------------------------------------------------------


def test_several_empty_centres():
    for k, dtype in [(7, F64), (40, F64), (40, F32)]:
        x = clusters(3000, 2, dtype=dtype)
        start = torch.full((k, 2), 1e6, dtype=dtype)
        start[0], start[k // 2] = x[0], x[1]
        w = weights_of(3000, dtype=dtype)
        w[::3] = 0.0
        got = ops.kmeans(x, init=start, sample_weight=w, tol=0.0, max_iter=1)
        want = reference.kmeans.kmeans(x, start, w, 1, 0.0)
        same(got, want, 1e-12 if dtype is F64 else 1e-6)
        assert len(got.labels.unique()) > k // 2
        assert len(ops.kmeans(x, init=start, sample_weight=w, tol=0.0).labels.unique()) == k


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_fewer_distinct_rows_than_centres(dtype):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype).repeat(50, 1)
    w = torch.ones(100, dtype=dtype)
    w[0] = 0.0
    start, chosen = ops.kmeans_plus_plus(x, 5, seed=0, sample_weight=w)
    assert len({*start[:, 0].tolist()}) == 2 and 0 not in chosen.tolist()
    got = ops.kmeans(x, init=start, sample_weight=w)
    assert got.inertia == 0 and torch.equal(got.centers[got.labels], x) and got.centers.isfinite().all()
    one = ops.kmeans(torch.zeros(9, 3, dtype=dtype), 4, seed=1)
    assert one.inertia == 0 and one.labels.tolist() == [0] * 9 and one.centers.eq(0).all()


def test_nothing(device):
    got = ops.kmeans(torch.zeros(3, 0, device=device.torch), 2, seed=0)  # no features: every row is every other
    assert got.centers.shape == (2, 0) and got.labels.tolist() == [0, 0, 0] and got.inertia == 0
    none = ops.kmeans(torch.zeros(0, 5, 3, device=device.torch), 2, seed=0)  # no data set
    assert none.centers.shape == (0, 2, 3) and none.labels.shape == (0, 5) and none.n_iter.shape == (0,)
    assert ops.kmeans_plus_plus(torch.zeros(2, 0, 5, 3, device=device.torch), 2, seed=0)[1].shape == (2, 0, 2)
    every = ops.kmeans(clusters(6, 2).to(device.torch), 6, seed=0)
    assert every.inertia == 0 and sorted(every.labels.tolist()) == list(range(6))


# bits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_same_bits_on_any_number_of_threads(isa, dtype):
    x, w = clusters(20001, 5, dtype=dtype), weights_of(20001, dtype=dtype)
    made = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        start = ops.kmeans_plus_plus(x, 13, sample_weight=w, seed=3)
        far = torch.cat([start[0][:11], start[0][11:] + 1e4])
        made.append([*start, *ops.kmeans(x, init=start[0], sample_weight=w, max_iter=7),
                     *ops.kmeans(x, init=far, max_iter=2)])
    for others in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], others, strict=True))


def test_instruction_sets_agree():
    x = clusters(5000, 6)
    made = []
    for isa in _C.isas():
        _C.set_isa(isa)
        made.append(ops.kmeans(x, 9, seed=4))
    for other in made[1:]:
        same(made[0], other, 1e-11)


# weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_weights_are_repetitions(device, dtype):
    x, times = clusters(300, 3, dtype=dtype).to(device.torch), torch.arange(300, device=device.torch) % 3
    w = times.to(dtype)
    twice = x.repeat_interleave(times, 0)
    of = torch.arange(300, device=device.torch).repeat_interleave(times)
    start, chosen = ops.kmeans_plus_plus(x, 5, seed=2, sample_weight=w)
    repeated, rows = ops.kmeans_plus_plus(twice, 5, seed=2)
    assert chosen.tolist() == of[rows].tolist() and torch.equal(start, repeated)
    a, b = ops.kmeans(x, init=start, sample_weight=w), ops.kmeans(twice, init=start)
    assert a.n_iter == b.n_iter and torch.equal(a.labels[of], b.labels)
    cases.close(a.centers, b.centers)
    cases.close(a.inertia, b.inertia, rtol=1e-6 if dtype is F32 else 1e-12)
    halves = ops.kmeans(x, init=start, sample_weight=w / 2)
    assert torch.equal(halves.centers, a.centers) and halves.inertia == a.inertia / 2


# GaussianMixture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_iris, load_wine, load_breast_cancer, lambda: rows(2000, 4)],
                         ids=["iris", "wine", "breast_cancer", "overlapping"])
def test_starts_of_gaussian_mixtures(load):
    """float64: scikit-learn's own start for every seed. float32, where rounding decides the path: as good on average.
    """
    X = load() if load.__name__ == "<lambda>" else load().data
    X = (X - X.mean(0)) / X.std(0)
    scores, inertias = [], []
    for seed in range(5):
        with quiet():
            theirs = GaussianMixture.__mro__[1](4, covariance_type="diag", random_state=seed, max_iter=20).fit(X)
            ours = GaussianMixture(4, covariance_type="diag", random_state=seed, max_iter=20).fit(X)
            single = GaussianMixture(4, covariance_type="diag", random_state=seed, max_iter=20).fit(np.float32(X))
        np.testing.assert_allclose(ours.lower_bound_, theirs.lower_bound_, rtol=1e-6)
        scores.append((single.lower_bound_, theirs.lower_bound_))
        u = uniforms_of(4, seed)
        x = torch.from_numpy(np.float32(X))
        inertias.append((float(ops.kmeans(x, init=ops.kmeans_plus_plus(x, 4, uniforms=u)[0]).inertia),
                         KMeans(4, n_init=1, random_state=seed).fit(X).inertia_))
    scores, inertias = np.mean(scores, 0), np.mean(inertias, 0)
    assert scores[0] > scores[1] - 0.05 and inertias[0] < 1.02 * inertias[1]
