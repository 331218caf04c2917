"""Whole fits of Gaussian mixtures in plain torch, one after the other, float64."""

import math

import torch

from .gmm import TRAILING, covariance_shape
from .gmm_em import DEAD, NOT_FINITE, SINGULAR, gmm_em_statistics, gmm_m_step, sums_of
from .random import philox_words

STREAM = 6  # csrc/core/philox.h


def gmm_fit(x, sample_weight, seeds, responsibilities, log_weights, means, precisions_cholesky, k, covariance_type,
            max_iter, rounds, candidates, n_init, seed, tol, reg_covar):
    """weights, log_weights, means, covariances, precisions_cholesky, status, recovered, log_likelihood, n_iter,
    converged: see :func:`gmkernels.ops.gmm_fit`."""
    n, d = x.shape[-2:]
    parts = ((x, 2), (sample_weight, 1), (responsibilities, 2), (log_weights, 1), (means, 2),
             (precisions_cholesky, TRAILING[covariance_type]))
    batch = torch.broadcast_shapes(*(t.shape[: t.dim() - last] for t, last in parts if t is not None))
    flat = [None if t is None else t.double().expand(*batch, *t.shape[t.dim() - last:]).reshape(
        batch.numel(), *t.shape[t.dim() - last:]) for t, last in parts]
    seeds = torch.tensor([seed], device=x.device) if seeds is None else seeds.reshape(-1)
    numbers = 1 + (k - 1) * candidates
    made = []
    for b in range(batch.numel()):
        own, first = (seeds[b], 0) if len(seeds) > 1 else (seeds[0], b * numbers)
        mine = [None if t is None else t[b] for t in flat]
        made.append(_fit_one(*mine, _Picks(own, first, numbers), k, covariance_type, max_iter, rounds, candidates,
                             n_init, tol, reg_covar))
    matrix = covariance_shape(covariance_type, k, d)
    kinds = [(shape, x.dtype) for shape in ((k,), (k,), (k, d), matrix, matrix)]
    kinds += [((k,), torch.uint8), ((k,), torch.int64), ((), torch.float64), ((), torch.int64), ((), torch.bool)]
    return tuple(torch.stack([m[i].to(kind) for m in made]).reshape((*batch, *shape)) if made else
                 x.new_empty((*batch, *shape), dtype=kind) for i, (shape, kind) in enumerate(kinds))


class _Picks:
    """The uniform numbers of one mixture: [run] -> float64 [count]."""

    def __init__(self, seed, first, count):
        self.seed, self.at = seed, first + torch.arange(count, device=seed.device)

    def __getitem__(self, run):
        words = philox_words(self.at // 4, run, STREAM, self.seed)
        words = words.gather(-1, (self.at % 4)[:, None])[:, 0]
        return (words.double() + 0.5) * 2.0**-32


def _fit_one(x, weight, responsibilities, log_weights, means, precisions, picks, k, covariance_type, max_iter, rounds,
             candidates, n_init, tol, reg_covar):
    weight = x.new_ones(len(x)) if weight is None else weight
    x = torch.where((weight == 0)[:, None], 0.0, x)
    total = weight.sum()
    shift = (weight[:, None] * x).sum(0) / total
    x = torch.where((weight == 0)[:, None], 0.0, x - shift)
    zero = torch.zeros_like(shift)

    def maximisation(sums):
        return gmm_m_step(sums, zero, covariance_type, k, reg_covar, torch.float64)

    best = None
    for run in range(n_init):
        recovered = torch.zeros(k, dtype=torch.int64, device=x.device)
        if log_weights is not None:
            logs = log_weights.log_softmax(-1)
            made = _given(logs, means - shift, precisions, covariance_type)
        else:
            if responsibilities is not None:
                r = torch.where((weight == 0)[:, None], 0.0, responsibilities)
                r = r / torch.where(r.sum(1) == 0, 1.0, r.sum(1))[:, None]
            else:
                centres = _picked(x, weight, k, picks[run], candidates) if means is None else means - shift
                r = torch.nn.functional.one_hot(_kmeans(x, weight, centres, rounds), k).double()
            made = maximisation(sums_of(r * weight[:, None], x, total, total, covariance_type))
            recovered += (made[5] == DEAD) | (made[5] == SINGULAR)
        log_likelihood, n_iter, converged = total.new_tensor(-math.inf), 0, False
        fine = not bool((made[5] == NOT_FINITE).any())
        while fine and n_iter < max_iter and not converged:
            before = log_likelihood
            sums, _ = gmm_em_statistics(x, made[1], made[2], made[4], weight, zero, None, covariance_type)
            log_likelihood, n_iter = sums[0] / total, n_iter + 1
            fine = bool(log_likelihood.isfinite())
            if fine:
                made = maximisation(sums)
                recovered += (made[5] == DEAD) | (made[5] == SINGULAR)
                fine = not bool((made[5] == NOT_FINITE).any())
                converged = bool((log_likelihood - before).abs() < tol)
        fit = [*made, recovered, log_likelihood, torch.tensor(n_iter), torch.tensor(converged)]
        if not fine:
            fit[:5] = [torch.full_like(t, math.nan) for t in made[:5]]
            fit[5], fit[7], fit[9] = torch.full_like(made[5], NOT_FINITE), total * math.nan, torch.tensor(False)
            return [*fit[:2], fit[2] + shift, *fit[3:]]
        # by more than rounding: the same mixture with its components in another order is not better
        if best is None or bool(log_likelihood - best[7] > 1e-10 * (1 + best[7].abs())):
            best = fit
    return [*best[:2], best[2] + shift, *best[3:]]


def _given(log_weights, means, p, covariance_type):
    """A mixture in the form of an M-step."""
    if covariance_type in ("full", "tied"):
        p = p.triu()
        inverse = torch.linalg.inv_ex(p)[0]
        covariances = inverse.mT @ inverse
    else:
        covariances = p**-2
    return log_weights.exp(), log_weights, means, covariances, p, torch.zeros_like(log_weights, dtype=torch.uint8)


def _squares(x, centre):
    return sum((x[:, f] - centre[f]) ** 2 for f in range(x.shape[1]))


def _choose(weight, u):
    """The first row at which the cumulative weight exceeds u of the whole."""
    above = (weight.cumsum(0) > u * weight.sum()).nonzero()[:, 0]
    return int(above[0]) if len(above) else None


def _picked(x, weight, k, uniform, candidates):
    """k-means++ with `candidates` for every pick but the first: scikit-learn's, which is greedy."""
    default = int((weight > 0).nonzero()[0])
    first = _choose(weight, uniform[0])
    centres = x[default if first is None else first][None]
    nearest = _squares(x, centres[0])
    for c in range(1, k):
        least = None
        for t in range(candidates):
            row = _choose(weight * nearest, uniform[1 + (c - 1) * candidates + t])
            row = default if row is None else row
            trial = torch.minimum(nearest, _squares(x, x[row]))
            potential = (weight * trial).sum()
            if least is None or potential < least:
                least, best, after = potential, row, trial
        centres, nearest = torch.cat([centres, x[best][None]]), after
    return centres


def _kmeans(x, weight, centres, rounds):
    """The nearest centre of every row, after at most `rounds` moves of the centres."""
    centres = centres.clone()

    def assigned():
        return torch.stack([_squares(x, centre) for centre in centres], 1).argmin(1)

    labels = assigned()
    for _ in range(rounds):
        for c in range(len(centres)):
            mass = weight[labels == c].sum()
            if mass > 0:
                centres[c] = (weight[labels == c, None] * x[labels == c]).sum(0) / mass
        before, labels = labels, assigned()
        if torch.equal(labels, before):
            break
    return labels
