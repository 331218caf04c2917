"""distributions.GaussianMixture, nn.GaussianMixture, nn.MixtureDensity: against torch.distributions."""

import math
import re

import pytest
import torch
from torch import distributions as D
from torch.autograd import gradcheck, gradgradcheck

import cases
import gmkernels as gmk
from gmkernels import ops
from gmkernels.distributions import GaussianMixture

F64 = torch.float64
K, DIM = 3, 2


def parts(batch=(), k=K, d=DIM, dtype=F64):
    """logits, loc, covariances: overlapping components."""
    a = cases.data(*batch, k, d, d, seed=3)
    covariance = 0.5 * a @ a.mT + torch.eye(d, dtype=F64)
    return [t.to(dtype) for t in (cases.data(*batch, k, seed=1), 2 * cases.data(*batch, k, d, seed=2), covariance)]


def forms(batch=()):
    """Each way to say it: (our mixture, torch's)."""
    logits, loc, covariance = parts(batch)
    weights = D.Categorical(logits=logits)
    full = D.MixtureSameFamily(weights, D.MultivariateNormal(loc, covariance))
    yield GaussianMixture(logits, loc, covariance_matrix=covariance), full
    yield GaussianMixture(logits, loc, scale_tril=torch.linalg.cholesky(covariance)), full
    yield GaussianMixture(logits, loc, precision_matrix=torch.linalg.inv(covariance)), full
    one = covariance[..., :1, :, :]
    tied = D.MixtureSameFamily(weights, D.MultivariateNormal(loc, one.expand(covariance.shape)))
    yield GaussianMixture(logits, loc, covariance_matrix=one), tied
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    diag = D.MixtureSameFamily(weights, D.Independent(D.Normal(loc, scale), 1))
    yield GaussianMixture(logits, loc, scale), diag
    round_ = D.MixtureSameFamily(weights, D.Independent(D.Normal(loc, scale[..., :1].expand(loc.shape)), 1))
    yield GaussianMixture(logits, loc, scale[..., :1]), round_
    yield GaussianMixture(logits, loc, precisions_cholesky=1 / scale, covariance_type="diag"), diag


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_same_as_torch(batch):
    for ours, theirs in forms(batch):
        assert ours.batch_shape == theirs.batch_shape and ours.event_shape == theirs.event_shape
        for sample in [(), (1,), (5,), (2, 4)]:
            x = cases.data(*sample, *batch, DIM, seed=5)
            cases.close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-10, atol=1e-10)
        cases.close(ours.mean, theirs.mean, rtol=1e-12, atol=1e-12)
        cases.close(ours.variance, theirs.variance, rtol=1e-10, atol=1e-10)


def test_broadcasting():
    logits, loc, covariance = parts((3, 1))
    mixture = GaussianMixture(logits, loc, covariance_matrix=parts((4,))[2])
    assert mixture.batch_shape == (3, 4)
    x = cases.data(5, 3, 4, DIM)
    assert mixture.log_prob(x).shape == (5, 3, 4)
    one = cases.data(DIM)  # one value for all mixtures
    cases.close(mixture.log_prob(one), mixture.log_prob(one.expand(3, 4, DIM)))
    assert mixture.sample((2,)).shape == (2, 3, 4, DIM)


@pytest.mark.parametrize("n", [1, 3, 8, 9], ids=str)  # a few rows per mixture have a kernel of their own
def test_rows_of_many_mixtures(isa, n):
    for ours, theirs in forms((37,)):
        x = cases.data(n, 37, DIM, seed=6)
        cases.close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-10, atol=1e-10)
        logits, loc = (t.detach().clone().requires_grad_() for t in (ours.logits, ours.loc))
        p = ours._precisions.detach().clone().requires_grad_()
        x = x.movedim(0, 1).contiguous().requires_grad_()
        grad = cases.data(37, n, seed=8)
        lp = ops.gmm_log_prob(x, logits, loc, p, ours._covariance_type)
        got = torch.autograd.grad(lp, (x, logits, loc, p), grad)
        want = torch.autograd.grad(gmk.reference.gmm.gmm_log_prob(x, logits, loc, p, ours._covariance_type),
                                   (x, logits, loc, p), grad)
        for g, w in zip(got, want, strict=True):
            cases.close(g, w, rtol=1e-9, atol=1e-11)


def test_few_rows_special_values():
    """The kernel for a few rows has the special values of the other."""
    logits, loc, covariance = parts((5,))
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt().reciprocal()
    x = cases.data(5, 1, DIM)
    x[0, 0, 0], x[1, 0, 1] = math.nan, -math.inf
    logits[2, 1], loc[2, 1] = -math.inf, math.nan
    scale[3, 0, 1] = 0
    loc[3, 0] = math.inf
    logits[4] = -math.inf
    args = [t.requires_grad_() for t in (x, logits, loc, scale)]
    lp = ops.gmm_log_prob(*args, "diag")
    many = [t.repeat_interleave(20, -2) if t is x else t for t in args]  # 20 rows: the general kernel
    wide = ops.gmm_log_prob(*many, "diag")
    cases.close(lp.detach(), wide[:, :1])
    assert lp[0].isnan() and lp[1] == lp[4] == -math.inf and lp[2:4].isfinite().all()
    got = torch.autograd.grad(lp.sum(), args)
    want = torch.autograd.grad(wide.sum() / 20, args)
    for g, w in zip(got, want, strict=True):
        cases.close(g, w, rtol=1e-9, atol=1e-9)


def test_gradients():
    logits, loc, covariance = parts((2,))
    x = cases.data(3, 2, DIM, seed=5)
    leaves = [t.requires_grad_() for t in (x, logits, loc, torch.linalg.cholesky(covariance))]

    def f(x, logits, loc, tril):
        return GaussianMixture(logits, loc, scale_tril=tril.tril(), validate_args=False).log_prob(x)

    assert gradcheck(f, leaves) and gradgradcheck(f, leaves)
    mixture = GaussianMixture(logits, loc, scale_tril=leaves[3])
    (want,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    cases.close(mixture.score(x), want, rtol=1e-10, atol=1e-10)


def test_samples():
    for ours, theirs in forms():
        x, component = ours.sample_with_component((100_000,), seed=3)
        assert torch.equal(ours.sample((100_000,), seed=3), x) and not x.requires_grad
        expected = theirs.mixture_distribution.probs * len(x)
        assert ((component.bincount(minlength=K) - expected).square() / expected).sum() < 18.42  # 2 dof, 1e-4
        assert ((x.mean(0) - ours.mean) / (ours.variance / len(x)).sqrt()).abs().max() < 4.5
        cases.close(x.T.cov(), ours.covariance, rtol=0.05, atol=0.05)
        assert ours.sample((2, 5)).shape == (2, 5, DIM) and ours.sample().shape == (DIM,)
    torch.manual_seed(0)
    first = ours.sample((3,))
    torch.manual_seed(0)
    assert torch.equal(first, ours.sample((3,)))
    probs = ours.component_probs(x[:7])
    assert probs.shape == (7, K) and torch.allclose(probs.sum(-1), torch.ones(7, dtype=F64))


def test_posterior_mean():
    ours = next(forms((2,)))[0]
    y = cases.data(4, 2, DIM)
    got = ours.posterior_mean(y, 0.5)
    for b in range(2):
        logits, loc, covariance = (t[b] for t in parts((2,)))
        alone = GaussianMixture(logits, loc, covariance_matrix=covariance)
        cases.close(got[:, b], alone.posterior_mean(y[:, b], 0.5), rtol=1e-10, atol=1e-10)


def test_expand():
    for ours, theirs in forms((1, 3)):
        wide, other = ours.expand((4, 3)), theirs.expand((4, 3))
        assert type(wide) is GaussianMixture and wide.batch_shape == (4, 3)
        x = cases.data(2, 4, 3, DIM)
        cases.close(wide.log_prob(x), other.log_prob(x), rtol=1e-10, atol=1e-10)
        assert wide.sample((5,)).shape == (5, 4, 3, DIM) and wide.mean.shape == (4, 3, DIM)


def test_habits():
    """Works where torch.distributions works."""
    ours = next(forms((4,)))[0]
    twice = D.Independent(ours, 1)
    assert twice.log_prob(cases.data(4, DIM)).shape == ()
    moved = D.TransformedDistribution(ours, [D.AffineTransform(1.0, 2.0, event_dim=1)])
    x = cases.data(4, DIM)
    cases.close(moved.log_prob(2 * x + 1), ours.log_prob(x) - DIM * math.log(2), rtol=1e-12, atol=1e-12)
    assert "GaussianMixture" in repr(ours) and not ours.has_rsample
    with pytest.raises(NotImplementedError, match="no closed form"):
        ours.entropy()


@pytest.mark.parametrize(("arguments", "error", "text"), [
    ({}, ValueError, "give exactly one of scale, "),
    ({"scale": torch.ones(3, 2), "scale_tril": torch.eye(2).expand(3, 2, 2)}, ValueError, "got scale, scale_tril"),
    ({"scale": torch.ones(2, 2)}, ValueError, r"scale must be \[..., 3, 2\] or \[..., 3, 1\]"),
    ({"scale_tril": torch.eye(3)}, ValueError, r"scale_tril must be \[..., 3, 2, 2\]"),
    ({"scale": -torch.ones(3, 2)}, ValueError, "scale"),
    ({"covariance_matrix": -torch.eye(2).expand(3, 2, 2)}, Exception, "positive-definite|PositiveDefinite"),
    ({"scale": torch.ones(3, 2), "covariance_type": "diag"}, ValueError, "covariance_type goes with"),
    ({"precisions_cholesky": torch.ones(3, 2)}, ValueError, "covariance_type goes with"),
    ({"precisions_cholesky": torch.ones(3, 2), "covariance_type": "full"}, ValueError, "precisions_cholesky must be"),
    ({"scale": torch.ones(3, 2, dtype=F64)}, TypeError, "scale must be torch.float32"),
    ({"scale": [1.0]}, TypeError, "scale must be a torch.Tensor"),
    ({"logits": torch.zeros(4), "scale": torch.ones(3, 2)}, ValueError, "log_weights must be"),
    ({"loc": torch.zeros(3), "scale": torch.ones(3, 2)}, ValueError, "loc must be"),
], ids=str)
def test_errors(arguments, error, text):
    # said, because torch.compile turns the default off for the whole process
    arguments = {"logits": torch.zeros(3), "loc": torch.zeros(3, 2), "validate_args": True, **arguments}
    with pytest.raises(error, match=text):
        GaussianMixture(**arguments)


def test_value_errors():
    logits, loc, covariance = parts((4,))
    ours = GaussianMixture(logits, loc, covariance_matrix=covariance, validate_args=True)
    for value in (cases.data(DIM + 1), cases.data(3, DIM), torch.full((4, DIM), math.nan, dtype=F64)):
        with pytest.raises(ValueError):
            ours.log_prob(value)


# modules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance_type", gmk.reference.gmm.COVARIANCE_TYPES)
def test_module_fits(covariance_type):
    torch.manual_seed(0)
    logits, loc, covariance = parts(dtype=torch.float32)
    x = GaussianMixture(logits, 3 * loc, covariance_matrix=covariance).sample((500,), seed=1)
    module = gmk.nn.GaussianMixture(K, DIM, covariance_type, x=x)
    assert torch.equal((module.loc[:, None] == x).all(-1).any(1), torch.ones(K, dtype=torch.bool))
    optimiser = torch.optim.Adam(module.parameters(), 0.05)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = -module(x).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1 and all(p.grad.isfinite().all() for p in module.parameters())
    twin = gmk.nn.GaussianMixture(K, DIM, covariance_type)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x)) and covariance_type in repr(module)


def test_module_start():
    """Every covariance is that of the data, its diagonal."""
    x = cases.data(4000, 3, seed=2).float() * torch.tensor([1.0, 5.0, 0.2])
    for covariance_type in ("full", "tied", "diag"):
        mixture = gmk.nn.GaussianMixture(2, 3, covariance_type, x=x).distribution()
        cases.close(mixture._covariances.squeeze(-3)[..., 0, :, :] if covariance_type != "tied" else
                    mixture._covariances[0], x.double().var(0, correction=0).diag(), rtol=1e-4, atol=1e-4)
    few = gmk.nn.GaussianMixture(4, 3, "diag", x=x[:2])  # fewer rows than components
    assert few(x[:5]).isfinite().all()


@pytest.mark.parametrize("covariance_type", gmk.reference.gmm.COVARIANCE_TYPES)
def test_mixture_density_network(covariance_type):
    """y = +-h: a network with one mean cannot say it, two components can."""
    torch.manual_seed(0)
    h = torch.rand(512, 1) + 0.5
    y = h * torch.randint(0, 2, (512, 1)).mul(2).sub(1) + 0.05 * torch.randn(512, 1)
    y = torch.cat([y, -y], 1)
    net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), gmk.nn.MixtureDensity(16, 2, 2, covariance_type))
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(150):
        optimiser.zero_grad()
        loss = -net(h).log_prob(y).mean()
        loss.backward()
        optimiser.step()
    one = D.Normal(y.mean(0), y.std(0)).log_prob(y).sum(-1).mean()
    assert -loss > one + 1.0
    assert net(h).sample((3,)).shape == (3, 512, 2) and net(h.reshape(2, 256, 1)).batch_shape == (2, 256)


def test_compile():
    net = gmk.nn.MixtureDensity(4, 3, 2)
    h, y = cases.data(6, 4).float(), cases.data(6, 2).float()
    fast = torch.compile(lambda h, y: net(h).log_prob(y), fullgraph=True, backend="aot_eager")
    cases.close(fast(h, y), net(h).log_prob(y).double())


@pytest.mark.parametrize(("make", "text"), [
    (lambda: gmk.nn.GaussianMixture(0, 2), "n_components must be a positive int, got 0"),
    (lambda: gmk.nn.GaussianMixture(2, 2.0), "n_features must be a positive int, got 2.0"),
    (lambda: gmk.nn.MixtureDensity(4, 2, 2, "round"), "covariance_type must be one of"),
    (lambda: gmk.nn.GaussianMixture(2, 2, x=torch.zeros(3, 3)), "x must be a tensor of rows [n, 2]"),
], ids=["components", "features", "type", "rows"])
def test_module_errors(make, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make()
