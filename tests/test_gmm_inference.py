"""ops.gmm_sample, gmm_score, gmm_posterior_mean: values, statistics, routes, special values, errors."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import cases
from gmkernels import _C, ops, reference
from test_gmm import F32, F64, INF, NAN, TYPES, mixture

DOF_1E4 = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51}  # chi-square: exceeded once in 10^4


def parameters(k, d, covariance_type, dtype=F64, device="cpu", batch=()):
    return mixture(1, d, k, covariance_type, dtype, device, batch)[1:]


def covariances(p, covariance_type, k, d):
    """[k, d, d]"""
    if covariance_type in ("full", "tied"):
        p = p.triu()
        return torch.linalg.inv(p @ p.mT).expand(k, d, d)
    p = p if covariance_type == "diag" else p[:, None].expand(k, d)
    return torch.diag_embed(p**-2.0)


# samples -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_sample_reference(device, covariance_type, dtype):
    for n, d, k in [(1, 1, 1), (7, 3, 4), (130, 2, 33), (5, 0, 3), (0, 2, 2)] + ([] if device.simt else [(600, 17, 5)]):
        lw, means, p = parameters(k, d, covariance_type, dtype, device.torch)
        x, c = ops.gmm_sample(n, lw, means, p, covariance_type, seed=-3)
        cdf = lw.cpu().double().softmax(-1).cumsum(-1)
        want, which = reference.gmm.gmm_sample(means.cpu().double(), p.cpu().double(), cdf / cdf[-1], None, n, -3,
                                               covariance_type)
        assert x.shape == (n, d) and c.dtype is torch.int64 and torch.equal(c.cpu(), which)
        cases.close(x, want, rtol=1e-5 if dtype is F32 else 1e-6, atol=1e-5)  # normals are float32's


def test_sample_contract():
    """Component and row from the published words and normals."""
    lw, means, p = parameters(3, 2, "spherical")
    x, c = ops.gmm_sample(5, lw, means, p, "spherical", seed=9)
    z = ops.philox_normal((5, 2), seed=9, stream=4, dtype=F64)
    assert torch.allclose(x, means[c] + z / p[c, None], rtol=1e-15)
    u = ops.philox_uniform(5, seed=9, stream=3, dtype=F64)
    edges = lw.softmax(-1).cumsum(-1)
    assert torch.equal(c, (u[:, None] >= edges).sum(-1))


@pytest.mark.parametrize("covariance_type", TYPES)
def test_sample_statistics(covariance_type):
    n, d, k = 200_000, 3, 4
    lw, means, p = parameters(k, d, covariance_type)
    x, c = ops.gmm_sample(n, lw, means, p, covariance_type, seed=5)
    expected = lw.softmax(-1) * n
    assert ((c.bincount(minlength=k) - expected).square() / expected).sum() < DOF_1E4[k - 1]
    for j, want in enumerate(covariances(p, covariance_type, k, d)):
        part = x[c == j]
        t = part - means[j]
        assert (t.mean(0) / (want.diagonal() / len(part)).sqrt()).abs().max() < 4.5
        spread = (want.diagonal()[:, None] * want.diagonal() + want.square()) / len(part)  # of a sample covariance
        assert ((t.T @ t / len(part) - want) / spread.sqrt()).abs().max() < 4.5
    lp = ops.gmm_log_prob(x, lw.log_softmax(-1), means, p, covariance_type)
    other = ops.gmm_sample(n, lw, means, p, covariance_type, seed=6)[0]
    twin = ops.gmm_log_prob(other, lw.log_softmax(-1), means, p, covariance_type)
    assert abs(lp.mean() - twin.mean()) < 5 * (lp.var() / n * 2).sqrt()


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_sample_threads_isas_batches(isa, covariance_type):
    lw, means, p = parameters(5, 3, covariance_type, F32, batch=(4,))
    got = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        got.append(ops.gmm_sample(3001, lw, means, p, covariance_type, seed=2))
    for x, c in got[1:]:
        assert torch.equal(x, got[0][0]) and torch.equal(c, got[0][1])
    _C.set_isa("base")
    base = ops.gmm_sample(3001, lw, means, p, covariance_type, seed=2)
    assert torch.equal(base[1], got[0][1])
    cases.close(got[0][0], base[0].double())


def test_sample_seeds(device):
    lw, means, p = parameters(3, 5, "full", F32, device.torch, batch=(3,))
    seeds = torch.tensor([7, -1, 2**40], device=device.torch)
    x, c = ops.gmm_sample(9, lw, means, p, seed=seeds)
    for i in range(3):  # a mixture does not depend on its batch
        alone = ops.gmm_sample(9, lw[i], means[i], p[i], seed=int(seeds[i]))
        assert torch.equal(x[i], alone[0]) and torch.equal(c[i], alone[1])
    whole = ops.gmm_sample(9, lw, means, p, seed=7)
    assert torch.equal(whole[0][0], x[0]) and not torch.equal(whole[0][1], x[1])
    on_device = ops.gmm_sample(9, lw, means, p, seed=torch.tensor(7, device=device.torch))
    assert torch.equal(on_device[0], whole[0])
    torch.manual_seed(1)
    first = ops.gmm_sample(4, lw, means, p)[0]
    assert not torch.equal(first, ops.gmm_sample(4, lw, means, p)[0])
    torch.manual_seed(1)
    assert torch.equal(first, ops.gmm_sample(4, lw, means, p)[0])


def test_sample_shared_parameters(device):
    """Tensors that all mixtures of a batch share are read once each."""
    lw, means, p = parameters(3, 2, "diag", F64, device.torch)
    batch = lw[None] + torch.tensor([[0.0], [1.0]], device=device.torch, dtype=F64)
    x, c = ops.gmm_sample(6, batch, means, p, "diag", seed=1)
    y, e = ops.gmm_sample(12, lw, means, p, "diag", seed=1)
    assert torch.equal(x.reshape(12, 2), y) and torch.equal(c.reshape(12), e)


def test_sample_dead_components(device):
    lw, means, p = parameters(4, 2, "diag", F64, device.torch)
    lw[3], p[0, 1], means[3], means[0] = -INF, 0.0, NAN, INF
    x, c = ops.gmm_sample(200, lw, means, p, "diag", seed=0)
    assert set(c.tolist()) == {1, 2} and x.isfinite().all()
    x, c = ops.gmm_sample(3, torch.full_like(lw, -INF), means, p, "diag", seed=0)
    assert x.isnan().all() and (c == -1).all()
    x, c = ops.gmm_sample(3, lw[:0], means[:0], p[:0], "diag", seed=0)
    assert x.isnan().all() and (c == -1).all() and x.shape == (3, 2)
    x, c = ops.gmm_sample(3, torch.full_like(lw, NAN), means, p, "diag", seed=0)
    assert x.isnan().all() and (c == -1).all()


def test_sample_ignores_below_the_diagonal(device):
    lw, means, p = parameters(2, 3, "full", F64, device.torch)
    clean = ops.gmm_sample(5, lw, means, p.triu(), seed=0)[0]
    assert torch.equal(ops.gmm_sample(5, lw, means, p.triu() + torch.full_like(p, NAN).tril(-1), seed=0)[0], clean)
    strided = means.mT.contiguous().mT
    assert torch.equal(ops.gmm_sample(5, lw, strided, p.triu(), seed=0)[0], clean)


def test_sample_routes():
    lw, means, p = parameters(3, 2, "full", F32)
    want = ops.gmm_sample(40, lw, means, p, seed=4)
    torch.library.opcheck(torch.ops.gmkernels.gmm_sample.default,
                          (means, p, lw.double().softmax(-1).cumsum(-1), None, 5, 3, "full"))
    got = torch.compile(lambda *a: ops.gmm_sample(40, *a, seed=4), fullgraph=True, backend="aot_eager")(lw, means, p)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    half = ops.gmm_sample(40, lw.bfloat16(), means.bfloat16(), p.bfloat16(), seed=4)[0]  # the reference
    assert half.dtype is torch.bfloat16 and half.isfinite().all()
    assert not ops.gmm_sample(4, lw, means.requires_grad_(), p, seed=4)[0].requires_grad


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"n": -1}, ValueError, r"n must be in \[0, "),
    ({"n": 2.5}, TypeError, "n must be an integer"),
    ({"means": torch.zeros(2)}, ValueError, r"means must be \[..., k, d\]"),
    ({"means": torch.zeros(4, 2)}, ValueError, "log_weights must be"),
    ({"means": [1]}, TypeError, "means must be a torch.Tensor"),
    ({"means": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "means must be a floating-point tensor"),
    ({"precisions_cholesky": torch.zeros(3, 2, 2)}, ValueError, "precisions_cholesky must be"),
    ({"log_weights": torch.zeros(3, dtype=F64)}, TypeError, "log_weights must be"),
    ({"covariance_type": "round"}, ValueError, "covariance_type must be one of"),
    ({"seed": 2**64}, ValueError, "seed must be in"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed must have shape"),
], ids=str)
def test_sample_errors(change, error, text):
    args = {"n": 4, "log_weights": torch.zeros(3), "means": torch.zeros(3, 2), "precisions_cholesky": torch.ones(3, 2),
            "covariance_type": "diag", "seed": 0}
    with pytest.raises(error, match=text):
        ops.gmm_sample(**{**args, **change})


# the score -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance_type", TYPES)
def test_score(device, covariance_type):
    args = mixture(9, 3, 4, covariance_type, F64, device.torch)
    x = args[0].cpu().requires_grad_()
    lp = reference.gmm.gmm_log_prob(x, *(t.cpu() for t in args[1:]), covariance_type)
    (want,) = torch.autograd.grad(lp.sum(), x)
    cases.close(ops.gmm_score(*args, covariance_type), want, rtol=1e-11, atol=1e-11)
    cases.close(ops.gmm_score(*(t.float() for t in args), covariance_type), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_score_gradients(covariance_type):
    args = mixture(3, 2, 2, covariance_type, grad=True)
    assert gradcheck(lambda *a: ops.gmm_score(*a, covariance_type), args)
    assert gradgradcheck(lambda *a: ops.gmm_score(*a, covariance_type).sum(0), args)


def test_score_special_values():
    _, lw, means, p = mixture(1, 2, 2, "diag")
    x = torch.tensor([[NAN, 0.0], [INF, 0.0], [0.0, 0.0]], dtype=F64)
    s = ops.gmm_score(x, lw, means, p, "diag")
    assert s[0].isnan().all() and torch.equal(s[1], torch.zeros(2, dtype=F64)) and s[2].isfinite().all()


def test_score_routes():
    args = mixture(5, 2, 3, "full", F32)
    want = ops.gmm_score(*args)
    assert torch.equal(torch.compile(ops.gmm_score, fullgraph=True, backend="aot_eager")(*args), want)
    rows = torch.func.vmap(lambda x: ops.gmm_score(x[None], *args[1:])[0])(args[0])
    cases.close(rows, want.double(), rtol=1e-4, atol=1e-4)


# posterior mean ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance_type", TYPES)
def test_posterior_mean(device, covariance_type):
    """Against the formula for each component: sum_k r_k (mean_k + Sigma_k (Sigma_k + s^2 I)^-1 (y - mean_k))."""
    k, d, s = 4, 3, 0.7
    y, lw, means, p = mixture(11, d, k, covariance_type, F64, device.torch)
    got = ops.gmm_posterior_mean(y, lw, means, p, covariance_type, noise_std=s)
    y, lw, means, p = (t.cpu() for t in (y, lw, means, p))
    sigma = covariances(p, covariance_type, k, d)
    noisy = sigma + s * s * torch.eye(d, dtype=F64)
    each = torch.distributions.MultivariateNormal(means, noisy)
    r = (lw + each.log_prob(y[:, None])).softmax(-1)
    kept = means + torch.einsum("kab,kbc,nkc->nka", sigma, torch.linalg.inv(noisy), y[:, None] - means)
    cases.close(got, (r[..., None] * kept).sum(1), rtol=1e-10, atol=1e-10)


def test_posterior_mean_denoises():
    """No shrinkage towards one mean does better on samples of the mixture itself."""
    lw = torch.tensor([0.5, 0.5]).log()
    means, p = torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.full((2,), 4.0)
    x, _ = ops.gmm_sample(20_000, lw, means, p, "spherical", seed=0)
    y = x + 0.5 * ops.philox_normal(x.shape, seed=1)
    error = (ops.gmm_posterior_mean(y, lw, means, p, "spherical", noise_std=0.5) - x).square().mean()
    shrink = torch.linspace(0, 1, 101)[:, None, None]
    assert error < 0.6 * ((shrink * y - x).square().mean((1, 2))).min()


def test_posterior_mean_limits():
    y, lw, means, p = mixture(4, 2, 3, "full")
    assert torch.equal(ops.gmm_posterior_mean(y, lw, means, p, noise_std=0.0), y)
    far = ops.gmm_posterior_mean(y, lw, means, p, noise_std=1e6)  # noise says nothing: the mixture's mean
    cases.close(far, (lw.softmax(-1) @ means).expand(4, 2), rtol=1e-4, atol=1e-4)
    args = [t.requires_grad_() for t in (y, lw, means, p)]
    std = torch.tensor(0.3, dtype=F64, requires_grad=True)
    assert gradcheck(lambda *a: ops.gmm_posterior_mean(*a[:4], noise_std=a[4]), (*args, std))
    assert ops.gmm_posterior_mean(y[:0], lw, means, p, noise_std=1.0).shape == (0, 2)
    two = ops.gmm_posterior_mean(y, lw, means, p, noise_std=torch.tensor([0.3, 0.6], dtype=F64))
    cases.close(two[1], ops.gmm_posterior_mean(y, lw, means, p, noise_std=0.6), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"noise_std": -0.1}, ValueError, "noise_std must not be negative"),
    ({"noise_std": NAN}, ValueError, "noise_std must not be negative"),
    ({"covariance_type": "round"}, ValueError, "covariance_type must be one of"),
    ({"y": torch.zeros(3, 3)}, ValueError, "means must be"),
    ({"y": torch.zeros(3, 2, dtype=torch.int32)}, TypeError, "y must be a floating-point tensor"),
], ids=str)
def test_posterior_mean_errors(change, error, text):
    args = {"y": torch.zeros(3, 2), "log_weights": torch.zeros(3), "means": torch.zeros(3, 2),
            "precisions_cholesky": torch.ones(3, 2), "covariance_type": "diag", "noise_std": 1.0}
    with pytest.raises(error, match=text):
        ops.gmm_posterior_mean(**{**args, **change})
