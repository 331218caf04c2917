"""k-means at the edges of its CUDA kernels: tiles of rows, centres and features, slabs, groups, blocks with several
turns, empty centres, data sets that end at different times, draws at the ends. Numbers are multiples of 1/8 where
results must be equal: then no distance is rounded, in float32 either."""

import sys

import pytest
import torch

import cases
from gmkernels import ops, reference
from gmkernels.ops.kmeans import local_trials
from kmeans_cases import F32, F64, clusters, uniforms_of, weights_of

MODULE = sys.modules["gmkernels.ops.kmeans"]  # ops.kmeans is the function
EDGE = 1 - 2.0**-53


def eighths(t):
    return (t * 8).round() / 8


def drawn(n, d, k, dtype=F64, weighted=True, batch=()):
    """Rows with some twice, weights with some 0, centres with one twice."""
    x = eighths(clusters(n, d, batch=batch, dtype=dtype))
    x[..., n // 2, :] = x[..., 0, :]
    w = eighths(weights_of(*batch, n, dtype=dtype)) if weighted else None
    if weighted:
        w[..., 0] = 1.0
        w[..., 1::5] = 0.0
    start = x[..., :k, :].clone()
    start[..., k - 1, :] = start[..., 0, :]
    return x, start, w


def run(device, x, start, w, max_iter=0, tol=0.0):
    on = [None if t is None else t.to(device.torch) for t in (x, start, w)]
    got = ops.kmeans(on[0], init=on[1], sample_weight=on[2], max_iter=max_iter, tol=tol)
    return ops.KMeansResult(*(t.cpu() for t in got))


def check(device, x, start, w, max_iter=0, tol=0.0):
    """Beside the reference in float64: labels and inertia of the start are equal."""
    got = run(device, x, start, w, max_iter, tol)
    want = reference.kmeans.kmeans(x.double(), start.double(), None if w is None else w.double(), max_iter, tol)
    if max_iter == 0:
        assert torch.equal(got.centers, start.expand(got.centers.shape)) and torch.equal(got.inertia, want[2])
    else:
        cases.close(got.centers, want[0])
        cases.close(got.inertia, want[2], rtol=1e-12 if x.dtype is F64 else 1e-5, atol=1e-12)
    if max_iter == 0 or x.dtype is F64:
        assert torch.equal(got.labels, want[1]) and torch.equal(got.n_iter, want[3])
    return got


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# tiles ----------------------------------------------------------------------------------------------------------------

# n, d, k: a tile has 256 rows up to 16 features (float64: 8), 128, 64, 32; 64 (32) features at a time beyond 128 (64);
# 8 centres at a time, and as many as 16 KB hold; sums in shared memory as long as k (d + 1) is at most 2048.
TILES = [(1, 1, 1), (255, 1, 2), (256, 2, 7), (257, 3, 8), (130, 8, 9), (129, 9, 16), (130, 16, 17), (65, 17, 3),
         (66, 32, 9), (33, 33, 5), (70, 64, 34), (40, 65, 33), (35, 129, 4), (34, 257, 9), (60, 40, 50), (90, 24, 82)]


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("n, d, k", TILES)
def test_tiles(device, n, d, k, dtype):
    data = drawn(n, d, k, dtype)
    check(device, *data)
    assert equal(check(device, *data, max_iter=1), run(device, *data, max_iter=1))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_x_at_an_odd_address(device, dtype):
    x, start, w = drawn(20, 5, 3, dtype)
    odd = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    assert equal(run(device, odd, start, w, 1), run(device, x, start, w, 1))


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_no_features(device, batch):
    x, start, w = torch.zeros(*batch, 5, 0), torch.zeros(2, 0), torch.tensor([0.0, 1, 2, 0, 1])
    for max_iter in (0, 3):
        got = run(device, x, start, w, max_iter, 1e-4)
        assert (got.labels == 0).all() and (got.inertia == 0).all() and got.labels.shape == (*batch, 5)
        assert (got.n_iter == min(max_iter, 1)).all()


def test_first_of_equal_centres(device):
    """In one group of centres, in two, and in the threads that share a row."""
    for d in (1, 40):
        x = torch.zeros(3, d, dtype=F64)
        for same in ((1, 2), (2, 17), (9, 30), (8, 16)):
            start = torch.ones(33, d, dtype=F64)
            start[list(same)] = 0.5
            got = run(device, x.repeat(11, 1), start, None)
            assert (got.labels == same[0]).all()


# slabs, blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slabs", [1, 2, 3, 5, 40])
def test_slabs(device, monkeypatch, slabs):
    """Of whole tiles, the last not filled, or none left for some."""
    monkeypatch.setattr(MODULE, "_slabs", lambda b, n, k, d: (slabs, max(k * (d + 1) + 2, 2 * d + 1)))
    for n, d, k in [(600, 3, 2), (150, 34, 3), (70, 34, 64)]:
        x, start, w = drawn(n, d, k)
        check(device, x, start, w)
        check(device, x, start, w, max_iter=2, tol=1e-3)


@pytest.mark.parametrize("blocks", [1, 2])
def test_more_jobs_than_blocks(device, blocks):
    """A block with several turns, after one of a data set that is done too."""
    x, start, w = drawn(520, 3, 4, batch=(3,))
    x[1], start[1] = x[1].round(), torch.tensor([[1.0, 1, 1], [9, 9, 9], [30, 30, 30], [40, 40, 40]])
    x[1, :, 1:] = x[1, :, :1]
    want = check(device, x, start, w, max_iter=5)
    large = drawn(70, 40, 60, batch=(2,))
    sums = run(device, *large, max_iter=1)
    u = uniforms_of(3, 1, 2)
    rows = x[:2].repeat(1, 4, 1).to(device.torch)
    chosen = ops.kmeans_plus_plus(rows, 3, uniforms=u.to(device.torch))
    with cases.few_blocks(device, blocks):
        assert equal(run(device, x, start, w, max_iter=5), want)
        assert equal(run(device, *large, max_iter=1), sums)
        assert equal(ops.kmeans_plus_plus(rows, 3, uniforms=u.to(device.torch)), chosen)


def test_workspace():
    """Slabs follow from sizes, and their sums stay below 256 MB where one slab does."""
    for b, n, k, d in [(1, 1, 1, 0), (1, 10**6, 64, 16), (1, 10**6, 1024, 128), (5000, 200, 8, 4), (1, 10**5, 9999, 9)]:
        count, numbers = MODULE._slabs(b, n, k, d)
        assert 1 <= count <= min(1056, -(-n // 256)) and numbers >= max(k * (d + 1) + 2, 2 * d + 1)
        assert count == 1 or 8 * b * count * numbers <= 256 << 20


# data sets ------------------------------------------------------------------------------------------------------------


def test_data_sets_end_at_different_times(device):
    x = torch.stack([clusters(90, 3, seed=seed, spread=30.0 if seed == 0 else 1.0) for seed in (0, 11, 12)])
    start = x[:, :4].clone()
    got = check(device, x, start, None, max_iter=300)
    assert len(got.n_iter.unique()) == 3 and got.n_iter.max() > 8
    for i in range(3):
        assert equal([t[i] for t in got], run(device, x[i], start[i], None, max_iter=300))
    short = check(device, x, start, None, max_iter=int(got.n_iter.min()) + 1)
    assert len(short.n_iter.unique()) == 2


def test_any_number_of_iterations(device):
    """The host hears that all is done."""
    x, start, w = drawn(60, 2, 3)
    got = check(device, x, start, w, max_iter=2**31 - 1)
    for max_iter in (int(got.n_iter), int(got.n_iter) - 1, 7, 8, 9, 16):
        check(device, x, start, w, max_iter=max_iter)


def test_shared_among_data_sets(device):
    """Rows, weights or start of all."""
    x, start, w = drawn(50, 3, 4, batch=(2,))
    for one in range(3):
        args = [t[:1] if i == one else t for i, t in enumerate((x, start, w))]
        wide = [t.expand(2, *t.shape[1:]).contiguous() for t in args]
        assert equal(check(device, *args, max_iter=2), run(device, *wide, max_iter=2))
    assert equal(check(device, x[0], start, w[0], max_iter=2), run(device, x[:1], start, w[:1], max_iter=2))


def test_tolerance(device):
    """In units of the weighted mean variance: it ends where the reference does; far from the origin too."""
    ends = set()
    for d in (1, 3, 300):
        x, start, w = drawn(90, d, 4)
        for tol in (0.0, 1e-3, 1e-2, 0.1, 1.0, 1e3):
            ends.add((d, int(check(device, x + 64.0, start + 64.0, w, max_iter=12, tol=tol).n_iter)))
    assert len(ends) > 6


# empty centres --------------------------------------------------------------------------------------------------------


def on_cpu(x, start, w, max_iter):
    with cases.cpu_kernels():
        return ops.kmeans(x, init=start, sample_weight=w, max_iter=max_iter, tol=0.0)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_empty_centres(device, dtype):
    """They take the farthest rows, of equals the first, none of weight 0."""
    x, _, w = drawn(300, 2, 2, dtype)
    x[7], x[260], x[33], x[35] = x[9], x[9], 100.0, 100.0
    w[[7, 260, 33, 35, 9]] = 1.0
    x[44], w[44] = -1000.0, 0.0
    for k, first in ((4, 0), (9, 3), (40, 20)):
        start = torch.full((k, 2), 1e5, dtype=dtype)
        start[first], start[k - 1] = x[0], x[2]
        for max_iter in (1, 2):
            got = check(device, x, start, w, max_iter)
            cases.close(got.centers, on_cpu(x, start, w, max_iter).centers)
    assert run(device, x, start, w, 30).labels[w > 0].unique().numel() == 40


def test_farthest_row_of_equals(device):
    x = torch.tensor([[0.0], [3.0], [-3.0], [0.0], [3.0], [-3.0], [1.0]], dtype=F64)
    far = torch.tensor([[0.0], [90.0], [91.0], [92.0]], dtype=F64)
    got = check(device, x, far, None, 1)
    assert sorted(got.centers[1:, 0].tolist()) == [-3.0, 3.0, 3.0] and got.centers[2, 0] == -3.0


def test_a_centre_loses_its_only_row(device):
    x = torch.tensor([[0.0], [0.0], [10.0], [0.0], [0.0]], dtype=F64)
    for start in ([0.0, 10.5, 1e3, 2e3], [0.0, 1e3, 10.5, 2e3], [1e3, 2e3, 10.5, 0.0]):
        start = torch.tensor(start, dtype=F64)[:, None]
        for max_iter in (1, 5):
            got = run(device, x, start, None, max_iter)
            assert equal(got, on_cpu(x, start, None, max_iter)) and got.centers.isfinite().all()


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_fewer_distinct_rows_than_centres(device, dtype):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype).repeat(20, 1)
    w = torch.ones(40, dtype=dtype)
    w[0] = 0.0
    start, chosen = (t.cpu() for t in ops.kmeans_plus_plus(x.to(device.torch), 5, seed=0,
                                                         sample_weight=w.to(device.torch)))
    assert len({*start[:, 0].tolist()}) == 2 and 0 not in chosen.tolist()
    got = run(device, x, start, w, 300, 1e-4)
    assert got.inertia == 0 and torch.equal(got.centers[got.labels], x) and got.centers.isfinite().all()
    same = run(device, x[:1].expand(9, 2), x[:1].repeat(4, 1), None, 9)
    assert same.inertia == 0 and (same.labels == 0).all() and torch.equal(same.centers, x[:1].repeat(4, 1))


def test_rows_without_weight(device):
    """They have a label, and count nowhere, wherever they lie."""
    x, start, w = drawn(70, 3, 4)
    live = w > 0
    x[~live] = 1e4
    got, alone = (run(device, *args, 9) for args in ((x, start, w), (x[live], start, w[live])))
    cases.close(got.centers, alone.centers)
    cases.close(got.inertia, alone.inertia)
    assert torch.equal(got.labels[live], alone.labels) and got.labels.min() >= 0
    chosen = ops.kmeans_plus_plus(x.to(device.torch), 20, sample_weight=w.to(device.torch), seed=0)[1].cpu()
    assert live[chosen].all()


# k-means++ ------------------------------------------------------------------------------------------------------------


def chosen(device, x, k, w=None, u=None, trials=None):
    """The rows, beside the reference's."""
    trials = local_trials(k) if trials is None else trials
    u = torch.rand(1 + (k - 1) * trials, dtype=F64, generator=torch.Generator().manual_seed(k)) if u is None else u
    on = [None if t is None else t.to(device.torch) for t in (x, w, u)]
    made = ops.kmeans_plus_plus(on[0], k, sample_weight=on[1], uniforms=on[2], n_local_trials=trials)
    centers, rows = (t.cpu() for t in made)
    want = reference.kmeans.kmeans_plus_plus(x.double(), u, None if w is None else w.double(), k, trials)[1]
    assert rows.tolist() == want.tolist()
    assert torch.equal(centers, x[rows])
    return rows


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_candidates(device, dtype):
    """One, seven with the centre in a group of eight points, and one more; features in several turns."""
    for n, d, k, trials in [(1, 3, 1, 2), (40, 3, 4, 1), (40, 9, 3, 7), (40, 17, 3, 8), (30, 2, 2, 20), (12, 33, 12, 3),
                            (300, 1, 3, 2), (257, 16, 2, 3)]:
        x, _, w = drawn(n, d, 1, dtype)
        chosen(device, x, k, w if n > 1 else None, trials=trials)
    chosen(device, torch.zeros(5, 0, dtype=dtype), 3, torch.tensor([0, 0, 1, 0, 1], dtype=dtype))


def test_groups_of_rows(device):
    """Rows around a group; groups without mass; draws at both ends."""
    for n in (2048, 2049):
        x, _, w = drawn(n, 1, 1)
        chosen(device, x, 2, w)
        for u in (0.0, EDGE):
            chosen(device, x, 2, None if u else w, torch.full((2,), u, dtype=F64), trials=1)
    x = torch.zeros(6200, 1, dtype=F64)
    x[[4100, 6199]] = torch.tensor([[1.0], [2.0]], dtype=F64)
    rows = chosen(device, x, 4, None, torch.tensor([0.0] + [0.5] * 3, dtype=F64), trials=1)
    assert rows.tolist() == [0, 6199, 4100, 0]
    w = torch.zeros(6200, dtype=F64)
    w[[2050, 4100, 6199]] = 1.0
    assert sorted(chosen(device, x, 3, w, trials=1).tolist()) == [2050, 4100, 6199]


def test_first_of_equal_candidates(device):
    """Both leave nothing."""
    x = torch.tensor([[0.0], [0.0], [1.0], [1.0], [1.0]], dtype=F64)
    u = torch.tensor([0.1, 0.99, 0.01], dtype=F64)
    assert chosen(device, x, 2, None, u, trials=2).tolist() == [0, 4]


def test_same_bits_twice(device):
    x, start, w = (t.to(device.torch) for t in drawn(300, 5, 4, F32))
    for f in (lambda: ops.kmeans(x, init=start, sample_weight=w, max_iter=3),
              lambda: ops.kmeans_plus_plus(x, 4, sample_weight=w, seed=1)):
        assert equal(f(), f())


def test_draws_of_many_data_sets(device):
    x = eighths(clusters(60, 3, batch=(3,)))
    u = torch.rand(3, 1 + 4 * 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    got = ops.kmeans_plus_plus(x.to(device.torch), 5, uniforms=u.to(device.torch), n_local_trials=3)[1].cpu()
    for i in range(3):
        assert got[i].tolist() == chosen(device, x[i], 5, None, u[i], trials=3).tolist()
    shared = ops.kmeans_plus_plus(x[0].to(device.torch), 5, uniforms=u.to(device.torch), n_local_trials=3)[1].cpu()
    assert torch.equal(shared[0], got[0]) and not torch.equal(shared[1], shared[2])
