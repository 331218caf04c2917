"""gmm_log_prob on photographs: the pixels of scikit-learn's china.jpg and flower.jpg beside the best eager forms,
their compilations, scikit-learn and torch.distributions."""

import math

import torch

from .. import ops, reference
from .case import Case

OPS = ("gmm_log_prob",)

_D = 16


def _patches(n, generator):
    """n x 16 float32: 4x4 patches (48 numbers, 0 to 255) of both photographs, on their leading 16 principal axes."""
    from sklearn.datasets import load_sample_images

    patches = []
    for image in load_sample_images().images:
        image = torch.tensor(image).float()
        rows = image.unfold(0, 4, 1).unfold(1, 4, 1).reshape(-1, 48)
        patches.append(rows)
    patches = torch.cat(patches)
    patches = patches[torch.randint(len(patches), (n,), generator=generator)]
    sample = patches[:50_000].double()
    _, axes = torch.linalg.eigh(torch.cov(sample.T))
    # Pixels are whole numbers; half a level of noise keeps patches of one colour from being one point.
    return patches @ axes[:, -_D:].float() + 0.5 * torch.randn(n, _D, generator=generator)


def _fit(x, k, covariance_type):
    """A few steps of EM from random rows on a subsample: components that overlap as fitted ones do."""
    x = x[: 200 * k].double()
    means = x[torch.arange(k) * 200]
    variance = x.var(0)
    scales = variance.rsqrt().expand(k, -1)
    p = scales.diag_embed() if covariance_type == "full" else scales
    log_weights = torch.full((k,), -math.log(k), dtype=torch.float64)
    for _ in range(8):
        r = reference.gmm.gmm_component_log_prob(x, log_weights, means, p, covariance_type).softmax(-1)
        nk = r.sum(0) + 1e-3
        means = (r.T @ x + 1e-3 * x.mean(0)) / nk[:, None]
        log_weights = (nk / nk.sum()).log()
        t = x[:, None] - means
        if covariance_type == "full":
            covariance = torch.einsum("nk,nka,nkb->kab", r, t, t) / nk[:, None, None] + 0.1 * torch.eye(_D)
            p = torch.linalg.inv(torch.linalg.cholesky(covariance)).mT.contiguous()
        else:
            p = (torch.einsum("nk,nkd->kd", r, t * t) / nk[:, None] + 0.1).rsqrt()
    return [a.float().contiguous() for a in (log_weights, means, p)]


def _affine(log_weights, means, p, covariance_type):
    """log w_k N(x; k) = constant_k + features(x) . weights_k: one matrix product for all components."""
    d = means.shape[-1]
    centre = means.mean(0)
    m = means - centre
    if covariance_type == "full":
        precision = p @ p.mT
        linear = (precision @ m[:, :, None])[:, :, 0]
        weights, log_det = torch.cat([linear, -0.5 * precision.flatten(1)], 1), p.diagonal(dim1=1, dim2=2).log().sum(1)
    else:
        precision = p * p
        linear = m * precision
        weights, log_det = torch.cat([linear, -0.5 * precision], 1), p.log().sum(1)
    constant = log_weights + log_det - 0.5 * d * math.log(2 * math.pi) - 0.5 * (m * linear).sum(1)
    return centre, weights.T.contiguous(), constant


def _chunk_log_prob(x, centre, weights, constant, full):
    x = x - centre
    square = (x[:, :, None] * x[:, None, :]).flatten(1) if full else x * x
    return torch.logsumexp(torch.addmm(constant, torch.cat([x, square], 1), weights), 1)


def eager(x, log_weights, means, p, covariance_type, chunk, step=_chunk_log_prob):
    """Chunks of rows that stay in cache; the quadratic form as a matrix product on [x, x x^T] or [x, x^2], centred.

    The fastest form tried: triangular features and the residual form (x P reshaped) took 1.5 to 2 times as long.
    """
    centre, weights, constant = _affine(log_weights, means, p, covariance_type)
    return torch.cat([step(c, centre, weights, constant, covariance_type == "full") for c in x.split(chunk)])


def _mixture_same_family(x, log_weights, means, p, covariance_type):
    D = torch.distributions
    if covariance_type == "full":
        covariance = torch.cholesky_inverse(p.mT.contiguous())
        parts = D.MultivariateNormal(means, covariance, validate_args=False)
    else:
        parts = D.Independent(D.Normal(means, 1 / p, validate_args=False), 1)
    weights = D.Categorical(logits=log_weights)
    return D.MixtureSameFamily(weights, parts, validate_args=False).log_prob(x)


def _scikit_learn(x, log_weights, means, p, covariance_type):
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError:
        return "not installed"
    model = GaussianMixture(len(means), covariance_type=covariance_type)
    model.weights_, model.means_, model.precisions_cholesky_ = (t.numpy() for t in (log_weights.exp(), means, p))
    array = x.numpy()
    return lambda: model.score_samples(array)


def cases(quick, device):
    for n, k, covariance_type, chunk in ((100_000, 32, "full", 2048), (1_000_000, 64, "diag", 8192)):
        generator = torch.Generator().manual_seed(0)
        x = _patches(n, generator)
        parameters = _fit(x, k, covariance_type)
        args = [t.to(device) for t in (x, *parameters)]
        for backward in (False, True):
            yield _case(args, n, k, covariance_type, chunk, backward, torch.device(device).type == "cpu")


def _case(args, n, k, covariance_type, chunk, backward, cpu):
    full = covariance_type == "full"
    torch._dynamo.reset()
    step = torch.compile(_chunk_log_prob, dynamic=False)
    leaves = [t.detach().clone().requires_grad_(backward) for t in args]

    def whole(f):
        if not backward:
            return lambda: f(*leaves)
        return lambda: torch.autograd.grad(f(*leaves).sum(), leaves)

    ours = whole(lambda *a: ops.gmm_log_prob(*a, covariance_type))
    best = whole(lambda *a: eager(*a, covariance_type, chunk))
    rivals = {
        "eager": best,
        "torch.compile": whole(lambda *a: eager(*a, covariance_type, chunk, step)),
    }
    if not backward:
        rivals["scikit-learn"] = _scikit_learn(*args, covariance_type) if cpu else "CPU only"
    rivals["MixtureSameFamily"] = (
        whole(lambda *a: _mixture_same_family(*a, covariance_type)) if n <= 100_000 else "needs n x k x d in memory"
    )

    def error(f):
        """On the first rows, against the reference in float64."""
        few = [args[0][:2000], *args[1:]]
        exact = [t.double().requires_grad_(backward) for t in few]
        few = [t.clone().requires_grad_(backward) for t in few]
        got, want = f(*few), reference.gmm.gmm_log_prob(*exact, covariance_type)
        if backward:
            got, want = torch.autograd.grad(got.sum(), few), torch.autograd.grad(want.sum(), exact)
        pairs = zip(got, want, strict=True) if backward else [(got, want)]
        return max(((g.double() - w).abs().max() / w.abs().max()).item() for g, w in pairs)

    pair = _D * (_D + 1) if full else 2 * _D  # flops of one quadratic form, halved by symmetry
    flops = n * k * (pair + 4 * _D if full else 4 * _D)
    if backward:
        flops += n * k * (3 * pair + 4 * _D if full else 12 * _D)
    size, way = "1M" if n > 100_000 else "100k", "forward+backward" if backward else "forward"
    return Case(
        "gmm_log_prob",
        f"{size} x {_D}, {k} {covariance_type}, {way}",
        ours=ours,
        rivals=rivals,
        bytes=4 * n * (2 * _D + 3 if backward else _D + 1),
        flops=flops,
        exps=n * k * (2 if backward else 1),
        error=lambda: error(lambda *a: ops.gmm_log_prob(*a, covariance_type)),
        rival_error=lambda: error(lambda *a: eager(*a, covariance_type, chunk)),
        goals={"fastest": 3.0} if cpu else {},
    )
