"""Mixtures in use: samples, the score, density networks, beside torch.distributions and scikit-learn."""

import math

import torch

from .. import ops, reference
from . import bench_gmm
from .case import Case

OPS = ("gmm_sample", "gmm_score", "gmm_log_prob")


def cases(quick, device):
    yield _sample(1_000_000, 16, 32, device)
    yield _score(100_000, 16, 32, device)
    yield _density_network(8192, 8, 2, device)


def _mixture(k, d, device):
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(k, d, generator=generator)
    p = (0.2 * torch.randn(k, d, d, generator=generator)).triu(1) + 1.5 * torch.eye(d)
    return [t.to(device) for t in (torch.full((k,), -math.log(k)), means, p)]


def _torch_mixture(log_weights, means, p):
    """MixtureSameFamily, its factors ready."""
    D = torch.distributions
    eye = torch.eye(p.shape[-1], device=p.device).expand(p.shape)
    factor = torch.linalg.solve_triangular(p, eye, upper=True).mT.contiguous()
    parts = D.MultivariateNormal(means, scale_tril=factor, validate_args=False)
    return D.MixtureSameFamily(D.Categorical(logits=log_weights), parts, validate_args=False)


def _sorted_sample(n, log_weights, means, factor):
    """The rows component by component, as scikit-learn orders them: no gather of factors."""
    counts = torch.multinomial(log_weights.exp(), n, replacement=True).bincount(minlength=len(means)).tolist()
    rows = [torch.randn(c, m.shape[0], device=m.device) @ f + m
            for c, m, f in zip(counts, means, factor, strict=True)]
    return torch.cat(rows)


def _sample(n, d, k, device):
    args = _mixture(k, d, device)
    theirs = _torch_mixture(*args)
    eye = torch.eye(d, device=device).expand(k, d, d)
    factor = torch.linalg.solve_triangular(args[2], eye, upper=True)
    cdf = torch.linspace(0, 1, k + 1, dtype=torch.float64)[1:]

    def error():
        got = ops.gmm_sample(2000, *args, seed=1)[0].cpu().double()
        lw, means, p = (t.cpu().double() for t in args)
        want = reference.gmm.gmm_sample(means, p, cdf, None, 2000, 1, "full")[0]
        return ((got - want).abs().max() / want.abs().max()).item()

    return Case(
        "gmm_sample",
        f"{n // 1_000_000}M x {d}, {k} full",
        ours=lambda: ops.gmm_sample(n, *args, seed=0),
        rivals={
            "eager": lambda: _sorted_sample(n, args[0], args[1], factor),
            "MixtureSameFamily": (lambda: theirs.sample((n,))) if n <= 100_000 else "draws n x k x d",
            "scikit-learn": _scikit_learn(n, *args) if torch.device(device).type == "cpu" else "CPU only",
        },
        bytes=4 * n * d + 8 * n,
        flops=n * d * d,
        normals=n * d,
        error=error,
    )


def _scikit_learn(n, log_weights, means, p):
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError:
        return "not installed"
    model = GaussianMixture(len(means), random_state=0)
    model.weights_, model.means_ = log_weights.exp().double().numpy(), means.numpy()
    model.weights_ /= model.weights_.sum()
    model.covariances_ = torch.linalg.inv(p.double() @ p.double().mT).numpy()
    return lambda: model.sample(n)


def _score(n, d, k, device):
    args = _mixture(k, d, device)
    x = ops.gmm_sample(n, *args, seed=2)[0]

    def eager():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(bench_gmm.eager(leaf, *args, "full", 2048).sum(), leaf)[0]

    torch._dynamo.reset()
    step = torch.compile(bench_gmm._chunk_log_prob, dynamic=False)

    def compiled():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(bench_gmm.eager(leaf, *args, "full", 2048, step).sum(), leaf)[0]

    def error(f):
        few = x[:2000]
        exact = [t.cpu().double() for t in (few, *args)]
        want = reference.gmm.gmm_log_prob_backward(torch.ones(2000, dtype=torch.float64), None, *exact, "full", True,
                                                   False)[0]
        return ((f(few).cpu().double() - want).abs().max() / want.abs().max()).item()

    return Case(
        "gmm_score",
        f"{n // 1000}k x {d}, {k} full",
        ours=lambda: ops.gmm_score(x, *args),
        rivals={"eager": eager, "torch.compile": compiled},
        bytes=4 * n * (4 * d + 3),
        flops=n * k * (3 * d * (d + 1) + 6 * d),
        exps=2 * n * k,
        error=lambda: error(lambda few: ops.gmm_score(few, *args)),
    )


def _eager_diag(x, log_weights, means, p):
    square = ((x[:, None] - means) * p).square().sum(-1)
    normal = p.log().sum(-1) - 0.5 * means.shape[-1] * math.log(2 * math.pi)
    return torch.logsumexp(log_weights + normal - 0.5 * square, -1)


def _density_network(n, k, d, device):
    """One row for each of n mixtures: the loss of a mixture density network."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n, k), (n, k, d)
    x = torch.randn(n, d, generator=generator).to(device)
    lw, means = (torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes)
    p = (torch.rand(n, k, d, generator=generator) + 0.5).to(device).requires_grad_()
    leaves = lw, means, p
    torch._dynamo.reset()
    compiled = torch.compile(_eager_diag, dynamic=False)

    def family(x, lw, means, p):
        D = torch.distributions
        parts = D.Independent(D.Normal(means, 1 / p, validate_args=False), 1)
        weights = D.Categorical(logits=lw, validate_args=False)
        return D.MixtureSameFamily(weights, parts, validate_args=False).log_prob(x)

    def whole(f):
        return lambda: torch.autograd.grad(f(x, *leaves).sum(), leaves)

    def ours(x, lw, means, p):
        return ops.gmm_log_prob(x[:, None], lw, means, p, "diag")

    def error(f):
        exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
        want = torch.autograd.grad(_eager_diag(x.cpu().double(), *exact).sum(), exact)
        got = torch.autograd.grad(f(x, *leaves).sum(), leaves)
        return max(((g.cpu().double() - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True))

    return Case(
        "gmm_log_prob",
        f"{n} mixtures of {k} diag on R^{d}, a row each, forward+backward",
        ours=whole(ours),
        rivals={"eager": whole(_eager_diag), "torch.compile": whole(compiled), "MixtureSameFamily": whole(family)},
        bytes=4 * n * (4 * k * (2 * d + 1) + d),
        flops=n * k * 14 * d,
        exps=2 * n * k,
        error=lambda: error(ours),
        rival_error=lambda: error(_eager_diag),
    )
