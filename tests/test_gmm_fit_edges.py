"""Edges of gmm_fit's kernels that the tests by shape do not meet: every start on every device, memory of either kind,
more mixtures than blocks, rows that do not count, ties, repairs, numbers that overflow."""

import math
import sys

import pytest
import torch

import cases
from gmkernels import ops
from test_gmm import TYPES
from test_gmm_fit import F32, F64, FIELDS, INF, NAN, PARAMETERS, check, rows_of, run_reference, same_bits, weights_of

module = sys.modules["gmkernels.ops.gmm_fit"]  # the name is the function's


def fit_of(device, x, k, covariance_type="full", start=(None, None, None), **options):
    """On the device; None stands for what the reference calls by another name."""
    there = {name: v.to(device.torch) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    if start[0] is not None:
        there["init"] = ops.GmmParameters(start[0].exp(), *start[:2], None, start[2], None, covariance_type)
    elif start[1] is not None:
        there["init"] = start[1].to(device.torch)
    return ops.gmm_fit(x.to(device.torch), k, covariance_type, **there)


def compare(device, x, k, covariance_type="full", rounds=20, rtol=None, start=(None, None, None), **options):
    fit = fit_of(device, x, k, covariance_type, start, **options)
    rounds = 0 if any(t is not None for t in start) or "responsibilities" in options else rounds
    options.pop("init", None)
    want = run_reference(x, k, covariance_type, start=start, rounds=rounds, **options)
    check(fit, want, rtol or (1e-9 if x.dtype is F64 else 1e-5))
    return fit


@pytest.mark.parametrize("covariance_type", TYPES)
def test_rows_around_the_threads_of_a_block(device, covariance_type):
    for n in (1, 33, 127, 129):
        compare(device, rows_of(1, n=n, d=2, k=1), 1, covariance_type, max_iter=1, reg_covar=1e-2)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_given_responsibilities(device, covariance_type):
    x, r = rows_of(2, n=40), weights_of(2, 40, 2)
    r[:, 5] = 0  # counts nowhere in the start
    w = weights_of(40)
    w[7] = 0
    x[:, 7] = NAN
    compare(device, x, 2, covariance_type, responsibilities=r, sample_weight=w, max_iter=3)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_given_mixture(device, covariance_type):
    """Its weights need not sum to one, and below the diagonal may be anything."""
    x = rows_of(2, n=40, dtype=F32)
    made = ops.gmm_fit(x, 2, covariance_type, seed=0, max_iter=1)
    p = made.precisions_cholesky.clone()
    if covariance_type in ("full", "tied"):
        p += 7 * torch.ones(3, 3).tril(-1)
    start = made.log_weights + 2, made.means, p
    for max_iter in (0, 3):
        compare(device, x, 2, covariance_type, start=start, max_iter=max_iter, rtol=2e-5)


def test_component_of_no_weight_is_revived(device):
    x = rows_of(1, n=40)
    made = ops.gmm_fit(x, 2, seed=0, max_iter=1)
    start = torch.tensor([[0.0, -INF]], dtype=F64), made.means, made.precisions_cholesky
    fit = compare(device, x, 2, start=start, max_iter=1)
    assert fit.status.tolist() == [[0, 1]] and fit.recovered.tolist() == [[0, 1]]


@pytest.mark.parametrize("covariance_type", TYPES)
def test_given_means(device, covariance_type):
    """Labels by the nearest, of equally near ones the first; a mean without rows is dead."""
    x = torch.round(2 * rows_of(1, n=30, d=2))
    means = torch.stack([x[:, 0], x[:, 0], x[:, 1] + 1, x[:, 2] + 100], 1)
    fit = compare(device, x, 4, covariance_type, start=(None, means, None), max_iter=0, reg_covar=0.1)
    assert fit.recovered[0, 3] == 1


def test_picks_of_one_row_after_the_other(device):
    """As many components as rows: every row is a pick, and the last draws have little to choose from."""
    x = rows_of(4, n=7, d=2, k=7, apart=9.0)
    compare(device, x, 7, "spherical", seed=5, max_iter=0, reg_covar=0.3)
    compare(device, x, 7, "spherical", seed=5, max_iter=0, reg_covar=0.3, rounds=0, init="k-means++")


def test_rows_that_are_all_equal(device):
    """Nothing to draw by: the first row that counts, again and again."""
    x, w = torch.full((1, 9, 2), 3.0, dtype=F64), torch.ones(9, dtype=F64)
    w[0] = 0
    fit = compare(device, x, 3, "diag", sample_weight=w, seed=1, max_iter=2)
    assert fit.status.unique().tolist() and fit.means.isfinite().all()


@pytest.mark.parametrize("covariance_type", TYPES)
def test_constant_column(device, covariance_type):
    x = rows_of(1, n=40)
    x[..., 1] = 5.0
    compare(device, x, 2, covariance_type, seed=1, max_iter=3, reg_covar=0.0, rtol=1e-6)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_numbers_that_overflow(device, covariance_type):
    x = rows_of(2, n=20)
    x[1] *= 1e160
    fit = fit_of(device, x, 2, covariance_type, seed=0)
    assert fit.means[0].isfinite().all() and fit.means[1].isnan().all() and fit.log_likelihood[1].isnan()
    assert fit.status[1].tolist() == [3, 3] and fit.converged.tolist() == [True, False]


def test_best_of_several_starts(device):
    x = rows_of(2, n=30, k=5, d=1, apart=3.0)
    found = [compare(device, x, 5, "diag", n_init=n_init, seed=0, max_iter=1, rounds=0, init="k-means++")
             for n_init in (1, 3)]
    assert not torch.equal(found[0].log_likelihood, found[1].log_likelihood)


def test_numbers_of_each_mixture(device):
    x = rows_of(1, n=30, k=3).expand(4, 30, 3)
    seeds = torch.tensor([3, 7, 3, 2**62])
    fit = fit_of(device, x, 3, seed=seeds, max_iter=0, init="k-means++")
    assert torch.equal(fit.means[0], fit.means[2]) and not torch.equal(fit.means[0], fit.means[1])
    for b in (1, 3):
        own = fit_of(device, x[b], 3, seed=seeds[b], max_iter=0, init="k-means++")
        for name in FIELDS:
            assert torch.equal(getattr(own, name), getattr(fit, name)[b]), name


@pytest.mark.parametrize("covariance_type", TYPES)
def test_mixtures_that_shared_memory_does_not_hold(device, covariance_type, monkeypatch):
    """More of them than are fitted at a time."""
    monkeypatch.setattr(module, "_SHARED_NUMBERS", 0)
    monkeypatch.setattr(module, "_BLOCKS", 2)
    compare(device, rows_of(3, n=30), 2, covariance_type, sample_weight=weights_of(3, 30), seed=2, max_iter=2)


def test_a_mixture_larger_than_shared_memory(device):
    n, d, k = 150, 30, 2
    assert module._workspace(torch.empty(0), 1, n, k, d, "diag")[0] is not None
    compare(device, rows_of(1, n=n, d=d, k=k), k, "diag", start=(None, rows_of(1, n=k, d=d), None), max_iter=1)


def test_more_components_than_threads(device):
    x = rows_of(1, n=140, d=1, k=130, apart=50.0)
    compare(device, x, 130, "diag", start=(None, x[:, :130], None), max_iter=1, reg_covar=0.5)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_leading_dimensions_and_strides(device, dtype):
    """One data set, many weights and starts; rows that are not contiguous."""
    x, w = rows_of(n=24, dtype=dtype).T.contiguous().T, weights_of(3, 24, dtype=dtype)
    means = rows_of(2, 1, n=2, dtype=dtype)
    fit = fit_of(device, x, 2, start=(None, means, None), sample_weight=w, max_iter=2)
    assert fit.means.shape == (2, 3, 2, 3)
    for i, j in ((0, 2), (1, 0)):
        one = fit_of(device, x, 2, start=(None, means[i, 0], None), sample_weight=w[j], max_iter=2)
        for name in PARAMETERS:
            cases.close(getattr(fit, name)[i, j], getattr(one, name), rtol=1e-6)


def test_same_bits_again(device):
    x = rows_of(3, n=50, dtype=F32)
    assert same_bits(fit_of(device, x, 2, seed=1, max_iter=4), fit_of(device, x, 2, seed=1, max_iter=4))


def test_no_mixtures(device):
    fit = fit_of(device, torch.empty(0, 5, 2), 2, seed=0)
    assert fit.means.shape == (0, 2, 2) and math.prod(fit.covariances.shape) == 0


def test_workspace_too_small_in_the_emulator():
    backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    x = rows_of(1, n=20, dtype=F32)
    outs = module._outputs(x, None, None, None, None, None, None, 2, "full", 1, 0, 2, 1, 0, 1e-3, 1e-6)
    for numbers in (module._workspace(x, 1, 20, 2, 3, "full")[2] - 1, module._SHARED_NUMBERS + 1):
        with backend.running(), pytest.raises(RuntimeError, match="the workspace is too small"):
            module._fit((*outs, None), (x, *[None] * 6), (60, 0, 0, 0, 0, 0), 1, 20, 2, 3, 1, 0, 2, 1, 0, 1, 1e-3, 1e-6,
                        0, 0, 1, numbers)
