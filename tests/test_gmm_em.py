"""ops.gmm_em_statistics, gmm_m_step, gmm_responsibilities: values, streams, threads, odd values, repairs, errors."""

import dataclasses
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from gmkernels import ops, reference
from test_gmm import TYPES, mixture, trailing

F32, F64, INF, NAN = torch.float32, torch.float64, math.inf, math.nan
ROWS = ops.GMM_EM_ROWS
# n, d, k: both layouts of the sums (k below and above the SIMD lanes), every remainder of their tiles, several groups
SHAPES = [(1, 1, 1), (70, 3, 2), (33, 16, 3), (300, 5, 12), (131, 17, 13), (260, 2, 70), (100, 2, 100), (65, 40, 5),
          (2 * ROWS + 77, 4, 9), (ROWS + 5, 6, 37)]
SIMT_SHAPES = [(1, 1, 1), (33, 9, 3), (20, 3, 12)]
PARTS = ("log_likelihood", "weight", "nk", "s1", "s2")


def weights_of(*shape, dtype=F64, seed=11):
    return cases.data(*shape, seed=seed).abs().to(dtype)


def exact(args, covariance_type, stat, sample_weight=None):
    """The parts of the same statistics from the reference in float64."""
    args = [t.detach().cpu().double() for t in args]
    weights = None if sample_weight is None else sample_weight.cpu().double()
    shift = stat.shift.cpu()
    sums, used = reference.gmm_em.gmm_em_statistics(*args, weights, shift, None, covariance_type)
    assert torch.equal(used, shift)
    return reference.gmm_em.split(sums, args[2].shape[-2], args[2].shape[-1], covariance_type)


def check(args, covariance_type, sample_weight=None, shift=None, rtol=None):
    stat = ops.gmm_em_statistics(*args, covariance_type, sample_weight, shift)
    rtol = rtol or (1e-12 if args[0].dtype is F64 else 3e-6)
    for name, want in zip(PARTS, exact(args, covariance_type, stat, sample_weight), strict=True):
        got = getattr(stat, name).cpu()
        assert got.dtype is F64 and got.shape == want.shape
        scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 1.0
        torch.testing.assert_close(got, want, rtol=0, atol=rtol * max(scale, 1e-3), equal_nan=True,
                                   msg=lambda m, name=name: f"{name}: {m}")
    return stat


# statistics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_reference(device, covariance_type, dtype):
    for n, d, k in SIMT_SHAPES if device.simt else SHAPES:
        args = mixture(n, d, k, covariance_type, dtype, device.torch)
        check(args, covariance_type, None if n % 2 else weights_of(n, dtype=dtype).to(device.torch))


@pytest.mark.parametrize("covariance_type", TYPES)
def test_every_instruction_set(isa, covariance_type):
    for dtype in cases.FLOATS:
        for n, d, k in [(300, 3, 5), (131, 17, 13), (70, 5, 33), (200, 9, 64), (260, 4, 8)]:
            check(mixture(n, d, k, covariance_type, dtype), covariance_type, weights_of(n, dtype=dtype))


@pytest.mark.parametrize("covariance_type", TYPES)
def test_sizes(isa, covariance_type):
    for size in cases.SIZES:
        for n, d, k in [(size, 3, 2), (40, min(size, 33), 2), (40, 3, size)]:
            check(mixture(n, d, k, covariance_type, F32), covariance_type)


def apart(n, d, k, covariance_type, dtype, scale, mixed=False):
    """Rows of clusters far apart: almost all responsibilities are 0. mixed: and blocks where none is, between them."""
    x, lw, means, p = mixture(n, d, k, covariance_type, F64)
    means = scale * means
    spread = means[torch.arange(n) % k] + 0.4 * x
    spread[: 2 * 64] = spread[:1]  # the same few components over and over
    if mixed:
        middle = (torch.arange(n) // 64) % 3 == 1
        spread[middle] = 0.1 * x[middle]
        means[: k // 2] /= 5 * scale
    return [t.to(dtype) for t in (spread, lw, means, p)]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_clusters_far_apart(isa, covariance_type, mixed):
    """Components meet only the rows that are theirs: every width of a block of features, ragged ends, odd rows."""
    for dtype in cases.FLOATS:
        for n, d, k, scale in [(700, 1, 40, 400), (519, 3, 40, 30), (300, 4, 64, 30), (261, 15, 50, 12),
                               (131, 34, 40, 12), (201, 33, 33, 3), (70, 66, 40, 3)]:
            args = apart(n, d, k, covariance_type, dtype, scale * (1 if dtype is F32 else 5), mixed)
            share = (ops.gmm_responsibilities(*args, covariance_type) > 0).double().mean()
            assert mixed or share < 1 / 8
            weights = weights_of(n, dtype=dtype) if n % 2 else None
            rtol = 1e-12 if dtype is F64 else 2e-5  # log-densities of hundreds: float32 knows them to 1e-5
            check(args, covariance_type, weights, rtol=rtol)
            if weights is None:
                continue
            args[0][5], args[0][70, 0], weights[9] = INF, -INF, 0
            check(args, covariance_type, weights, rtol=rtol)
            args[0][130, d - 1] = NAN
            check(args, covariance_type, weights, rtol=rtol)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_a_far_row_counts_alone(covariance_type):
    """With one row to a component the sums are those of the rows, to the last bit."""
    d, k = 5, 48
    x, lw, means, p = apart(k, d, k, covariance_type, F64, 30)
    x = means + 0.25
    stat = ops.gmm_em_statistics(x, lw, means, p, covariance_type, None, torch.zeros(d, dtype=F64))
    assert torch.equal(stat.nk, torch.ones(k, dtype=F64)) and torch.equal(stat.s1, x)
    square = x[:, :, None] * x[:, None, :]
    want = {"full": square, "tied": square.sum(0), "diag": x * x, "spherical": (x * x).sum(1)}[covariance_type]
    torch.testing.assert_close(stat.s2, want, rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_many_features(covariance_type):
    check(mixture(150, 130, 3, covariance_type, F32), covariance_type)
    check(mixture(150, 130, 20, covariance_type, F64), covariance_type)


def test_by_hand():
    x = torch.tensor([[0.0], [2.0], [5.0]], dtype=F64)
    weights = torch.tensor([1.0, 3.0, 0.5], dtype=F64)
    stat = ops.gmm_em_statistics(x, torch.zeros(1, dtype=F64), torch.tensor([[1.0]], dtype=F64),
                                 torch.ones(1, dtype=F64), "spherical", weights)
    assert stat.shift.tolist() == [1.0] and stat.weight.item() == 4.5 and stat.nk.tolist() == [4.5]
    assert stat.s1.tolist() == [[-1 + 3 * 1 + 0.5 * 4]] and stat.s2.tolist() == [1 + 3 * 1 + 0.5 * 16]
    normal = -0.5 * math.log(2 * math.pi)
    cases.close(stat.log_likelihood, torch.tensor(4.5 * normal - 0.5 * (1 + 3 * 1 + 0.5 * 16), dtype=F64))


@pytest.mark.parametrize("covariance_type", TYPES)
def test_leading_dimensions_broadcast(device, covariance_type):
    n = 7 if device.simt else 70
    x, w, m, p = mixture(n, 3, 4, covariance_type, F64, device.torch, batch=(2, 3))
    weights, shift = weights_of(3, n).to(device.torch), cases.data(2, 1, 3, device=device.torch)
    for args in [(x, w, m, p), (x[0, 0], w, m, p), (x, w[0, 0], m[0, 0], p[0, 0])]:
        check(args, covariance_type)
        stat = check(args, covariance_type, weights, shift)
        assert stat.nk.shape == (2, 3, 4)
        pairs = zip(args, trailing(covariance_type), strict=True)
        alone = [t.expand(2, 3, *t.shape[t.dim() - last :])[1, 2] for t, last in pairs]
        one = ops.gmm_em_statistics(*alone, covariance_type, weights[2], shift[1, 0])
        assert torch.equal(one.sums, stat.sums[1, 2])


def test_many_mixtures_on_one_thread_each():
    """More mixtures than threads take another road through the same sums."""
    args = mixture(200, 4, 3, "full", F32, batch=(40,))
    stat = check(args, "full", weights_of(40, 200, dtype=F32))
    one = ops.gmm_em_statistics(*(t[17] for t in args), "full", weights_of(40, 200, dtype=F32)[17])
    assert torch.equal(one.sums, stat.sums[17])


@pytest.mark.parametrize("covariance_type", TYPES)
def test_weights_are_repetitions(covariance_type):
    x, w, m, p = mixture(50, 3, 4, covariance_type)
    counts = torch.arange(50) % 4
    stat = ops.gmm_em_statistics(x, w, m, p, covariance_type, counts.double())
    again = ops.gmm_em_statistics(x.repeat_interleave(counts, 0), w, m, p, covariance_type)
    cases.close(stat.sums, again.sums)


# precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_float32_far_from_the_origin_and_tight_clusters(isa, covariance_type, offset, far):
    """The covariances of one EM step are within 1e-4 of float64's: every entry by the standard deviations it is of."""
    x, w, m, p = mixture(4000, 6, 5, covariance_type)
    m = far * m
    x = m[torch.arange(4000) % 5] + 0.8 * x
    args = [t.float() for t in (x + offset, w, m + offset, p)]
    for k in (5, 20):  # both layouts of the sums
        if k == 20:
            args = [args[0], *(t if covariance_type == "tied" and i == 2 else torch.cat([t] * 4)
                               for i, t in enumerate(args[1:]))]
        got = ops.gmm_m_step(ops.gmm_em_statistics(*args, covariance_type))
        want = ops.gmm_m_step(ops.gmm_em_statistics(*(t.double() for t in args), covariance_type))
        var = want.covariances
        if covariance_type in ("full", "tied"):
            var = var.diagonal(dim1=-2, dim2=-1)
            scale = (var[..., :, None] * var[..., None, :]).sqrt()
        else:
            scale = var
        assert ((got.covariances - want.covariances) / scale).abs().max() < 1e-4
        if covariance_type != "tied":
            deviation = var if covariance_type != "spherical" else var[:, None]
            assert ((got.means - want.means) / deviation.sqrt()).abs().max() < 1e-4
        assert (got.weights - want.weights).abs().max() < 1e-4


def test_the_shift_decides_which_sums_are_in_float64():
    """One cluster and a shift far from it: the sums themselves say that they were made in float64."""
    x = cases.data(500, 2, dtype=F32)
    args = x, torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2)
    near = ops.gmm_em_statistics(*args, "diag", shift=torch.full((2,), 15.0))
    far = ops.gmm_em_statistics(*args, "diag", shift=torch.full((2,), 17.0))
    errors = [((s.s2 - exact(args, "diag", s)[4]).abs() / s.s2).max().item() for s in (near, far)]
    assert errors[1] < 1e-9 < errors[0] < 1e-6


# streams, shards, threads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_a_stream_has_the_bits_of_the_whole(covariance_type, dtype):
    n = 3 * ROWS + 100
    x, *rest = mixture(n, 3, 5, covariance_type, dtype)
    weights = weights_of(n, dtype=dtype)
    whole = ops.gmm_em_statistics(x, *rest, covariance_type, weights)
    stat = None
    for begin, end in ((0, 2 * ROWS), (2 * ROWS, 3 * ROWS), (3 * ROWS, n)):
        stat = ops.gmm_em_statistics(x[begin:end], *rest, covariance_type, weights[begin:end], initial=stat)
    assert torch.equal(stat.sums, whole.sums) and torch.equal(stat.shift, whole.shift)
    blocks = zip(x.split(ROWS), weights.split(ROWS), strict=True)
    stats = [ops.gmm_em_statistics(rows, *rest, covariance_type, w) for rows, w in blocks]
    assert torch.equal(sum(stats[1:], stats[0]).sums, whole.sums)


def test_shards_agree_on_the_shift():
    x, *rest = mixture(100, 3, 4, "full", F64)
    a, b = (ops.gmm_em_statistics(part, *rest) for part in (x[:30], x[30:]))
    whole = ops.gmm_em_statistics(x, *rest)
    cases.close((a + b).sums, whole.sums)
    weights = rest[0].softmax(0)
    cases.close(whole.shift, (weights[:, None] * rest[1]).sum(0))
    mean = ops.gmm_em_statistics(x, *rest, shift=torch.zeros(3))
    cases.close(ops.gmm_m_step(whole).covariances, ops.gmm_m_step(mean).covariances, rtol=1e-10)
    with pytest.raises(ValueError, match="only when their shifts are equal"):
        a + mean


@pytest.mark.parametrize("shape", [(9001, 5, 7), (9001, 3, 40)], ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_same_bits_on_any_thread_count(isa, covariance_type, shape):
    results = []
    dtype = F32 if shape[1] == 5 else F64  # float32 groups hide the order: float64 adds a few of them exactly
    args = mixture(*shape, covariance_type, dtype)
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        stat = ops.gmm_em_statistics(*args, covariance_type, weights_of(shape[0], dtype=dtype))
        results.append((stat.sums, *dataclasses.astuple(ops.gmm_m_step(stat, dtype=dtype))[:6],
                        ops.gmm_responsibilities(*args, covariance_type)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


_PEAK = """
import resource, sys, torch
from gmkernels import ops
torch.set_num_threads(2)
n, d, k, covariance_type = 1_000_000, 16, 64, sys.argv[1]
if covariance_type == "full":
    n, k = 100_000, 32
g = torch.Generator().manual_seed(0)
make = lambda *shape: torch.randn(shape, generator=g)
def mixture(n):
    p = torch.rand(k, d, generator=g) + 0.5
    return make(n, d), make(k), make(k, d), p.diag_embed() if covariance_type == "full" else p
ops.gmm_m_step(ops.gmm_em_statistics(*mixture(100), covariance_type))
args = mixture(n)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.gmm_m_step(ops.gmm_em_statistics(*args, covariance_type))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_nothing_of_size_n_times_k(covariance_type):
    """Peak memory at 100k x 16, k=32 (full) and 1M x 16, k=64 (diag)."""
    done = subprocess.run([sys.executable, "-c", _PEAK, covariance_type], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 << 20


# special values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 20])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_infinite_nan_and_weightless_rows(isa, covariance_type, k):
    for dtype in cases.FLOATS:
        x, *rest = mixture(90, 3, k, covariance_type, dtype)
        weights = weights_of(90, dtype=dtype)
        clean = weights.clone()
        clean[[4, 6, 70]] = 0
        want = ops.gmm_em_statistics(x, *rest, covariance_type, clean)
        x[4, 1], x[6], x[70] = NAN, INF, 3e38 if dtype is F32 else 1e300
        assert torch.equal(ops.gmm_em_statistics(x, *rest, covariance_type, clean).sums, want.sums)
        clean[[6, 70]] = weights[[6, 70]]
        stat = ops.gmm_em_statistics(x, *rest, covariance_type, clean)
        assert stat.log_likelihood == -INF and torch.equal(stat.sums[2:], want.sums[2:])
        cases.close(stat.weight, clean.double().sum())
        stat = ops.gmm_em_statistics(x, *rest, covariance_type, weights)
        assert stat.log_likelihood.isnan() and stat.nk.isnan().all() and stat.s1.isnan().all() and stat.s2.isnan().all()
        made = ops.gmm_m_step(stat)
        assert (made.status == 3).all() and made.precisions_cholesky.isnan().any()


@pytest.mark.parametrize("covariance_type", TYPES)
def test_components_without_weight(device, covariance_type):
    args = mixture(90, 3, 3, covariance_type, F64, device.torch)
    args[1][1] = -INF
    args[2][1] = NAN
    stat = ops.gmm_em_statistics(*args, covariance_type)
    kept = [args[0], args[1][[0, 2]], args[2][[0, 2]], args[3] if covariance_type == "tied" else args[3][[0, 2]]]
    want = ops.gmm_em_statistics(*kept, covariance_type)
    cases.close(stat.shift, want.shift)
    cases.close(stat.nk[[0, 2]], want.nk)
    assert stat.nk[1] == 0 and (stat.s1[1] == 0).all()
    args[1][:] = -INF
    args[2][:] = 0
    stat = ops.gmm_em_statistics(*args, covariance_type)
    assert stat.log_likelihood == -INF and stat.weight == 90 and (stat.sums[2:] == 0).all()


def test_empty(device):
    for covariance_type in TYPES:
        for dtype in cases.FLOATS:
            for n, d, k in [(0, 3, 2), (4, 0, 3), (0, 0, 0), (4, 3, 0)]:
                args = mixture(n, d, k, covariance_type, dtype, device.torch)
                stat = ops.gmm_em_statistics(*args, covariance_type)
                assert stat.weight == n
                if n == 0:
                    assert (stat.sums == 0).all()
                elif k == 0:
                    assert stat.log_likelihood == -INF and (stat.sums[2:] == 0).all()
                else:
                    cases.close(stat.log_likelihood, n * args[1].logsumexp(0), rtol=1e-5)
                made = ops.gmm_m_step(stat)
                assert made.means.shape == (k, d) and made.weights.isfinite().all()
                assert ops.gmm_responsibilities(*args, covariance_type).shape == (n, k)
            args = mixture(4, 3, 2, covariance_type, dtype, device.torch, batch=(0,))
            stat = ops.gmm_em_statistics(*args, covariance_type)
            assert stat.nk.shape == (0, 2) and ops.gmm_m_step(stat).means.shape == (0, 2, 3)


def test_strided_expanded_and_offset_inputs(device):
    made = mixture(90, 4, 3, "full", F64, device.torch)
    weights = weights_of(90).to(device.torch)
    want = ops.gmm_em_statistics(*made, "full", weights)
    for view in (
        lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
        lambda t: t[None, None].expand(1, 1, *t.shape),
    ):
        got = ops.gmm_em_statistics(*map(view, made), "full", view(weights))
        assert torch.equal(got.sums.reshape(want.sums.shape), want.sums)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 140), d=st.integers(0, 20), k=st.integers(1, 36), covariance_type=st.sampled_from(TYPES),
       dtype=st.sampled_from(cases.FLOATS), batch=st.sampled_from([(), (1,), (2,), (2, 3)]), step=st.integers(1, 3),
       weighted=st.booleans())
def test_any_shape_and_stride(n, d, k, covariance_type, dtype, batch, step, weighted):
    args = [t.repeat_interleave(step, 0)[::step] if t.dim() else t
            for t in mixture(n, d, k, covariance_type, dtype, batch=batch)]
    check(args, covariance_type, weights_of(*batch, n, dtype=dtype) if weighted else None, rtol=1e-5)


# M step --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_one_iteration_is_scikit_learns(covariance_type, dtype):
    private = pytest.importorskip("sklearn.mixture._gaussian_mixture")
    for n, d, k in [(500, 1, 2), (700, 7, 5), (900, 4, 19)]:
        args = mixture(n, d, k, covariance_type, F64)
        model = private.GaussianMixture(k, covariance_type=covariance_type, reg_covar=1e-3)
        model.weights_ = args[1].softmax(0).numpy()
        args[1] = torch.from_numpy(model.weights_).log()
        upper = args[3].triu() if covariance_type in ("full", "tied") else args[3]
        model.means_, model.precisions_cholesky_ = args[2].numpy(), upper.numpy()
        likelihood, log_resp = model._e_step(args[0].numpy())
        model._m_step(args[0].numpy(), log_resp)
        stat = ops.gmm_em_statistics(*(t.to(dtype) for t in args), covariance_type)
        made = ops.gmm_m_step(stat, covariance_type, 1e-3, dtype=dtype)
        bound = {"rtol": 1e-9, "atol": 1e-9} if dtype is F64 else {"rtol": 2e-3, "atol": 2e-4}
        cases.close(stat.log_likelihood / stat.weight, torch.tensor(likelihood, dtype=F64), rtol=bound["rtol"])
        for name in ("weights", "means", "covariances", "precisions_cholesky"):
            got = getattr(made, name)
            assert got.dtype is dtype
            cases.close(got, torch.from_numpy(np.asarray(getattr(model, name + "_"))), **bound)
        assert (made.status == 0).all()
        cases.close(made.log_weights, made.weights.log(), rtol=1e-5)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_m_step_reference(isa, covariance_type):
    """Every size of the last group of lanes, several mixtures at once, all repairs."""
    for n, d, k in [(300, 1, 1), (300, 2, 9), (400, 5, 3), (500, 9, 17), (6, 4, 3), (40, 3, 30)]:
        args = mixture(n, d, k, covariance_type, F64, batch=(3,))
        args[1][0, 0] = -INF
        args[0][2] = args[0][2, :1]  # one point: every covariance is singular
        stat = ops.gmm_em_statistics(*args, covariance_type)
        for dtype in cases.FLOATS:
            for reg_covar in (0.0, 1e-3):
                got = dataclasses.astuple(ops.gmm_m_step(stat, reg_covar=reg_covar, dtype=dtype))[:6]
                want = reference.gmm_em.gmm_m_step(stat.sums, stat.shift, covariance_type, k, reg_covar, dtype)
                assert torch.equal(got[5], want[5])
                alive = (want[5] != 1)[..., None]  # of equally wide features, rounding decides where a copy goes
                got, want = ([*t[:2], t[2] * alive, *t[3:]] for t in (got, want))
                for i, (g, w) in enumerate(zip(got[:5], want[:5], strict=True)):
                    # a precision is as sure as its covariance is well conditioned
                    tolerance = 1e-7 if i < 4 and dtype is F64 else 1e-4
                    scale = w.abs().max() if w.numel() else 1.0
                    assert ((g - w).abs() <= tolerance * (w.abs() + 1e-3 * scale)).all() or i == 4 and reg_covar == 0


@pytest.mark.parametrize("covariance_type", TYPES)
def test_precisions_are_inverse_to_covariances(isa, covariance_type):
    stat = ops.gmm_em_statistics(*mixture(2000, 37, 11, covariance_type, F64), covariance_type)
    made = ops.gmm_m_step(stat, reg_covar=1e-2)
    p, c = made.precisions_cholesky, made.covariances
    if covariance_type in ("full", "tied"):
        assert torch.equal(p.tril(-1), torch.zeros_like(p)) and torch.equal(c, c.mT)
        cases.close(p.mT @ c @ p, torch.eye(37, dtype=F64).expand_as(c), rtol=0, atol=1e-8)
    else:
        cases.close(p * p * c, torch.ones_like(c))


@pytest.mark.parametrize("covariance_type", TYPES)
def test_dead_components_become_copies_of_the_heaviest(covariance_type):
    x = torch.cat([cases.data(300, 2), 50 + cases.data(100, 2)])
    means = torch.tensor([[0.0, 0.0], [1e6, 0.0], [50.0, 50.0], [0.0, 1e6]], dtype=F64)
    p = {"full": torch.eye(2, dtype=F64).expand(4, 2, 2), "tied": torch.eye(2, dtype=F64),
         "diag": torch.ones(4, 2, dtype=F64), "spherical": torch.ones(4, dtype=F64)}[covariance_type]
    stat = ops.gmm_em_statistics(x, torch.full((4,), 0.25, dtype=F64).log(), means, p, covariance_type)
    assert stat.nk.tolist() == [300, 0, 100, 0]
    made = ops.gmm_m_step(stat)
    assert made.status.tolist() == [0, 1, 0, 1]
    cases.close(made.weights, torch.tensor([0.1875, 0.375, 0.25, 0.1875], dtype=F64))
    assert len({tuple(m) for m in made.means.tolist()}) == 4 and (made.means[[1, 3]].abs() < 4).all()
    if covariance_type != "tied":
        assert torch.equal(made.covariances[1], made.covariances[0])
    # the fit goes on, with every component in use
    for _ in range(5):
        stat = ops.gmm_em_statistics(x, made.log_weights, made.means, made.precisions_cholesky, covariance_type)
        before, made = made, ops.gmm_m_step(stat)
    assert (made.status == 0).all() and (stat.nk > 1).all() and before.means.isfinite().all()


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_singular_components_are_repaired(covariance_type, dtype):
    """A constant column, duplicate rows and one point only, without regularisation."""
    x = cases.data(60, 3)
    x[:, 1] = 2.0
    for rows in (x, x[:1].expand(60, 3), x[torch.arange(60) % 2]):
        rows = rows.to(dtype)
        args = mixture(60, 3, 2, covariance_type, dtype)
        stat = ops.gmm_em_statistics(rows, *args[1:], covariance_type)
        made = ops.gmm_m_step(stat, reg_covar=0.0, dtype=dtype)
        # In float32 a constant column first has a variance of rounding; its precision then asks for float64.
        stat = ops.gmm_em_statistics(rows, made.log_weights, made.means, made.precisions_cholesky, covariance_type)
        made = ops.gmm_m_step(stat, reg_covar=0.0, dtype=dtype)
        parts = (made.means, made.covariances, made.precisions_cholesky)
        assert all(t.isfinite().all() for t in parts)
        if not (covariance_type == "spherical" and rows is not x and rows[0, 0] != rows[1, 0]):
            assert (made.status == 2).any() or covariance_type == "spherical"
        lp = ops.gmm_log_prob(rows, made.log_weights, made.means, made.precisions_cholesky, covariance_type)
        assert lp.isfinite().all()
    # nothing that is healthy is touched
    made = ops.gmm_m_step(ops.gmm_em_statistics(*mixture(60, 3, 2, covariance_type), covariance_type), reg_covar=0.0)
    assert (made.status == 0).all()


@pytest.mark.parametrize("covariance_type", TYPES)
def test_nothing_seen(covariance_type):
    args = mixture(20, 3, 2, covariance_type)
    stat = ops.gmm_em_statistics(*args, covariance_type, torch.zeros(20, dtype=F64))
    made = ops.gmm_m_step(stat)
    assert made.weights.tolist() == [0.5, 0.5] and made.status.tolist() == [1, 1]
    cases.close(made.means, stat.shift.expand(2, 3))
    want = torch.eye(3).expand_as(made.covariances) if covariance_type in ("full", "tied") else 1.0
    assert (made.covariances == want).all() and (made.precisions_cholesky == want).all()


@pytest.mark.parametrize("covariance_type", TYPES)
def test_likelihood_never_falls(covariance_type):
    """Fifty iterations on overlapping components: what proves that E and M belong together."""
    args = mixture(3000, 3, 4, covariance_type, F64)
    args[3] = args[3].triu() if covariance_type in ("full", "tied") else args[3]
    args[1] = args[1].log_softmax(0)
    last = -INF
    for _ in range(50):
        stat = ops.gmm_em_statistics(*args, covariance_type)
        assert stat.log_likelihood > last - 1e-6
        last = stat.log_likelihood.item()
        made = ops.gmm_m_step(stat, reg_covar=0.0)
        args = [args[0], made.log_weights, made.means, made.precisions_cholesky]
        cases.close(ops.gmm_log_prob(*args, covariance_type).sum(),
                    ops.gmm_em_statistics(*args, covariance_type).log_likelihood)


# statistics as objects -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance_type", TYPES)
def test_statistics_from_parts_scaled_and_added(covariance_type):
    stat = ops.gmm_em_statistics(*mixture(30, 3, 4, covariance_type, batch=(2,)), covariance_type)
    same = ops.GmmStatistics.of(stat.nk, stat.s1, stat.s2, stat.log_likelihood, stat.weight, stat.shift,
                                covariance_type)
    assert torch.equal(same.sums, stat.sums) and same.k == 4
    assert torch.equal((0.25 * stat + stat * 0.75).sums, 0.25 * stat.sums + 0.75 * stat.sums)
    with pytest.raises(ValueError, match="s2 must be"):
        ops.GmmStatistics.of(stat.nk, stat.s1, stat.s2[:1], stat.log_likelihood, stat.weight, stat.shift,
                             covariance_type)
    with pytest.raises(TypeError, match="nk must be torch.float64"):
        ops.GmmStatistics.of(stat.nk.float(), stat.s1, stat.s2, stat.log_likelihood, stat.weight, stat.shift,
                             covariance_type)
    with pytest.raises(ValueError, match="cannot be added"):
        stat + dataclasses.replace(stat, k=5)
    with pytest.raises(TypeError):
        stat + 1


# responsibilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_responsibilities(isa, covariance_type, dtype):
    for n, d, k in [(1, 1, 1), (70, 3, 2), (131, 17, 33), (300, 5, 7)]:
        args = mixture(n, d, k, covariance_type, dtype)
        got = ops.gmm_responsibilities(*args, covariance_type)
        want = reference.gmm_em.gmm_responsibilities(*(t.double() for t in args), covariance_type)
        cases.close(got, want, rtol=1e-12 if dtype is F64 else 2e-4, atol=1e-12 if dtype is F64 else 1e-6)
        cases.close(got.sum(1), torch.ones(n, dtype=F64), rtol=1e-6)
    args = mixture(9, 3, 2, covariance_type, dtype, batch=(2, 3))
    args[0][0, 0, 1], args[0][1, 2, 3], args[0][0, 1, 5] = INF, NAN, 1e20 if dtype is F32 else 1e200
    got = ops.gmm_responsibilities(*args, covariance_type)
    assert (got[0, 0, 1] == 0).all() and got[1, 2, 3].isnan().all() and (got[0, 1, 5] == 0).all()
    assert got.isnan().sum() == 2


def test_responsibilities_are_differentiable():
    args = mixture(5, 3, 3, "full", F64, batch=(2,), grad=True)
    args[2] = args[2].detach()[0].requires_grad_()
    assert torch.autograd.gradcheck(ops.gmm_responsibilities, args, fast_mode=True)
    torch.library.opcheck(torch.ops.gmkernels.gmm_responsibilities.default, (*args, "full"))


# routes and errors ---------------------------------------------------------------------------------------------------


def test_opcheck_and_compile():
    x, w, m, p = mixture(9, 3, 2, "diag", F32)
    utils = ("test_schema", "test_faketensor")
    for extra in ((None, None, None), (weights_of(9, dtype=F32), torch.zeros(3, dtype=F64), None)):
        torch.library.opcheck(torch.ops.gmkernels.gmm_em_statistics.default, (x, w, m, p, *extra, "diag", False),
                              test_utils=utils)
    stat = ops.gmm_em_statistics(x, w, m, p, "diag")
    torch.library.opcheck(torch.ops.gmkernels.gmm_m_step.default, (stat.sums, stat.shift, "diag", 2, 1e-6, F32),
                          test_utils=utils)

    def iteration(x, w, m, p):
        made = ops.gmm_m_step(ops.gmm_em_statistics(x, w, m, p, "diag"), dtype=F32)
        return made.log_weights, made.means, made.precisions_cholesky

    torch._dynamo.reset()
    for got, want in zip(torch.compile(iteration, fullgraph=True)(x, w, m, p), iteration(x, w, m, p), strict=True):
        assert torch.equal(got, want)


def test_no_gradient_is_said():
    x, *rest = mixture(9, 3, 2, "diag", F32)
    stat = ops.gmm_em_statistics(x.requires_grad_(), *rest, "diag")
    with pytest.raises(NotImplementedError, match="gmm_em_statistics has no backward"):
        stat.sums.sum().backward()


def test_bad_arguments():
    x, w, m, p = mixture(5, 3, 2, "full", F32)
    stat = ops.gmm_em_statistics(x, w, m, p)
    other = ops.gmm_em_statistics(x, w, m, p, shift=torch.ones(3))
    bad = [
        (([1.0], w, m, p), {}, TypeError, "x must be a torch.Tensor, got list"),
        ((x.long(), w, m, p), {}, TypeError, "x must be a floating-point tensor, got torch.int64"),
        ((x, w.double(), m, p), {}, TypeError, "log_weights must be torch.float32 as x, got torch.float64"),
        ((x, w, m, p), {"covariance_type": "diag"}, ValueError, "must be [..., k, d] for covariance_type='diag'"),
        ((x, w, m, p), {"sample_weight": torch.ones(4)}, ValueError,
         "sample_weight must be [..., n] with n=5 as in x, got (4,)"),
        ((x, w, m, p), {"sample_weight": [1.0] * 5}, TypeError, "sample_weight must be a torch.Tensor, got list"),
        ((x, w, m, p), {"sample_weight": torch.ones(5, dtype=F64)}, TypeError,
         "sample_weight must be torch.float32 as x, got torch.float64"),
        ((x.expand(2, 5, 3), w, m, p), {"sample_weight": torch.ones(3, 5)}, ValueError,
         "the leading dimensions of sample_weight must broadcast with (2,) of the others, got (3,)"),
        ((x, w, m, p), {"shift": torch.ones(4)}, ValueError, "shift must be [..., d] with d=3 as in x, got (4,)"),
        ((x, w, m, p), {"shift": torch.ones(3).half()}, TypeError,
         "shift must be torch.float32 or torch.float64, got torch.float16"),
        ((x, w, m, p), {"initial": 3}, TypeError, "initial must be GmmStatistics, got int"),
        ((x, w[:1], m[:1], p[:1]), {"initial": stat}, ValueError,
         "initial must be of 1 'full' components, got 2 'full'"),
        ((x, w, m, p), {"initial": other, "shift": torch.zeros(3)}, ValueError, "initial has another shift"),
        ((x.expand(2, 5, 3), w, m, p), {"initial": stat}, ValueError, "initial must hold (2, 28) sums, got (28,)"),
    ]
    for args, options, kind, message in bad:
        with pytest.raises(kind, match=re.escape(message)):
            ops.gmm_em_statistics(*args, **options)
    bad = [
        ((3,), {}, TypeError, "stat must be GmmStatistics, got int"),
        ((stat, "diag"), {}, ValueError, "covariance_type must be 'full' as in stat, got 'diag'"),
        ((stat, "round"), {}, ValueError, "covariance_type must be one of"),
        ((stat,), {"reg_covar": -1.0}, ValueError, "reg_covar must be finite and not negative, got -1.0"),
        ((stat,), {"reg_covar": NAN}, ValueError, "reg_covar must be finite and not negative, got nan"),
        ((stat,), {"dtype": torch.float16}, TypeError, "dtype must be torch.float32 or torch.float64, got"),
    ]
    for args, options, kind, message in bad:
        with pytest.raises(kind, match=re.escape(message)):
            ops.gmm_m_step(*args, **options)
    with pytest.raises(TypeError, match="means must be a torch.Tensor, got int"):
        ops.gmm_responsibilities(x, w, 3, p)
