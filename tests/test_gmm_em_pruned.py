"""gmm_em_statistics where many components are far from most rows: densities that are never finished."""

import math

import pytest
import torch

import cases
from gmkernels import _C, ops
from test_gmm import TYPES, mixture
from test_gmm_em import check, weights_of

F32, F64, INF, NAN = torch.float32, torch.float64, math.inf, math.nan
# n, d, k, distance of the means: far apart, near enough that only some are left out, overlapping; ragged words, blocks
SHAPES = [(1, 32, 16, 3), (100, 16, 30, 3), (67, 23, 16, 2), (70, 64, 40, 1.5), (131, 40, 17, 4), (300, 33, 64, 0.8),
          (200, 71, 100, 1.2), (ops.GMM_EM_ROWS + 65, 32, 16, 2), (513, 64, 16, 0.1)]


def near(n, d, k, covariance_type, dtype, distance, seed=0):
    """Rows about means at `distance` standard deviations in each feature."""
    x, lw, means, p = mixture(n, d, k, covariance_type, F64)
    means = distance * cases.data(k, d, seed=seed + 1)
    x = means[torch.arange(n) % k] + x
    return [t.to(dtype) for t in (x, lw, means, p)]


@pytest.mark.parametrize("covariance_type", TYPES)
def test_reference(isa, covariance_type):
    for dtype in cases.FLOATS:
        for n, d, k, distance in SHAPES:
            args = near(n, d, k, covariance_type, dtype, distance)
            check(args, covariance_type, weights_of(n, dtype=dtype) if n % 2 else None,
                  rtol=1e-12 if dtype is F64 else 3e-5)


def with_one_more(args):
    """The same mixture and a component that is left out. Fifteen components are all finished, sixteen are not."""
    x, lw, means, p = args
    return [x, torch.cat([lw, lw.new_tensor([-INF])]), torch.cat([means, means[:1] + 1]),
            p if p.dim() == 2 and len(p) != len(means) else torch.cat([p, p[:1]])]


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_the_bits_of_densities_that_are_all_finished(isa, covariance_type, dtype):
    for n, d, distance in [(257, 32, 3.0), (256, 16, 5.0), (300, 64, 1.0), (200, 47, 0.6), (600, 40, 0.2),
                           (192, 80, 3.0)]:
        for offset in (0.0, 300.0):  # centred or not, and log-densities that are large
            args = near(n, d, 15, covariance_type, dtype, distance)
            args[2][3] += offset
            more = with_one_more(args)
            shift = torch.zeros(d, dtype=F64)
            a = ops.gmm_em_statistics(*args, covariance_type, shift=shift)
            b = ops.gmm_em_statistics(*more, covariance_type, shift=shift)
            assert torch.equal(a.log_likelihood, b.log_likelihood), (n, d, distance, offset)
            if distance in (1.0, 0.6):  # the sums of such blocks go one way or the other by the number of components
                continue
            assert b.nk[15] == 0 and torch.equal(a.nk, b.nk[:15])
            assert torch.equal(a.s1, b.s1[:15])
            assert torch.equal(a.s2, b.s2 if covariance_type == "tied" else b.s2[:15])


@pytest.mark.parametrize("covariance_type", TYPES)
def test_odd_rows(isa, covariance_type):
    for dtype in cases.FLOATS:
        args = near(200, 64, 40, covariance_type, dtype, 1.5)
        weights = weights_of(200, dtype=dtype)
        args[0][3, 0], args[0][4, 63] = INF, -INF
        weights[70] = 0
        args[0][70, 63] = NAN
        for row, feature in [(None, None), (5, 0), (150, 63), (199, 50)]:  # NaN in a feature that comes first, and last
            if row is not None:
                args[0][row, feature] = NAN
            stat = check(args, covariance_type, weights, rtol=1e-12 if dtype is F64 else 3e-5)
            assert stat.log_likelihood.isnan() == (row is not None)
            assert stat.nk.isnan().all() == (row is not None)
            if row is not None:
                args[0][row, feature] = 0


@pytest.mark.parametrize("covariance_type", TYPES)
def test_odd_components(isa, covariance_type):
    """One that is left out may hold anything; a NaN in any other one reaches every sum, wherever it is."""
    args = near(150, 64, 40, covariance_type, F32, 1.5)
    args[1][0] = args[1][17] = -INF
    args[2][17] = NAN
    stat = check(args, covariance_type, rtol=3e-5)
    assert stat.nk[0] == 0 and stat.nk[17] == 0
    args[2][21] += 50  # and no row near it
    for feature in (0, 63):
        bad = [t.clone() for t in args]
        bad[2][21, feature] = NAN
        assert ops.gmm_em_statistics(*bad, covariance_type).log_likelihood.isnan()
    if covariance_type == "full":
        bad = [t.clone() for t in args]
        bad[3][21, 63, 0] = NAN  # below the diagonal: not read
        assert ops.gmm_em_statistics(*bad, covariance_type).log_likelihood.isfinite()
        bad[3][21, 0, 63] = NAN
        assert ops.gmm_em_statistics(*bad, covariance_type).log_likelihood.isnan()
    args[1][:] = -INF
    stat = ops.gmm_em_statistics(*args, covariance_type)
    assert stat.log_likelihood == -INF and not stat.nk.any()


def test_rows_far_from_everything(isa):
    """Densities of 0 everywhere, and log-densities so large that rounding exceeds what counts."""
    args = near(100, 64, 32, "diag", F32, 1.0)
    args[0][1::3] += 1e4
    weights = torch.ones(100)
    weights[::3] = 0
    args[0][::3] = 0
    rest = check(args, "diag", weights, rtol=1e-3)
    args[0][::3] = 1e20
    stat = ops.gmm_em_statistics(*args, "diag")
    assert stat.log_likelihood == -INF and rest.log_likelihood.isfinite()
    assert torch.equal(stat.nk, rest.nk) and torch.equal(stat.s1, rest.s1) and torch.equal(stat.s2, rest.s2)


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_a_nan_among_rows_too_far_for_a_density(isa, covariance_type):
    """All bounds are -inf, the first component is left out, and the NaN is in the last feature."""
    for dtype, far in ((F32, 9.97e36), (F64, 1e200)):
        for n in (3, 16, 64):
            args = mixture(n, 16, 64, covariance_type, dtype)
            args[1][0] = -INF
            args[0][:, 0], args[0][0, 15] = far, NAN
            stat = ops.gmm_em_statistics(*args, covariance_type)
            assert stat.log_likelihood.isnan() and stat.nk.isnan().all()


@pytest.mark.parametrize("dtype, huge", [(F32, 3e38), (F64, 1.5e308)])
def test_products_that_overflow_in_the_last_features(isa, dtype, huge):
    """inf - inf gives NaN: it must not depend on how many blocks before were finished, so not on the threads."""
    x, lw, means, p = near(2 * ops.GMM_EM_ROWS, 16, 20, "full", dtype, 1.0)
    means[:, 12], means[5, 12], means[5, 0], x[:, 12] = huge, -huge, 100, huge
    x[: ops.GMM_EM_ROWS, :8] *= 0.01
    sums = []
    for rows, count in ((x, 1), (x, 2), (x.flip(0), 1)):
        torch.set_num_threads(count)
        sums.append(ops.gmm_em_statistics(rows, lw, means, p, "full").log_likelihood)
    dense = ops.gmm_log_prob(x, lw, means, p, "full").double().sum()
    for ll in sums:
        assert ll.isnan() == dense.isnan()


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_same_bits_on_any_thread_count(isa, covariance_type):
    args = near(3 * ops.GMM_EM_ROWS + 5, 32, 20, covariance_type, F32, 1.2)
    args[0][ops.GMM_EM_ROWS : ops.GMM_EM_ROWS + 900] *= 0.01  # rows that meet all components: given up for a while
    sums = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        sums.append(ops.gmm_em_statistics(*args, covariance_type).sums)
    assert all(torch.equal(sums[0], other) for other in sums[1:])
    assert _C.isa() == isa


def test_what_is_left_out_is_too_small_to_count():
    """Responsibilities of 2^-60 are in the sums, of 2^-70 (double: 2^-100) are not."""
    for dtype, kept, lost in [(F32, 60, 70), (F64, 90, 100)]:
        for power, counts in ((kept, True), (lost, False)):
            for d, k in [(1, 2), (40, 20)]:
                x, means = torch.zeros(1, d, dtype=dtype), torch.zeros(k, d, dtype=dtype)
                lw = torch.full((k,), -INF, dtype=dtype)
                lw[0], lw[1] = 0, -power * math.log(2)
                stat = ops.gmm_em_statistics(x, lw, means, torch.ones(k, d, dtype=dtype), "diag")
                assert stat.nk[0] == 1
                if counts:
                    torch.testing.assert_close(stat.nk[1].item(), 2.0**-power, rtol=1e-5, atol=0)
                else:
                    assert stat.nk[1] == 0
