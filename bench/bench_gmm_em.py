"""EM beside scikit-learn and the best eager forms in torch: one iteration on many rows, fits of many mixtures."""

import math
import warnings

import torch

from .. import ops, reference
from .case import Case

OPS = ("gmm_em_statistics", "gmm_fit")

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


# many small fits ------------------------------------------------------------------------------------------------------


def _small(b, n, d, k):
    """b data sets of k overlapping clusters."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(b, k, d, generator=generator)
    label = torch.randint(k, (b, n, 1), generator=generator)
    return torch.take_along_dim(centres, label, 1) + torch.randn(b, n, d, generator=generator)


def _scikit_learn_fits(x, k, start, **options):
    """A loop over its own fits; from `start`, or from a start of its own."""
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError:
        return "not installed"
    rows, given = x.numpy(), [{}] * len(x)
    if start is not None:
        w, p = start.weights.double(), (start.precisions_cholesky @ start.precisions_cholesky.mT).numpy()
        w, means = (w / w.sum(1, keepdim=True)).numpy(), start.means.numpy()
        given = [{"weights_init": w[b], "means_init": means[b], "precisions_init": p[b]} for b in range(len(x))]

    def fits():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [GaussianMixture(k, reg_covar=_REG, random_state=0, **g, **options).fit(one)
                    for one, g in zip(rows, given, strict=True)]

    return fits


def eager_fits(x, start, iterations):
    """All mixtures at once in plain torch: features made once, two batched products an iteration, sums in float64."""
    b, n, d = x.shape
    i, j = torch.triu_indices(d, d, device=x.device)
    centre = x.mean(1, keepdim=True)
    t = x - centre
    features = torch.cat([torch.ones_like(t[..., :1]), t, t[..., i] * t[..., j]], -1)
    log_weights, means, p = start.log_weights, start.means - centre, start.precisions_cholesky
    eye = torch.eye(d, dtype=torch.float64, device=x.device)
    for _ in range(iterations):
        precision = p @ p.mT
        linear = (precision @ means[..., None])[..., 0]
        square = -torch.where(i == j, 0.5, 1.0).to(x) * precision[..., i, j]
        constant = (log_weights + p.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * d * math.log(2 * math.pi)
                    - 0.5 * (means * linear).sum(-1))
        lp = features @ torch.cat([constant[..., None], linear, square], -1).mT
        row = torch.logsumexp(lp, -1, keepdim=True)
        sums = ((lp - row).exp().mT @ features).double()
        nk, likelihood = sums[..., :1], row.mean()
        delta, second = sums[..., 1 : 1 + d] / nk, sums[..., 1 + d :] / nk
        covariances = second.new_empty(*second.shape[:2], d, d)
        covariances[..., i, j] = covariances[..., j, i] = second
        covariances = covariances - delta[..., :, None] * delta[..., None, :] + _REG * eye
        low = torch.linalg.cholesky(covariances)
        factor = torch.linalg.solve_triangular(low, eye.expand_as(low), upper=False).mT
        log_weights, means, p = ((nk[..., 0] / n).log().to(x), delta.to(x), factor.to(x))
    return means + centre, covariances.to(x), likelihood


def _fit_case(x, k, iterations):
    """From one start, the same number of iterations for all; or (None) every fit as it comes."""
    b, n, d = x.shape
    start = ops.gmm_fit(x, k, max_iter=0, seed=0) if iterations else None
    options = {"init": start, "max_iter": iterations, "tol": 0.0} if iterations else {"seed": 0}
    theirs = {"max_iter": iterations, "tol": 0.0} if iterations else {}
    few, some = 20, b // 10

    def part(count):
        return None if start is None else ops.GmmParameters(
            *(t[:count] for t in (start.weights, start.log_weights, start.means, start.covariances,
                                  start.precisions_cholesky, start.status)), "full")

    rivals = {"scikit-learn, a loop": _scikit_learn_fits(x[:few], k, part(few), **theirs)}
    note = f"scikit-learn timed on {few} of the mixtures, scaled"
    if iterations:
        rivals["eager, batched"] = lambda: eager_fits(x[:some], part(some), iterations)
        note = f"scikit-learn timed on {few} of the mixtures, eager on {some}, both scaled"

    def error(f):
        exact = [t[:20].double() for t in (start.log_weights, start.means, start.precisions_cholesky)]
        want = reference.gmm_fit.gmm_fit(x[:20].double(), None, None, None, *exact, k, "full", iterations, 0, 0, 1, 0,
                                         0.0, _REG)
        pairs = zip(f(), want[2:4], strict=True)
        return max(((g.double() - w).abs().max() / w.abs().max()).item() for g, w in pairs)

    def ours_all():
        made = ops.gmm_fit(x, k, **options)
        return made.weights, made.means, made.covariances, made.log_likelihood

    def ours_few():
        made = ops.gmm_fit(x[:20], k, init=part(20), max_iter=iterations, tol=0.0)
        return made.means, made.covariances

    how = f"{iterations} iterations from one start" if iterations else "whole fits, a start of their own"
    dtype = str(x.dtype).removeprefix("torch.")
    return Case(
        "gmm_fit",
        f"{b // 1000}k of {n} x {d}, {k} full, {how}",
        ours=ours_all,
        rivals=rivals,
        dtype=dtype,
        bytes=x.element_size() * x.numel(),
        flops=b * iterations * 2 * n * k * (d * d + 3 * d) if iterations else 0.0,
        exps=b * iterations * n * k if iterations else 0.0,
        error=(lambda: error(ours_few)) if iterations else None,
        rival_error=(lambda: error(lambda: eager_fits(x[:20], part(20), iterations)[:2])) if iterations else None,
        parts={"scikit-learn, a loop": few / b, "eager, batched": some / b},
        goals={"scikit-learn, a loop": 100},
        note=note,
    )


def _fit_cases(quick):
    x = _small(1000 if quick else 10_000, 200, 4, 3)
    for dtype in (torch.float32,) if quick else (torch.float32, torch.float64):
        yield _fit_case(x.to(dtype), 3, 20)
        if not quick:
            yield _fit_case(x.to(dtype), 3, None)


def cases(quick, device):
    if torch.device(device).type == "cpu":  # elsewhere there is no kernel, and the reference loops
        yield from _fit_cases(quick)
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
