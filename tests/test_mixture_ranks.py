"""`fit(process_group=...)`: two processes with a shard each get the fit of the whole."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gmkernels import GaussianMixture
from gmkernels.mixture import _rows
from mixture_data import LEARNED, TYPES, holes, quiet, rows, same_fit
from ranks import Ranks

X = rows(300)
W = np.random.RandomState(0).rand(300)
SHARDS = X[:190], X[190:]
NOTHING = X[:0]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


class Counted:
    """What the group was asked to do."""

    def __enter__(self):
        self.sums, self._all_reduce = [], dist.all_reduce

        def counted(tensor, *args, **kwargs):
            self.sums.append(tuple(tensor.shape))
            return self._all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_):
        dist.all_reduce = self._all_reduce


class Batches:
    def __init__(self, x, size=37):
        self.x, self.size = x, size

    def __iter__(self):
        for i in range(0, len(self.x), self.size):
            yield self.x[i : i + self.size]


def fit(params, x, weights=None, **more):
    with quiet(), Counted() as asked:
        gm = GaussianMixture(**params).fit(x, sample_weight=weights, process_group=None, **more)
    gm.sums = asked.sums
    return gm


def check(ranks, params, shards, whole, weights=(None, None), whole_weights=None, rtol=1e-12):
    """Both ranks have the fit of the whole, and the same bits."""
    a, b = ranks.run(fit, *((params, x, w) for x, w in zip(shards, weights, strict=True)))
    for name in (*LEARNED, "lower_bounds_"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    with quiet():
        want = GaussianMixture(**params).fit(whole, sample_weight=whole_weights)
    same_fit(a, want, rtol=rtol)
    return a, want


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_fit_of_the_whole(ranks, covariance_type, weighted):
    params = dict(n_components=3, covariance_type=covariance_type, random_state=0, max_iter=20)
    weights = (W[:190], W[190:]) if weighted else (None, None)
    a, _ = check(ranks, params, SHARDS, X, weights, W if weighted else None)
    numbers = 2 + 3 + 9 + {"full": 27, "tied": 9, "diag": 9, "spherical": 3}[covariance_type]
    assert a.sums == [(numbers + 1,)] * a.n_iter_  # one all-reduce per iteration, of the statistics
    assert a.n_iter_ > 2 and a.n_features_in_ == 3


def test_until_convergence(ranks):
    """Many iterations, several starts: the ranks stop in the same one and keep the same start."""
    a, want = check(ranks, dict(n_components=3, init_params="random_from_data", n_init=3, random_state=1, tol=1e-7,
                                max_iter=400), SHARDS, X, rtol=1e-9)
    assert a.converged_ and a.n_iter_ == want.n_iter_ > 20


@pytest.mark.parametrize("random_state", [None, 0])
def test_ranks_agree_without_a_seed(ranks, random_state):
    """The start is that of rank 0, whatever the others would draw."""
    params = dict(n_components=3, init_params="random", max_iter=5, random_state=random_state)
    a, b = ranks.run(fit, (params, SHARDS[0]), ({**params, "random_state": 7, "init_params": "kmeans"}, SHARDS[1]))
    for name in LEARNED:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize("shards", [(X, NOTHING), (NOTHING, X), (X[:1], X[1:])], ids=["none on 1", "none on 0", "one"])
def test_few_rows(ranks, shards):
    check(ranks, dict(n_components=3, random_state=0), shards, X)
    single = X.astype(np.float32)
    shards = tuple(x if not len(x) else x.astype(np.float32) for x in shards)  # no rows: no dtype to mind
    a, _ = check(ranks, dict(n_components=3, random_state=0, max_iter=5), shards, single, rtol=1e-4)
    assert a.means_.dtype == np.float32


def test_weights(ranks):
    """A shard where nothing counts, one without weights: its rows have weight 1."""
    params = dict(n_components=3, random_state=0, max_iter=10)
    check(ranks, params, SHARDS, X, (np.zeros(190), W[190:]), np.r_[np.zeros(190), W[190:]])
    check(ranks, params, SHARDS, X, (None, W[190:]), np.r_[np.ones(190), W[190:]])
    check(ranks, params, (NOTHING, X), X, ([], W), W)


def test_missing_values(ranks):
    """Also a feature that one rank never sees."""
    Y = holes(X)
    Y[:190, 1] = np.nan
    Y[5] = np.nan
    check(ranks, dict(n_components=2, random_state=0, max_iter=10), (Y[:190], Y[190:]), Y, rtol=1e-10)


@pytest.mark.parametrize("kind", ["batches", "tensor"])
def test_kinds(ranks, kind):
    make = {"batches": Batches, "tensor": torch.from_numpy}[kind]
    check(ranks, dict(n_components=3, random_state=0, max_iter=10), [make(x) for x in SHARDS], X)


def test_given_start(ranks):
    check(ranks, dict(n_components=3, weights_init=[0.2, 0.3, 0.5], means_init=X[:3], max_iter=8,
                      precisions_init=np.stack([np.eye(3)] * 3)), SHARDS, X)


def go_on(params, x, more):
    with quiet():
        gm = GaussianMixture(**params, warm_start=True).fit(x, process_group=None)
        return gm.set_params(max_iter=more).fit(x, process_group=None)


def test_warm_start(ranks):
    params = dict(n_components=3, random_state=0, max_iter=3, tol=1e-4)
    a, b = ranks.run(go_on, *((params, x, 200) for x in SHARDS))
    with quiet():
        want = GaussianMixture(**params, warm_start=True).fit(X).set_params(max_iter=200).fit(X)
    same_fit(a, want, rtol=1e-10)
    same_fit(b, a, rtol=0)


def sample(x, limit):
    """The rows of the start, as rank 0 has them."""
    found, original, _rows.RESERVOIR_ROWS = [], _rows.RESERVOIR_ROWS, limit
    start = GaussianMixture._start
    GaussianMixture._start = lambda self, x, weights, *more: found.append((x, weights)) or start(
        self, x, weights, *more)
    try:
        fit(dict(n_components=2, random_state=3, max_iter=1), x, np.arange(1.0, 1 + len(x)))
    finally:
        _rows.RESERVOIR_ROWS, GaussianMixture._start = original, start
    return found


def test_many_rows_start_from_a_sample(ranks):
    """Of every rank its share, seeded, each row with its weight; rank 1 starts nothing."""
    first, second = np.arange(500.0)[:, None], np.arange(1000.0, 1301.0)[:, None]
    ((x, weights),), nothing = ranks.run(sample, (first, 90), (second, 90))
    assert nothing == [] and x.shape == (90, 1) and len(set(x[:, 0].tolist())) == 90
    assert (x < 1000).sum() == 56 and torch.equal(x.sort(0)[0], x)
    assert torch.equal(weights, torch.where(x < 1000, x + 1, x - 999)[:, 0])
    assert 200 < x[x < 1000].mean() < 300  # not the first ones
    again = ranks.run(sample, (first, 90), (second, 90))[0][0]
    assert torch.equal(again[0], x)


def told(x, stop_at):
    seen = []

    def callback(progress):
        seen.append(progress)
        return progress.n_iter == stop_at

    gm = fit(dict(n_components=3, random_state=0, tol=0.0), x, callback=callback if stop_at else None)
    return gm.n_iter_, [progress.lower_bound for progress in seen]


def test_callback(ranks):
    """Any rank may have one, and any may stop."""
    assert [n for n, _ in ranks.run(told, (SHARDS[0], 4), (SHARDS[1], 3))] == [3, 3]
    (n, none), (m, seen) = ranks.run(told, (SHARDS[0], None), (SHARDS[1], 5))
    assert (n, m, none, len(seen)) == (5, 5, [], 5) and np.diff(seen).min() > 0


# what one rank does wrong, all raise ----------------------------------------------------------------------------------


BAD = {
    "infinity": (({}, np.where(X == X[0, 0], np.inf, X)), "ValueError", "Input X contains infinity"),
    "features": (({}, X[:, :2]), "ValueError", "the number of features of X must be the same on every rank"),
    "parameter": (({"tol": 1.0}, X), "ValueError", "tol must be the same on every rank, got 0.001 on rank 0 and 1.0"),
    "bad parameter": (({"n_init": -1}, X), "InvalidParameterError", "The 'n_init' parameter"),
    "dtype": (({}, X.astype(np.float32)), "ValueError", "dtype of X must be the same on every rank"),
    "no batches": (({}, Batches(X[:0])), "ValueError", "X gave no batch of rows"),
    "weights": (({}, X, -W), "ValueError", "Negative values in data passed to `sample_weight`"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_rank_fails(ranks, name):
    (params, *rest), kind, text = BAD[name]
    good = dict(n_components=2, random_state=0)
    (other, said), (own, cause) = ranks.run(fit, (good, SHARDS[0]), ({**good, **params}, *rest), fails=True)
    assert own == kind and text in cause
    if name in ("infinity", "bad parameter", "no batches", "weights"):
        assert other == "RuntimeError" and "fit failed on rank 1 of the process group: " in said and text in said
    else:
        assert (other, said) == (own, cause)
    fit_again = ranks.run(fit, (good, SHARDS[0]), (good, SHARDS[1]))  # nobody still waits
    assert fit_again[0].converged_


def test_nothing_to_fit(ranks):
    params = dict(n_components=2, random_state=0)
    zeros = np.zeros(190), np.zeros(110)
    for arguments, text in (
        (((params, NOTHING), (params, NOTHING)), "Found array with 0 sample"),
        (((params, X[:1]), (params, NOTHING)), "Found array with 1 sample"),
        (((params, SHARDS[0], zeros[0]), (params, SHARDS[1], zeros[1])), "No row of any rank counts"),
        ((({**params, "n_components": 5}, X[:2]), ({**params, "n_components": 5}, X[2:4])),
         "Expected n_samples >= n_components but got n_components = 5, n_samples = 4"),
        (((params, np.where([False, True, False], np.nan, SHARDS[0])),
          (params, np.where([False, True, False], np.nan, SHARDS[1]))),
         "features without any observed value: [1]"),
        ((({**params, "means_init": np.zeros((3, 3))}, SHARDS[0]), (params, SHARDS[1])), "'means' should have"),
    ):
        for _, said in ranks.run(fit, *arguments, fails=True):
            assert text in said


class Breaks(Batches):
    """A file that cannot be read any more on the third pass."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        if self.passes == 3:
            raise OSError("the disk is gone")
        yield from super().__iter__()


def broken_callback(x, breaks):
    def callback(progress):
        raise KeyError("mine")

    return fit(dict(n_components=2, random_state=0), x, callback=callback if breaks else None)


def test_failure_between_iterations(ranks):
    params = dict(n_components=2, random_state=0, tol=0.0)
    (_, said), (own, cause) = ranks.run(fit, (params, SHARDS[0]), (params, Breaks(SHARDS[1])), fails=True)
    assert own == "OSError" and "the disk is gone" in cause
    assert "another rank" in said
    (_, said), (own, _) = ranks.run(broken_callback, (SHARDS[0], False), (SHARDS[1], True), fails=True)
    assert own == "KeyError" and "rank 1 of the process group: KeyError: 'mine'" in said


def in_group(members, x):
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        with pytest.raises((ValueError, TypeError)):
            GaussianMixture(2).fit(x, process_group=group)
        return None
    with quiet():
        return GaussianMixture(2, random_state=0).fit(x, process_group=group)


def test_a_group_of_some(ranks):
    """Rank 0 of a group need not be rank 0 of all."""
    for members in ([1], [0]):
        found = ranks.run(in_group, (members, SHARDS[0]), (members, SHARDS[1]))
        assert found[1 - members[0]] is None
        with quiet():
            same_fit(found[members[0]], GaussianMixture(2, random_state=0).fit(SHARDS[members[0]]), rtol=1e-12)


def test_not_initialised():
    for group in (None, dist.group.WORLD, "world"):
        with pytest.raises(ValueError, match="torch.distributed is not initialised"):
            GaussianMixture(2).fit(X, process_group=group)
