"""Edges of EM's kernels that the tests by shape do not meet: groups and tiles of rows, more components than threads,
more mixtures and matrices than blocks, rows and components that do not count, sums that are no sums of rows."""

import dataclasses
import math

import pytest
import torch

import cases
from gmkernels import ops, reference
from gmkernels.ops import gmm as gmm_module
from gmkernels.ops import gmm_em as em_module
from test_gmm import F32, F64, INF, NAN, TYPES, mixture
from test_gmm_em import PARTS, ROWS, check, weights_of

NAMES = ("weights", "log_weights", "means", "covariances", "precisions_cholesky")


def parts(stat):
    return [getattr(stat, name).cpu() for name in PARTS]


def drawn(n, d, k, covariance_type, dtype, device, **options):
    """A mixture and weights of its rows; a call a second time has the same bits."""
    args = mixture(n, d, k, covariance_type, dtype, device.torch, **options)
    return args, weights_of(*options.get("batch", ()), n, dtype=dtype).to(device.torch)


def sums_of(b, k, d, covariance_type, seed=0):
    """Statistics [b] of some rows, about a shift that is none of the means, made on the CPU."""
    n = 3 * d + 20
    g = torch.Generator().manual_seed(seed)
    r = torch.rand(b, n, k, dtype=F64, generator=g) ** 4
    t = torch.randn(b, n, d, dtype=F64, generator=g) + torch.arange(d) % 3
    shift = torch.randn(b, d, dtype=F64, generator=g)
    sums = reference.gmm_em.sums_of(r, t, r.sum((1, 2)), r.sum((1, 2)), covariance_type)
    return ops.GmmStatistics(sums, shift, covariance_type, k)


def check_m_step(stat, device, reg_covar=0.0, dtype=F64, rtol=1e-9):
    """Against the reference, from the same sums. "rtol": of the largest number."""
    there = dataclasses.replace(stat, sums=stat.sums.to(device.torch), shift=stat.shift.to(device.torch))
    made = ops.gmm_m_step(there, reg_covar=reg_covar, dtype=dtype)
    again = ops.gmm_m_step(there, reg_covar=reg_covar, dtype=dtype)
    want = reference.gmm_em.gmm_m_step(stat.sums, stat.shift, stat.covariance_type, stat.k, reg_covar, F64)
    assert torch.equal(made.status.cpu(), want[5]), (made.status, want[5])
    for name, w in zip(NAMES, want, strict=False):
        got = getattr(made, name)
        assert got.dtype is dtype and got.shape == w.shape
        assert torch.equal(got.nan_to_num(), getattr(again, name).nan_to_num())
        finite = w[w.isfinite()]
        scale = finite.abs().max().item() if len(finite) else 1.0
        bound = rtol if dtype is F64 else 1e-6
        torch.testing.assert_close(got.cpu().double(), w, rtol=bound, atol=bound * scale, equal_nan=True,
                                   msg=lambda m, name=name: f"{name}: {m}")
    return made


# E-step --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_small_sizes(device, covariance_type, dtype):
    """One of each, one component, one feature, a tile and one row, and no rows."""
    for n, d, k in [(3, 1, 2), (9, 2, 1), (17, 8, 3), (2, 5, 9)]:
        args, weights = drawn(n, d, k, covariance_type, dtype, device)
        stat = check(args, covariance_type, weights)
        assert torch.equal(ops.gmm_em_statistics(*args, covariance_type, weights).sums, stat.sums)
        assert stat.s2.shape == reference.gmm.covariance_shape(covariance_type, k, d)
        empty = check([args[0][:0], *args[1:]], covariance_type, weights[:0])
        assert (empty.sums == 0).all() and torch.equal(empty.shift, stat.shift)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_batches_that_share(device, covariance_type, dtype):
    """Every mixture its own rows, parameters, weights, shift; or some of these shared by all, in turn."""
    (x, lw, means, p), weights = drawn(4, 9, 2, covariance_type, dtype, device, batch=(3,))
    shift = cases.data(3, 9, device=device.torch, seed=5)
    own = [x, lw, means, p, weights, shift]
    for i in range(len(own) + 1):
        args = [t[0] if j == i else t for j, t in enumerate(own)]
        stat = check(args[:4], covariance_type, *args[4:])
        assert stat.nk.shape == (3, 2)
        assert torch.equal(stat.shift, args[5].to(dtype).double().expand(3, 9))
    shared = check([x, lw[0], means[0], p[0]], covariance_type, weights)
    assert shared.shift.shape == (3, 9) and torch.equal(shared.shift[0], shared.shift[2])


@pytest.mark.parametrize("n", [ROWS - 1, ROWS, ROWS + 1])
def test_rows_around_a_group(device, n):
    """Log-likelihood and weight are added group by group, for each of two mixtures."""
    args, weights = drawn(n, 1, 1, "spherical", F64, device, batch=(2,))
    stat = check(args, "spherical", weights)
    cases.close(stat.weight, weights.sum(-1), rtol=1e-13)
    lp = ops.gmm_log_prob(*args, "spherical")
    cases.close(stat.log_likelihood, (lp * weights).sum(-1), rtol=1e-12)


def test_groups_on_few_blocks(device):
    """Five jobs of one block: every sum begins at 0."""
    args, weights = drawn(ROWS + 1, 1, 1, "diag", F32, device, batch=(2,))
    want = ops.gmm_em_statistics(*args, "diag", weights)
    with cases.few_blocks(device, 1):
        assert torch.equal(ops.gmm_em_statistics(*args, "diag", weights).sums, want.sums)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_few_blocks(device, covariance_type, dtype):
    """Numbers, features and components over which one block goes on, and the same bits."""
    args, weights = drawn(5, 9, 4, covariance_type, dtype, device, batch=(4,))
    want = check(args, covariance_type, weights)
    r = ops.gmm_responsibilities(*args, covariance_type)
    with cases.few_blocks(device, 1):
        assert torch.equal(ops.gmm_em_statistics(*args, covariance_type, weights).sums, want.sums)
        assert torch.equal(ops.gmm_responsibilities(*args, covariance_type), r)


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_slabs(device, covariance_type, monkeypatch):
    """Rows in three slabs, of which the last is empty or has one row."""
    monkeypatch.setattr(gmm_module, "_SLAB_ROWS", 43)
    for n in (128, 129):
        for dtype, d in ((F32, 9), (F64, 2)):
            args, weights = drawn(n, d, 1, covariance_type, dtype, device)
            weights[-1] = 100
            check(args, covariance_type, weights)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_rows_of_weight_0(device, covariance_type, dtype):
    """Whatever they hold: nothing of it arrives. Those with an infinity count, and their weight."""
    for d in (2, 9):
        (x, *rest), weights = drawn(12, d, 2, covariance_type, dtype, device)
        weights[[0, 5, 11]] = 0
        want = check([x, *rest], covariance_type, weights)
        x = x.clone()
        x[0], x[5, 1], x[11] = NAN, NAN, INF
        assert torch.equal(ops.gmm_em_statistics(x, *rest, covariance_type, weights).sums, want.sums)
        x[3, 1] = INF
        stat = check([x, *rest], covariance_type, weights)
        assert stat.log_likelihood == -INF
        cases.close(stat.weight, want.weight)
        assert (stat.nk.sum() < want.nk.sum()).item()
        weights[5] = 1e-3
        stat = ops.gmm_em_statistics(x, *rest, covariance_type, weights)
        assert all(part.isnan().all() for part in (stat.log_likelihood, stat.nk, stat.s1, stat.s2))
        assert stat.weight.isfinite()
        weights.zero_()
        assert (ops.gmm_em_statistics(x, *rest, covariance_type, weights).sums == 0).all()


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_components_that_do_not_count(device, covariance_type, dtype):
    """Without weight, with a zero on the diagonal, so far away that no row is theirs: exact zeros, and the shift is
    that of the others."""
    for d in (2, 9):
        x, lw, means, p = mixture(6, d, 4, covariance_type, dtype, device.torch)
        lw[0], means[0] = -INF, NAN
        means[3] = 1e15
        if covariance_type != "tied":
            p[0] = NAN
            lw[1] = -60.0
            p[1].view(-1)[: 1 if covariance_type == "full" else None] = 0
        stat = ops.gmm_em_statistics(x, lw, means, p, covariance_type, shift=x[0])
        gone = [0, 3] if covariance_type == "tied" else [0, 1, 3]
        kept = [i for i in range(4) if i not in gone]
        assert (stat.nk[gone] == 0).all() and (stat.s1[gone] == 0).all() and stat.sums.isfinite().all()
        want = ops.gmm_em_statistics(x, lw[kept], means[kept], p if covariance_type == "tied" else p[kept],
                                     covariance_type, shift=x[0])
        assert covariance_type == "tied" or (stat.s2[gone] == 0).all()
        pairs = zip((stat.nk[kept], stat.s1[kept], stat.s2 if covariance_type == "tied" else stat.s2[kept]),
                    (want.nk, want.s1, want.s2), strict=True)
        for got, w in pairs:  # the CPU makes the sums in float64 where a mean is far from the shift
            bound = 1e-5 if device.name == "cpu" or cases.rehearsal else 0.0
            cases.close(got, w, rtol=bound, atol=bound)
        r = ops.gmm_responsibilities(x, lw, means, p, covariance_type)
        assert (r[:, gone] == 0).all() and torch.equal(r[:, kept], ops.gmm_responsibilities(
            x, lw[kept], means[kept], p if covariance_type == "tied" else p[kept], covariance_type))


def test_default_shift(device):
    """Of weights that are no probabilities, some of none, and of none at all."""
    x = torch.zeros(1, 2, device=device.torch)
    means = torch.tensor([[1.0, -2.0], [4.0, 8.0], [NAN, INF]], device=device.torch)
    share = 1 / (1 + math.exp(-1))
    for lw, want in (([3.0, 3.0, -INF], [2.5, 3.0]), ([-800.0, -INF, -INF], [1.0, -2.0]), ([-INF] * 3, [0.0, 0.0]),
                     ([700.0, 701.0, -INF], [1 + 3 * share, -2 + 10 * share])):
        lw = torch.tensor(lw, device=device.torch)
        stat = ops.gmm_em_statistics(x, lw, means, torch.ones(3, device=device.torch), "spherical")
        cases.close(stat.shift, torch.tensor(want), rtol=1e-6)
        assert torch.equal(stat.shift, stat.shift.float().double())


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_the_shift_is_rounded_to_the_dtype(device, dtype):
    args = mixture(3, 2, 2, "diag", dtype, device.torch)
    given = torch.tensor([0.1, 1 / 3], dtype=F64, device=device.torch)
    stat = check(args, "diag", None, given)
    assert torch.equal(stat.shift, given.to(dtype).double())
    assert torch.equal(ops.gmm_em_statistics(*args, "diag", shift=given.float()).shift, given.float().double())


@pytest.mark.parametrize("covariance_type", TYPES)
def test_a_stream_of_blocks(device, covariance_type):
    """`initial` is where the sums begin: with no rows they stay. A stream is the whole within rounding, and has the
    bits of the same blocks a second time."""
    (x, *rest), weights = drawn(24, 9, 2, covariance_type, F64, device, batch=(2,))
    whole = ops.gmm_em_statistics(x, *rest, covariance_type, weights)
    streams = []
    for _ in range(2):
        stat = None
        for begin, end in ((0, 7), (7, 7), (7, 24)):
            before = stat
            stat = ops.gmm_em_statistics(x[:, begin:end], *rest, covariance_type, weights[:, begin:end], initial=stat)
            if begin == end:
                assert torch.equal(stat.sums, before.sums)
        streams.append(stat)
    assert torch.equal(streams[0].sums, streams[1].sums) and torch.equal(streams[0].shift, whole.shift)
    for got, want in zip(parts(streams[0]), parts(whole), strict=True):
        cases.close(got, want, rtol=1e-12, atol=1e-12 * want.abs().max().item())


@pytest.mark.parametrize("covariance_type", TYPES)
def test_1000_standard_deviations_from_the_origin(device, covariance_type):
    """float32 covariances are within 1e-4 of float64's, with the shift in the midst of the data or at the origin."""
    x, lw, means, p = mixture(60, 9, 2, covariance_type, F64, device.torch)
    args = [t.float() for t in (x + 1000, lw, means + 1000, p)]
    wide = [t.double() for t in args]
    for shift in (None,) if device.name == "cpu" or cases.rehearsal else (None, torch.zeros(9, device=device.torch)):
        got = ops.gmm_m_step(ops.gmm_em_statistics(*args, covariance_type, shift=shift))
        want = ops.gmm_m_step(ops.gmm_em_statistics(*wide, covariance_type))
        bound = 1e-4 if shift is None else 3e-4
        cases.close(got.covariances, want.covariances, rtol=0, atol=bound * want.covariances.abs().max().item())
        cases.close(got.means, want.means, rtol=0, atol=2e-4)


# responsibilities ----------------------------------------------------------------------------------------------------


def check_responsibilities(args, covariance_type):
    got = ops.gmm_responsibilities(*args, covariance_type)
    want = reference.gmm_em.gmm_responsibilities(*(t.cpu().double() for t in args), covariance_type)
    exact = args[0].dtype is F64
    cases.close(got, want, rtol=1e-11 if exact else 2e-4, atol=1e-13 if exact else 1e-6)
    assert got.dtype is args[0].dtype and torch.equal(got, ops.gmm_responsibilities(*args, covariance_type))
    return got


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_responsibilities_by_shape(device, covariance_type, dtype):
    for n, d, k in [(1, 1, 1), (15, 9, 1), (16, 2, 3), (17, 3, 2)]:
        check_responsibilities(mixture(n, d, k, covariance_type, dtype, device.torch), covariance_type)
    args = mixture(2, 2, 3, covariance_type, dtype, device.torch, batch=(3,))
    for i in range(4):
        shared = [t[0] if j == i else t for j, t in enumerate(args)]
        assert check_responsibilities(shared, covariance_type).shape == (3, 2, 3)


@pytest.mark.parametrize("k", [127, 128, 129])
def test_responsibilities_of_more_components_than_threads(device, k):
    """Jobs are tiles of rows and groups of components of two mixtures, with a block each and on two blocks."""
    args = mixture(17, 1, k, "spherical", F64, device.torch, batch=(2,))
    want = check_responsibilities(args, "spherical")
    with cases.few_blocks(device, 2):
        assert torch.equal(ops.gmm_responsibilities(*args, "spherical"), want)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_responsibilities_of_odd_rows(device, covariance_type, dtype):
    """An infinity or far away: zeros. A NaN: NaN."""
    args = mixture(4, 9, 2, covariance_type, dtype, device.torch)
    args[0][0, 3], args[0][1, 2], args[0][2] = INF, NAN, 1e25 if dtype is F32 else 1e200
    got = ops.gmm_responsibilities(*args, covariance_type)
    assert (got[[0, 2]] == 0).all() and got[1].isnan().all() and got[3].isfinite().all()


# M-step --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_m_step_by_shape(device, covariance_type, dtype):
    """More entries, more components and more mixtures than threads or blocks' turns; every one its own."""
    for b, k, d in [(1, 1, 1), (2, 3, 2), (1, 2, 12), (3, 1, 3)]:
        for reg_covar in (0.0, 0.25):
            check_m_step(sums_of(b, k, d, covariance_type), device, reg_covar, dtype)


@pytest.mark.parametrize("k", [127, 128, 129])
def test_m_step_of_more_components_than_threads(device, k):
    for covariance_type in ("diag", "spherical", "tied"):
        stat = sums_of(1, k, 1, covariance_type)
        stat.nk[0, [1, k - 1]] = 0
        check_m_step(stat, device)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_m_step_on_few_blocks(device, covariance_type, monkeypatch):
    """One block goes on to the next mixture and matrix, dead ones between them; the workspace is of few matrices."""
    stat = sums_of(4, 3, 3, covariance_type)
    stat.nk[1, 0] = 0
    stat.nk[2] = 0
    stat.sums[3] = NAN
    want = check_m_step(stat, device)
    for matrices in (1, 5):
        monkeypatch.setattr(em_module, "_MATRICES", matrices)
        with cases.few_blocks(device, 2):
            got = ops.gmm_m_step(stat, reg_covar=0.0)
        for name in (*NAMES, "status"):
            assert torch.equal(getattr(got, name).nan_to_num(), getattr(want, name).nan_to_num())


@pytest.mark.parametrize("covariance_type", TYPES)
def test_no_longer_dead_than_2_to_the_minus_40(device, covariance_type):
    """At 2^-40 of the total a component is dead, above it is not."""
    for share, status in ((2.0**-40, 1), (1.001 * 2.0**-40, 0)):
        stat = sums_of(1, 2, 2, covariance_type)
        stat.nk[0, 1] = stat.nk[0, 0] * share / (1 - share)
        if covariance_type == "tied":
            stat.s1[0, 1] = 0
        else:
            stat.s1[0, 1], stat.s2[0, 1] = 0, 0
            size = (torch.eye(2) if covariance_type == "full" else torch.ones(2)).double() * stat.nk[0, 1]
            stat.s2[0, 1] = size if covariance_type != "spherical" else size[0]
        if abs(float(stat.nk[0, 1] / stat.nk[0].sum()) / 2.0**-40 - 1) < 1e-12 and status:
            assert stat.nk[0, 1] <= 2.0**-40 * stat.nk[0].sum()
        assert check_m_step(stat, device).status.tolist() == [[0, status]]


@pytest.mark.parametrize("covariance_type", TYPES)
def test_several_dead_components(device, covariance_type):
    """Each takes half of what is heaviest by then, and stands aside along the widest feature, each by its own."""
    stat = sums_of(2, 6, 3, covariance_type, seed=3)
    stat.nk[0, [0, 2, 5]] = 0
    stat.nk[1, :5] = 0
    made = check_m_step(stat, device)
    assert (made.status == 1).sum(1).tolist() == [3, 5]
    for b in range(2):
        assert len({tuple(m) for m in made.means[b].tolist()}) == 6
    cases.close(made.weights.sum(1), torch.ones(2))


@pytest.mark.parametrize("covariance_type", TYPES)
def test_nothing_at_all(device, covariance_type):
    """No weight, also in the middle of others: equal weights, unit covariances about the shift."""
    stat = sums_of(3, 2, 3, covariance_type)
    stat.sums[1] = 0
    made = check_m_step(stat, device)
    assert made.status.tolist() == [[0, 0], [1, 1], [0, 0]]
    assert torch.equal(made.means[1].cpu(), stat.shift[1].expand(2, 3)) and made.weights[1].tolist() == [0.5, 0.5]
    unit = torch.eye(3, dtype=F64) if covariance_type in ("full", "tied") else torch.ones((), dtype=F64)
    assert torch.equal(made.covariances[1].cpu(), unit.expand(made.covariances[1].shape))
    assert torch.equal(made.precisions_cholesky[1].cpu(), unit.expand(made.covariances[1].shape))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_a_constant_column(device, covariance_type, dtype):
    """Singular, in one mixture of three; the others are not touched. With `reg_covar` none is."""
    for column in range(3):
        stat = sums_of(3, 2, 3, covariance_type)
        t = torch.randn(1, 30, 3, dtype=F64, generator=torch.Generator().manual_seed(column))
        if covariance_type == "spherical":
            t[:] = 2.0
        t[..., column] = 2.0
        r = torch.rand(1, 30, 2, dtype=F64, generator=torch.Generator().manual_seed(9))
        one = torch.ones(1, dtype=F64)
        stat.sums[1] = reference.gmm_em.sums_of(r, t, one, one, covariance_type)[0]
        made = check_m_step(stat, device, dtype=dtype, rtol=1e-7)
        assert made.status.tolist() == [[0, 0], [2, 2], [0, 0]] and made.precisions_cholesky.isfinite().all()
        assert (check_m_step(stat, device, 0.1, dtype).status == 0).all()


@pytest.mark.parametrize("covariance_type", TYPES)
def test_every_variance_is_0(device, covariance_type):
    """One point, one of the two mixtures at 0: 1e-6 is the variance, or what a large second moment asks for."""
    stat = sums_of(2, 2, 2, covariance_type)
    r = torch.tensor([[[0.5, 1.5]]], dtype=F64).expand(2, 3, 2)
    t = torch.tensor([0.0, 2.0**20], dtype=F64)[:, None, None].expand(2, 3, 2)
    stat.sums[:] = reference.gmm_em.sums_of(r, t, r.sum((1, 2)), r.sum((1, 2)), covariance_type)
    made = check_m_step(stat, device)
    assert (made.status == 2).all()
    variance = made.covariances
    if covariance_type in ("full", "tied"):
        variance = variance.diagonal(dim1=-2, dim2=-1)
    assert (variance[0] == 1e-6).all() and (variance[1] > 0.01).all() and (variance[1] < 0.2).all()


@pytest.mark.parametrize("covariance_type", ["full", "tied"])
def test_not_positive_definite(device, covariance_type):
    """The diagonal is fine, the correlation is above 1: ten times more is added until the last pivot is positive."""
    stat = sums_of(1, 1, 3, covariance_type)
    stat.sums[0, 2:] = 0
    stat.nk[0] = 1
    for size in (3e-3, 3.0, 3e9):
        matrix = torch.eye(3, dtype=F64)
        matrix[1, 2] = matrix[2, 1] = 1 + size
        stat.s2.view(3, 3)[:] = matrix
        made = check_m_step(stat, device, rtol=1e-7)
        assert made.status.tolist() == [[2]]
        added = made.covariances.view(3, 3)[0, 0].item() - 1
        assert size < added <= 10 * size * 1.01


@pytest.mark.parametrize("covariance_type", ["full", "tied"])
def test_no_ridge_helps(device, covariance_type):
    """A constant column of 1e25: 1e-6 and ten times that, 38 times, are below its rounding."""
    for size, status in ((1e17, 2), (1e24, 3)):
        r = torch.ones(1, 4, 1, dtype=F64)
        t = torch.full((1, 4, 2), size, dtype=F64)
        sums = reference.gmm_em.sums_of(r, t, r.sum((1, 2)), r.sum((1, 2)), covariance_type)
        sums[:, -1] -= 1e-3 * size * size  # below 0
        made = check_m_step(ops.GmmStatistics(sums, torch.zeros(1, 2, dtype=F64), covariance_type, 1), device)
        assert made.status.tolist() == [[status]]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_sums_that_are_not_finite(device, covariance_type, value):
    """In any place of the second moments of the last component: status 3 there and nowhere else, precisions NaN."""
    width = sums_of(1, 2, 3, covariance_type).s2[0].numel()
    for place in range(width // 2 if covariance_type != "tied" else 0, width):
        if covariance_type in ("full", "tied") and place % 9 in (3, 6, 7):
            continue  # below the diagonal: not read
        stat = sums_of(2, 2, 3, covariance_type)
        stat.s2[1].view(-1)[place] = value
        made = ops.gmm_m_step(dataclasses.replace(stat, sums=stat.sums.to(device.torch),
                                                  shift=stat.shift.to(device.torch)))
        if covariance_type == "tied":
            assert made.status.tolist() == [[0, 0], [3, 3]]
        else:
            assert made.status.tolist() == [[0, 0], [0, 3]]
            assert made.precisions_cholesky[1, 0].isfinite().all()
        last = made.precisions_cholesky[1] if covariance_type == "tied" else made.precisions_cholesky[1, 1]
        assert last.isnan().all() and made.precisions_cholesky[0].isfinite().all()
        assert made.means.isfinite().all() and made.weights.isfinite().all()


@pytest.mark.parametrize("covariance_type", TYPES)
def test_a_weight_that_is_nan(device, covariance_type):
    stat = sums_of(2, 2, 2, covariance_type)
    stat.nk[1, 1] = NAN
    made = ops.gmm_m_step(dataclasses.replace(stat, sums=stat.sums.to(device.torch),
                                              shift=stat.shift.to(device.torch)))
    assert made.status[0].tolist() == [0, 0] and made.status[1, 1] == 3 and made.weights[1].isnan().all()


def test_m_step_without_features_or_components(device):
    for covariance_type in TYPES:
        for b, k, d in [(2, 2, 0), (2, 0, 2), (0, 2, 2)]:
            numbers = 2 + sum(reference.gmm_em.sizes(k, d, covariance_type))
            stat = ops.GmmStatistics(torch.ones(b, numbers, dtype=F64, device=device.torch),
                                     torch.ones(b, d, dtype=F64, device=device.torch), covariance_type, k)
            made = ops.gmm_m_step(stat)
            assert made.means.shape == (b, k, d) and made.weights.isfinite().all()
            if b and k:
                cases.close(made.weights, torch.full((b, k), 1 / k))
