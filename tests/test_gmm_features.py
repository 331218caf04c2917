"""ops.gmm_marginal, gmm_condition, gmm_impute: against dense algebra, gradients, batches, special values, errors."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import cases
from gmkernels import ops
from test_gmm import F32, F64, INF, NAN, TYPES, mixture
from test_gmm_inference import covariances

types = pytest.mark.parametrize("covariance_type", TYPES)


def parameters(k=3, d=4, covariance_type="full", dtype=F64, batch=()):
    """Not normalised; garbage below the diagonal of the factors."""
    lw, means, p = mixture(1, d, k, covariance_type, dtype, "cpu", batch)[1:]
    return [lw, means, p + 7 * torch.ones_like(p).tril(-1) if p.dim() > 1 and p.shape[-1] == p.shape[-2] else p]


def normal(x, mean, covariance):
    """log N, [n]"""
    return torch.distributions.MultivariateNormal(mean, covariance, validate_args=False).log_prob(x)


@types
def test_marginal(covariance_type):
    lw, means, p = parameters(covariance_type=covariance_type)
    sigma = covariances(p, covariance_type, 3, 4)
    x = cases.data(9, 4)
    for features in ([2], [3, 0], range(4), (1, 2, 3)):
        index = list(features)
        got = ops.gmm_log_prob(x[:, index], *ops.gmm_marginal(features, lw, means, p, covariance_type), covariance_type)
        want = torch.stack([lw[c] + normal(x[:, index], means[c, index], sigma[c][index][:, index]) for c in range(3)])
        cases.close(got, want.logsumexp(0), rtol=1e-11, atol=1e-11)


@types
def test_condition(covariance_type):
    """p(x) = p(x_o) p(x_m | x_o), for every set of features and every row."""
    lw, means, p = parameters(covariance_type=covariance_type)
    x = cases.data(7, 4)
    for known in ([0], [3], [1, 2], [3, 0], [2, 0, 1]):
        rest = [i for i in range(4) if i not in known]
        got = ops.gmm_condition(x[:, known], known, lw, means, p, covariance_type)
        assert got.means.shape == (7, 3, len(rest))
        cases.close(got.log_weights.exp().sum(-1), torch.ones(7, dtype=F64), rtol=1e-12, atol=1e-12)
        joint = ops.gmm_log_prob(x, lw, means, p, covariance_type)
        alone = ops.gmm_log_prob(x[:, known], *ops.gmm_marginal(known, lw, means, p, covariance_type), covariance_type)
        cond = ops.gmm_log_prob(x[:, None, rest], *got, covariance_type)
        cases.close(cond[:, 0], joint - alone, rtol=1e-10, atol=1e-10)
    everything = ops.gmm_sample(5, *got, covariance_type, seed=1)[0]
    assert everything.shape == (7, 5, 1)


@types
def test_condition_on_a_batch(covariance_type):
    args = parameters(covariance_type=covariance_type, batch=(2,))
    given = cases.data(2, 5, 2)
    got = ops.gmm_condition(given, [3, 1], *args, covariance_type)
    shared = ops.gmm_condition(given, [3, 1], *(t[1] for t in args), covariance_type)
    for b in (0, 1):
        alone = ops.gmm_condition(given[b], [3, 1], *(t[b] for t in args), covariance_type)
        for g, s, a in zip(got, shared, alone, strict=True):
            cases.close(g[b], a, rtol=1e-13, atol=1e-13)
            if b == 1:
                cases.close(s[b] if s.dim() == g.dim() else s, a, rtol=1e-13, atol=1e-13)


@types
def test_impute(covariance_type):
    """The expectation of the conditional mixture; rows and order of patterns mixed."""
    args = parameters(covariance_type=covariance_type)
    x = cases.data(40, 4)
    lost = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    lost[0], lost[1] = False, True
    got = ops.gmm_impute(x.masked_fill(lost, NAN), *args, covariance_type)
    assert torch.equal(got[~lost], x[~lost])
    weights = args[0].softmax(-1)
    cases.close(got[1], weights @ args[1], rtol=1e-12, atol=1e-12)
    for i in range(2, 40):
        known = [j for j in range(4) if not lost[i, j]]
        if 0 < len(known) < 4:
            rest = ops.gmm_condition(x[i : i + 1, known], known, *args, covariance_type)
            want = rest.log_weights[0].exp() @ rest.means[0]
            cases.close(got[i][lost[i]], want, rtol=1e-10, atol=1e-10)


@types
def test_impute_on_a_batch(covariance_type):
    args = parameters(covariance_type=covariance_type, batch=(2, 3))
    x = cases.data(3, 6, 4)
    x[:, 2, 1] = x[1, 4, 0] = NAN
    got = ops.gmm_impute(x, *args, covariance_type)
    assert got.shape == (2, 3, 6, 4)
    for i in range(2):
        for j in range(3):
            assert torch.equal(got[i, j], ops.gmm_impute(x[j], *(t[i, j] for t in args), covariance_type))


@types
def test_gradients(covariance_type):
    args = [t.requires_grad_() for t in parameters(2, 3, covariance_type)]
    given = cases.data(2, 1).requires_grad_()
    x = cases.data(4, 3)
    lost = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 1, 0], [1, 1, 1]]) == 1
    x.requires_grad_()
    assert gradcheck(lambda *a: ops.gmm_marginal([2, 0], *a, covariance_type), args)
    assert gradcheck(lambda g, *a: ops.gmm_condition(g, [1], *a, covariance_type), (given, *args), fast_mode=True)
    assert gradcheck(lambda x, *a: ops.gmm_impute(torch.where(lost, NAN, x), *a, covariance_type), (x, *args),
                     fast_mode=True)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
@types
def test_dtypes(covariance_type, dtype):
    args = [t.to(dtype) for t in parameters(covariance_type=covariance_type)]
    x = cases.data(5, 4).to(dtype)
    x[2, 1] = NAN
    exact = [t.double() for t in args]
    tolerance = 1e-5 if dtype is F32 else 0.05
    for name, given in [("gmm_marginal", [[1, 3]]), ("gmm_condition", [x[:2, :2], [0, 1]]), ("gmm_impute", [x])]:
        op = getattr(ops, name)
        got = op(*given, *args, covariance_type)
        want = op(*(g.double() if isinstance(g, torch.Tensor) else g for g in given), *exact, covariance_type)
        for g, w in zip([got] if name == "gmm_impute" else got, [want] if name == "gmm_impute" else want, strict=True):
            assert g.dtype is dtype
            cases.close(g.double(), w, rtol=tolerance, atol=tolerance * float(w.abs().max()))


def test_special_values():
    args = parameters()
    got = ops.gmm_condition(torch.tensor([[0.5, NAN], [1.0, 2.0]], dtype=F64), [0, 2], *args)
    assert got.log_weights[0].isnan().all() and got.means[0].isnan().all()
    assert all(t[1].isfinite().all() for t in got[:2])
    x = torch.tensor([[INF, NAN, 0, 0], [1, NAN, 0, 0]], dtype=F64)
    got = ops.gmm_impute(x, *args)
    assert got[0, 0] == INF and got[0, 1].isnan() and got[1].isfinite().all()
    args[0][1] = -INF  # left out
    rest = ops.gmm_condition(cases.data(2, 1), [1], *args)
    assert (rest.log_weights[:, 1] == -INF).all() and rest.log_weights[:, [0, 2]].isfinite().all()


def test_nothing_there():
    args = parameters()
    assert ops.gmm_impute(torch.empty(0, 4, dtype=F64), *args).shape == (0, 4)
    assert ops.gmm_impute(torch.empty(0, 3, 4, dtype=F64), *args).shape == (0, 3, 4)
    assert ops.gmm_condition(torch.empty(0, 1, dtype=F64), [1], *args).means.shape == (0, 3, 3)


def test_far_apart():
    """Conditional weights where every density underflows."""
    lw, means, p = torch.zeros(2).double(), torch.tensor([[0.0, 1.0], [100.0, 2.0]]).double(), torch.ones(2).double()
    rest = ops.gmm_condition(torch.tensor([[1e4]], dtype=F64), [0], lw, means, p, "spherical")
    assert math.isclose(rest.log_weights[0, 0], -(1e4**2 - 9900**2) / 2, rel_tol=1e-12)
    assert ops.gmm_impute(torch.tensor([[1e4, NAN]], dtype=F64), lw, means, p, "spherical")[0, 1] == 2


@pytest.mark.parametrize("call, error, text", [
    (lambda a: ops.gmm_marginal([], *a), ValueError, "features must be different numbers from 0 to 3, at least one"),
    (lambda a: ops.gmm_marginal([1, 1], *a), ValueError, "features must be different numbers"),
    (lambda a: ops.gmm_marginal([4], *a), ValueError, r"features must be in \[0, 4\), got 4"),
    (lambda a: ops.gmm_marginal([-1], *a), ValueError, r"features must be in \[0, 4\), got -1"),
    (lambda a: ops.gmm_marginal([0.5], *a), TypeError, "features must be an integer, got float"),
    (lambda a: ops.gmm_marginal([0], a[0], a[1][0], a[2]), ValueError, r"means must be \[..., k, d\]"),
    (lambda a: ops.gmm_marginal([0], a[0].float(), *a[1:]), TypeError, "log_weights"),
    (lambda a: ops.gmm_marginal([0], *a, "diagonal"), ValueError, "covariance_type"),
    (lambda a: ops.gmm_condition(torch.zeros(2, 4).double(), range(4), *a), ValueError, "must leave at least one"),
    (lambda a: ops.gmm_condition(torch.zeros(2, 2).double(), [1], *a), ValueError, r"given must be \[..., n, 1\]"),
    (lambda a: ops.gmm_condition(torch.zeros(1).double(), [1], *a), ValueError, r"given must be \[..., n, 1\]"),
    (lambda a: ops.gmm_condition([1.0], [1], *a), TypeError, "given"),
    (lambda a: ops.gmm_condition(torch.zeros(2, 1), [1], *a), TypeError, "given"),
    (lambda a: ops.gmm_impute(torch.zeros(2, 3).double(), *a), ValueError, "d=3 as in x"),
    (lambda a: ops.gmm_impute(torch.zeros(2, 4), *a), TypeError, "means"),
    (lambda a: ops.gmm_impute(torch.zeros(2, 4).long(), *a), TypeError, "x must"),
])
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call(parameters())
