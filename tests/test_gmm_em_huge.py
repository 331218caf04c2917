"""EM past 2^31, in the emulator: the last block of each launch. The launches are called without the ops, which would
allocate what huge.empty only reserves."""

import pytest
import torch

import cases
from gmkernels import _call, reference
from gmkernels.ops import gmm_em as em_module

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
FLOAT, DOUBLE = torch.float32, torch.float64
FULL, DIAG, SPHERICAL = 0, 2, 3
HALF_LOG_2_PI = 0.91893853320467274


def statistics(outs, scratch, ins, sizes, covariance, slabs=1, strides=(0, 0, 0, 0), weight_stride=0, shift_stride=0):
    """`scratch`: sums of slabs, of groups, rows."""
    with backend.running(blocks=[-1]):
        _call.Kernel.backend("gmm_em_statistics", (*outs, *scratch, None), ins,
                             (slabs, 0, strides, *sizes, 0, covariance, weight_stride, shift_stride, False))
        return [backend.written(t) for t in (*outs, *scratch) if t.numel()]


def test_rows_simt():
    """Without components: what counts of a row is its weight. 1033 groups of rows in each mixture."""
    b, n = 1024, 2**21 + 2**14 + 7
    weights, groups = huge.periodic((b, n), FLOAT), -(-n // em_module.GMM_EM_ROWS)
    outs = torch.empty(b, 2).double(), torch.empty(b, 0).double()
    scratch = torch.empty(0).double(), huge.empty((b, groups, 2), DOUBLE), huge.empty((2, b, n), FLOAT)
    x = nothing = torch.empty(0)
    written = statistics(outs, scratch, (x, nothing, nothing, nothing, weights, None, None), (b, n, 0, 0), DIAG,
                         weight_stride=n)
    at = written[-1]
    at = at[at >= b * n] - b * n
    assert at[-1] >= 2**31 and len(at) > 10**6
    assert torch.equal(scratch[2][1].flatten()[at], weights.flatten()[at])
    mixture, group = divmod(int(written[1][-1]) // 2, groups)
    first = group * em_module.GMM_EM_ROWS
    want = weights[mixture, first : first + em_module.GMM_EM_ROWS].double().sum()
    cases.close(scratch[1][mixture, group, 1], want, rtol=1e-9)


def test_shifts_simt():
    """Without components: the shift is 0, or what is given."""
    b, d = 2**20 + 2**15, 2**11
    shift = huge.periodic((b, d), DOUBLE)
    for given, ins in ((True, shift), (False, None)):
        outs = huge.empty((b, 2), DOUBLE), huge.empty((b, d), DOUBLE)
        nothing = torch.empty(0)
        scratch = nothing.double(), nothing.double(), nothing
        at = statistics(outs, scratch, (nothing, nothing, nothing, nothing, None, ins, None), (b, 0, 0, d), DIAG,
                        0, shift_stride=d)[1]
        assert at[-1] >= 2**31 and len(at) > 10**6
        want = shift.flatten()[at].float().double() if given else torch.zeros(len(at)).double()
        assert torch.equal(outs[1].flatten()[at], want)


@pytest.mark.slow
@pytest.mark.parametrize("covariance, k, d", [(FULL, 2**11 + 2**6, 2**10), (DIAG, 2**20 + 2**15, 2**10)], ids=str)
def test_sums_simt(covariance, k, d):
    """No rows: the sums are what they begin from."""
    matrices = k * d * d if covariance == FULL else k * d
    numbers = 2 + k + k * d + matrices
    initial = huge.periodic((numbers,), DOUBLE)
    count = 1 + 2 * d if covariance == DIAG else 1 + d + d * (d + 1) // 2
    outs = huge.empty((numbers,), DOUBLE), huge.empty((d,), DOUBLE)
    x, log_weights, means = torch.empty(0, d), torch.full((k,), -torch.inf), huge.periodic((k, d), FLOAT)
    p = huge.periodic((matrices,), FLOAT)
    scratch = huge.empty((k * count,), DOUBLE), torch.empty(0).double(), torch.empty(0)
    shift = huge.empty((d,), DOUBLE)
    at = statistics(outs, scratch, (x, log_weights, means, p, None, shift, initial), (1, 0, k, d), covariance)[0]
    assert at[-1] >= 2**31 and len(at) > 10**6 - 2**7
    assert torch.equal(outs[0][at], initial[at])


def test_responsibilities_simt():
    n, k = 2**21 + 2**15 + 3, 2**10
    x, means = huge.periodic((n, 1), FLOAT), cases.data(k, 1, dtype=FLOAT)
    out, log_prob = huge.empty((n, k), FLOAT), huge.empty((n,), FLOAT)
    with backend.running(blocks=[-1]):
        _call.Kernel.backend("gmm_responsibilities", (out, log_prob, None), (x, torch.zeros(k), means, torch.ones(k)),
                             (0, (0, 0, 0, 0), 1, n, k, 1, 0, SPHERICAL))
        at, rows = backend.written(out), backend.written(log_prob)
    assert at[-1] >= 2**31 and len(at) > 10**6
    at = at[torch.isin(at // k, rows)]  # the others have a log-density that another block would have found
    assert len(at) > 1000
    row, c = at // k, at % k
    t = x[row, 0].double() - means[c, 0].double()
    want = (-0.5 * t**2 - HALF_LOG_2_PI - log_prob[row].double()).exp()
    cases.close(out.flatten()[at], want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("covariance_type, d", [("full", 32), ("diag", 2**11)])
def test_m_step_simt(covariance_type, d):
    """Of mixtures of one component, half of them without weight."""
    covariance = em_module._TYPES.index(covariance_type)
    per = d * d if covariance == FULL else d
    b, numbers = 2**31 // per + 2112 + 1001, 3 + d + per
    sums, shift = huge.periodic((b, numbers), DOUBLE), huge.periodic((b, d), DOUBLE, seed=1)
    outs = [huge.empty((b, *s), FLOAT) for s in ((1,), (1,), (1, d), (per,), (per,))]
    at_a_time = 1056 if covariance == FULL else 0
    scratch = huge.empty((2, b, 1), DOUBLE), huge.empty((2 * 1056 * d * d,), DOUBLE)
    status = huge.empty((b, 1), torch.uint8)
    with backend.running(blocks=[-1]):
        _call.Kernel.backend("gmm_m_step", (*outs, status, *scratch), (sums, shift),
                             (at_a_time, b, 1, d, covariance, 1e6, 0))
        done, at = backend.written(outs[0]), backend.written(outs[3])  # the last block of the matrices has these too
    assert at[-1] >= 2**31 and len(done) > 400
    for q in done[-4:]:
        own = sums[q].clone()
        if covariance == FULL:  # the upper triangle is read
            upper = own[-per:].view(d, d).triu()
            own[-per:] = (upper + upper.triu(1).mT).flatten()
        want = reference.gmm_em.gmm_m_step(own, shift[q], covariance_type, 1, 1e6, DOUBLE)
        for got, w in zip((*outs[:2], *outs[3:]), (*want[:2], *want[3:5]), strict=True):
            cases.close(got[q].double(), w.flatten(), rtol=1e-3, atol=1e-5 * w.abs().max().item())
