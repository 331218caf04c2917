"""One iteration of EM, E-step and M-step, beside scikit-learn's own and the best eager forms in torch."""

import math
import warnings

import torch

from .. import ops, reference
from .case import Case

OPS = ("gmm_em_statistics",)

_REG = 1e-6
# name, n, d, k, covariance, rows of an eager chunk, least ratio: scikit-learn float32, float64, fastest torch
_ROWS = (
    ("E", 20_000, 8, 8, "full", 2048, 45, 40, 5.0),
    ("A", 100_000, 16, 32, "full", 2048, 55, 40, 4.5),
    ("B", 100_000, 64, 64, "full", 2048, 15, 20, 2.4),
    ("C", 1_000_000, 16, 64, "diag", 8192, 55, 33, 5.0),
    ("D", 100_000, 64, 256, "diag", 4096, 13, 27, 4.0),
)


def _data(n, d, k, covariance_type):
    """Rows of k overlapping Gaussians, and a mixture after three iterations from random rows: no two well separated."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(k, d, generator=generator)
    scales = 0.5 + torch.rand(k, d, generator=generator)
    label = torch.randint(k, (n,), generator=generator)
    x = centres[label] + scales[label] * torch.randn(n, d, generator=generator)
    x = x.double()
    eye = torch.eye(d).expand(k, d, d)
    p = (eye if covariance_type == "full" else torch.ones(k, d)).double() / 2
    parameters = torch.full((k,), -math.log(k), dtype=torch.float64), x[:k].clone(), p
    for _ in range(3):
        made = ops.gmm_m_step(ops.gmm_em_statistics(x, *parameters, covariance_type), reg_covar=_REG)
        parameters = made.log_weights, made.means, made.precisions_cholesky
    return [x, *parameters]


def _affine(log_weights, means, p, full, columns):
    """log w_k N(x; k) as features(x) . weights_k: a matrix product for all components. About the mean of the means."""
    d = means.shape[1]
    centre = means.mean(0)
    m = means - centre
    if full:
        precision = p @ p.mT
        linear = (precision @ m[:, :, None])[:, :, 0]
        log_det = p.diagonal(dim1=1, dim2=2).log().sum(1)
        square = -0.5 * precision.flatten(1) if columns is None else _folded(precision, columns)
    else:
        linear, log_det, square = m * p * p, p.log().sum(1), -0.5 * p * p
    constant = log_weights + log_det - 0.5 * d * math.log(2 * math.pi) - 0.5 * (m * linear).sum(1)
    return centre, torch.cat([constant[:, None], linear, square], 1).T.contiguous()


def _folded(precision, columns):
    """The upper triangle: what is off the diagonal counts twice."""
    i, j = columns
    return -torch.where(i == j, 0.5, 1.0).to(precision) * precision[:, i, j]


def _chunk(x, centre, weights, full, columns):
    """Features' sums [features, k], and the log-likelihood, of some rows."""
    t = x - centre
    if not full:
        square = t * t
    elif columns is None:
        square = (t[:, :, None] * t[:, None, :]).flatten(1)
    else:
        square = t[:, columns[0]] * t[:, columns[1]]
    features = torch.cat([torch.ones_like(t[:, :1]), t, square], 1)
    lp = features @ weights
    row = torch.logsumexp(lp, 1)
    return features.T @ (lp - row[:, None]).exp(), row.sum()


def eager(x, log_weights, means, p, covariance_type, chunk, triangle=False, step=_chunk):
    """One iteration in plain torch: chunks of rows that stay in cache, centred, sums added in float64."""
    full, d = covariance_type == "full", x.shape[1]
    columns = torch.triu_indices(d, d).unbind(0) if full and triangle else None
    centre, weights = _affine(log_weights, means, p, full, columns)
    sums, likelihood = 0.0, 0.0
    for rows in x.split(chunk):
        part, value = step(rows, centre, weights, full, columns)
        sums, likelihood = sums + part.double(), likelihood + value.double()
    nk, delta = sums[0], (sums[1 : 1 + d] / sums[0]).T
    second = (sums[1 + d :] / nk).T
    if full:
        if columns is None:
            second = second.unflatten(1, (d, d))
        else:
            square = second.new_empty(len(nk), d, d)
            square[:, columns[0], columns[1]] = square[:, columns[1], columns[0]] = second
            second = square
        covariances = second - delta[:, :, None] * delta[:, None, :] + _REG * torch.eye(d).double()
        low = torch.linalg.cholesky(covariances)
        precisions = torch.linalg.solve_triangular(low, torch.eye(d).double(), upper=False).mT
    else:
        covariances = second - delta**2 + _REG
        precisions = covariances.rsqrt()
    made = (nk / nk.sum()).log(), centre.double() + delta, covariances, precisions
    return *(t.to(x.dtype) for t in made), likelihood


def ours(x, log_weights, means, p, covariance_type):
    stat = ops.gmm_em_statistics(x, log_weights, means, p, covariance_type)
    made = ops.gmm_m_step(stat, reg_covar=_REG, dtype=x.dtype)
    return made.log_weights, made.means, made.covariances, made.precisions_cholesky, stat.log_likelihood


def _scikit_learn(x, log_weights, means, p, covariance_type):
    """Its own E-step and M-step: nothing of `fit` around them."""
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError:
        return "not installed"
    array, weights = x.numpy(), log_weights.exp().numpy()

    def iteration():
        model = GaussianMixture(len(means), covariance_type=covariance_type, reg_covar=_REG)
        model.weights_, model.means_, model.precisions_cholesky_ = weights, means.numpy(), p.numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            likelihood, log_resp = model._e_step(array)
            model._m_step(array, log_resp)
        return likelihood

    return iteration


def _error(f, args, covariance_type):
    """Means and covariances after one iteration on the first rows, against the reference in float64."""
    few = [args[0][:2000], *args[1:]]
    exact = [t.double() for t in few]
    sums, shift = reference.gmm_em.gmm_em_statistics(*exact, None, None, None, covariance_type)
    want = reference.gmm_em.gmm_m_step(sums, shift, covariance_type, len(args[2]), _REG, torch.float64)
    got = f(*few)
    seen = (sums[2 : 2 + len(args[2])] > 1).nonzero()[:, 0]
    pairs = (got[1][seen], want[2][seen]), (got[2][seen], want[3][seen])
    return max(((g.double() - w).abs().max() / w.abs().max()).item() for g, w in pairs)


def cases(quick, device):
    for name, n, d, k, covariance_type, chunk, single, double, fastest in _ROWS:
        if quick and name not in "AE":
            continue
        made = _data(n, d, k, covariance_type)
        for dtype in (torch.float32,) if quick else (torch.float32, torch.float64):
            args = [t.to(dtype).to(device) for t in made]
            goals = {"scikit-learn": single if dtype is torch.float32 else double}
            if dtype is torch.float32:
                goals["fastest torch"] = fastest
            yield _case(args, made, covariance_type, chunk, goals, torch.device(device).type == "cpu", quick)


def _case(args, made, covariance_type, chunk, goals, cpu, quick):
    (n, d), k, dtype = args[0].shape, len(args[2]), args[0].dtype
    full = covariance_type == "full"
    name = str(dtype).removeprefix("torch.")
    wide = [t.to(args[0].device) for t in made]
    step = torch.compile(_chunk, dynamic=False)
    rivals = {"eager": lambda: eager(*args, covariance_type, chunk)}
    if full:
        rivals["eager, triangle"] = lambda: eager(*args, covariance_type, chunk, True)
    if dtype is torch.float32:
        rivals["eager, float64"] = lambda: eager(*wide, covariance_type, chunk)
        if full:
            rivals["eager, triangle, float64"] = lambda: eager(*wide, covariance_type, chunk, True)
    rivals["torch.compile"] = "not in --quick" if quick else lambda: eager(*args, covariance_type, chunk, step=step)
    rivals["scikit-learn"] = _scikit_learn(*args, covariance_type) if cpu else "CPU only"
    size = f"{n // 1000}k" if n < 1_000_000 else f"{n // 1_000_000}M"
    own = dict(goals) if cpu else {}
    least = own.pop("fastest torch", None)
    if least is not None:
        own |= {rival: least for rival in rivals if rival != "scikit-learn" and callable(rivals[rival])}
    return Case(
        "gmm_em_statistics",
        f"{size} x {d}, {k} {covariance_type}, one iteration",
        ours=lambda: ours(*args, covariance_type),
        rivals=rivals,
        dtype=name,
        bytes=args[0].element_size() * n * d,
        flops=2 * n * k * (d * d + 3 * d) if full else 8 * n * k * d,
        exps=n * k,
        error=lambda: _error(lambda *a: ours(*a, covariance_type), args, covariance_type),
        rival_error=lambda: _error(lambda *a: eager(*a, covariance_type, chunk), args, covariance_type),
        goals=own,
    )
