"""Where EM starts: scikit-learn's initialisations, with weights, without n x k in memory."""

import numpy as np
import torch

from .. import _patterns, ops
from .._factors import cholesky_of_precisions, covariances_of
from ..ops.kmeans import MAX_ITER, TOL, lloyd, local_trials

_BLOCK = 1 << 20  # numbers of a block of responsibilities


def start(estimator, x, weights, random_state, given):
    """`GmmParameters` of x's dtype on its device, as scikit-learn's ``_initialize_parameters`` makes them.

    x: ``[n, d]`` without NaN; weights: positive, or None; given: (weights, means, precisions) or None in their place.
    """
    kind = estimator.covariance_type
    made = None
    if any(part is None for part in given):
        made = _m_step(x, weights, _responsibilities(estimator, x, weights, random_state), kind, estimator.reg_covar,
                       estimator.n_components)
    def put(array):
        return torch.tensor(array, dtype=x.dtype, device=x.device)

    w = made.weights if given[0] is None else put(given[0])
    means = made.means if given[1] is None else put(given[1])
    if given[2] is None:
        covariances, factors, status = made.covariances, made.precisions_cholesky, made.status
    else:
        factors = cholesky_of_precisions(torch.tensor(given[2], dtype=torch.float64), kind)
        covariances = covariances_of(factors, kind).to(x)
        factors, status = factors.to(x), torch.zeros(len(w), dtype=torch.uint8, device=x.device)
    return ops.GmmParameters(w, w.log(), means, covariances, factors, status, kind)


def _responsibilities(estimator, x, weights, random_state):
    """The component of every row (int32), or one row for each (a list), or random responsibilities (a RandomState).

    k-means and k-means++ draw what scikit-learn's draw from random_state: the same choice, but for rounding.
    """
    n, k, how = len(x), estimator.n_components, estimator.init_params
    if how == "random":
        return random_state
    if how == "random_from_data":
        w = None if weights is None else weights.cpu().numpy().astype(np.float64)
        index = random_state.choice(n, size=k, replace=False, p=None if w is None else w / w.sum())
        return np.asarray(index).tolist()
    rows, w = (t if t is None or t.is_cuda else t.cpu() for t in (x, weights))
    uniforms = torch.from_numpy(random_state.random_sample(1 + (k - 1) * local_trials(k))).to(rows.device)
    centers, index = ops.kmeans_plus_plus(rows, k, sample_weight=w, uniforms=uniforms)
    if how == "k-means++":
        return index.tolist()
    return lloyd(rows, centers, w, MAX_ITER, TOL)[1].cpu()


def _shares(x, weights, r, k, state):
    """(component, some rows, their responsibilities times their weights), float64; the same on every pass."""
    size = max(1, _BLOCK // max(k, x.shape[1]))
    if isinstance(r, np.random.RandomState):
        r.set_state(state)
        for i in range(0, len(x), size):
            rows = x[i : i + size].double()
            resp = torch.from_numpy(r.uniform(size=(len(rows), k))).to(x).double()
            resp = resp / resp.sum(1, keepdim=True)
            if weights is not None:
                resp *= weights[i : i + size, None].double()
            for c in range(k):
                yield c, rows, resp[:, c]
        return
    if isinstance(r, list):
        for c, i in enumerate(r):
            yield c, x[i : i + 1].double(), (x.new_ones(1) if weights is None else weights[i : i + 1]).double()
        return
    size = max(1, _BLOCK // 4 // x.shape[1])
    for i in range(0, len(x), size):
        labels = r[i : i + size].numpy()
        if k < 2**15:
            labels = labels.astype(np.int16)  # which numpy sorts by counting
        counts = np.bincount(labels, minlength=k).tolist()
        order = torch.from_numpy(labels.argsort(kind="stable")).to(x.device)
        rows = x[i : i + size][order].double()
        w = rows.new_ones(len(rows)) if weights is None else weights[i : i + size][order].double()
        for c, (members, shares) in enumerate(zip(rows.split(counts), w.split(counts), strict=True)):
            if len(members):
                yield c, members, shares


def _m_step(x, weights, r, kind, reg_covar, k):
    """The M-step, about every component's own mean: one that holds a single row has exactly reg_covar."""
    d = x.shape[1]
    state = r.get_state() if isinstance(r, np.random.RandomState) else None
    nk, s1 = x.new_zeros(k, dtype=torch.float64), x.new_zeros(k, d, dtype=torch.float64)
    middle = x[: _BLOCK // max(d, 1) + 1].mean(0, dtype=torch.float64)  # near the data: for the rounding of s1
    for c, rows, resp in _shares(x, weights, r, k, state):
        nk[c] += resp.sum()
        s1[c] += resp @ (rows - middle)
    means = middle + s1 / nk.clamp(min=1e-300)[:, None]
    total = len(x) if weights is None else float(weights.sum(dtype=torch.float64))

    if kind == "tied":  # scikit-learn's: of all rows, also of those that belong to no component
        moment, size = x.new_zeros(d, d, dtype=torch.float64), max(1, _BLOCK // max(d, 1))
        for i in range(0, len(x), size):
            rows = x[i : i + size].double()
            moment += rows.T @ (rows if weights is None else rows * weights[i : i + size, None].double())
        s2 = ((moment - (nk[:, None] * means).T @ means) / nk.sum())
        one = nk.new_ones(1)
        parts = one, s2.new_zeros(1, d), s2, s2.new_zeros(()), s2.new_ones(()), s2.new_zeros(d)
    else:
        s2 = x.new_zeros((k, d, d) if kind == "full" else (k, d), dtype=torch.float64)
        for c, rows, resp in _shares(x, weights, r, k, state):
            t = rows - means[c]
            s2[c] += (t * resp[:, None]).T @ t if kind == "full" else resp @ t**2
        if kind == "spherical":
            s2 = s2.sum(1)
        parts = nk[:, None], s2.new_zeros(k, 1, d), s2[:, None], s2.new_zeros(k), nk, means
    made = ops.gmm_m_step(ops.GmmStatistics.of(*parts, kind), kind, reg_covar)
    pick = (lambda t: t) if kind == "tied" else (lambda t: t[:, 0])
    status = made.status.expand(k) if kind == "tied" else made.status[:, 0]
    w = (nk + 10 * torch.finfo(x.dtype).eps) / total
    return ops.GmmParameters(w.to(x.dtype), w.log().to(x.dtype), means.to(x.dtype), pick(made.covariances).to(x.dtype),
                             pick(made.precisions_cholesky).to(x.dtype), status, kind)


def normalised(parameters):
    """The same with weights that sum to 1: rows that belong to no component count in scikit-learn's start."""
    w = parameters.weights.double()
    w = w / w.sum()
    kind = parameters.weights.dtype
    return ops.GmmParameters(w.to(kind), w.log().to(kind), parameters.means, parameters.covariances,
                             parameters.precisions_cholesky, parameters.status, parameters.covariance_type)


def filled(x, weights, reg_covar):
    """x with its NaN replaced by conditional expectations under one Gaussian: what the initialisation works on.

    The Gaussian is fitted by a few EM iterations, on at most 20,000 rows.
    """
    from . import _em  # they use this module

    d = x.shape[1]
    kind = "full" if d <= 512 else "diag"
    step = -(-len(x) // 20_000)
    some = x[::step].double()
    mean = some.nanmean(0)
    mean = torch.where(mean.isnan(), x.double().nanmean(0), mean)
    variance = (some - mean).square().nanmean(0)
    variance = torch.where(variance > 0, variance, 1.0) + reg_covar  # also of a feature that lacks in these rows
    factors = variance.rsqrt()[None]
    one = mean.new_ones(1)
    parameters = ops.GmmParameters(one, one.log(), mean[None], 1 / factors**2, factors, one.new_zeros(1), kind)
    if kind == "full":
        parameters = ops.GmmParameters(one, one.log(), mean[None], torch.diag_embed(1 / factors**2),
                                       torch.diag_embed(factors), one.new_zeros(1), kind)
        rows = _em.Memory(some, None if weights is None else weights[::step].double())
        parameters = _em.run(rows, parameters, tol=1e-3, max_iter=20, reg_covar=reg_covar).parameters
    return _patterns.impute(x, _patterns.Mixture.of(parameters))
