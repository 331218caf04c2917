r"""Rows with missing entries: their density, what they say of the components, their imputation. float64; plain torch.

With o the features that a row has and m those that it lacks, component k has the density ``N(x_o; mu_o, S_oo)``, and
given x_o the rest is ``N(mu_m + S_mo S_oo^-1 (x_o - mu_o), C)``, ``C = S_mm - S_mo S_oo^-1 S_om``.

Rows are grouped by pattern, so that S_oo is factorised once per pattern and component; patterns with about as many rows
go through torch in one batch. S_oo keeps its place in a d x d matrix that is the identity elsewhere: its Cholesky
factor is that of S_oo, and patterns of different size fit into one batch.

Source: Ghahramani and Jordan, "Supervised learning from incomplete data via an EM approach", 1994.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ._factors import covariances_of

_MATRICES = 1 << 20  # numbers of a batch's factorised matrices
_ROWS = 1 << 20  # numbers of a batch's rows, times components
_SLOT = 256  # rows of one pattern that go together


@dataclass
class Part:
    """Some rows under a mixture of k components. P patterns, R rows of each, c = 1 (tied) or k matrices."""

    rows: torch.Tensor  # [P, R], index of the row
    valid: torch.Tensor  # [P, R], False: nothing there
    log_prob: torch.Tensor  # [P, R, k], weighted: log_weight + log density of what is observed
    filled: torch.Tensor  # [P, R, k, d], conditional means in the place of NaN
    spread: torch.Tensor  # [P, c, d, d], or [P, c, d] for diag: conditional covariances, 0 where observed
    seen: torch.Tensor  # [P, d]


class Mixture:
    """Parameters in float64, as this module uses them."""

    def __init__(self, log_weights, means, precisions_cholesky, covariance_type):
        self.kind = covariance_type
        self.log_weights, self.means = log_weights.double(), means.double()
        factors = precisions_cholesky.double()
        covariances = covariances_of(factors, self.kind)
        if self.kind == "tied":
            covariances = covariances[None]
        elif self.kind == "spherical":
            covariances = covariances[:, None].expand(self.means.shape)
        self.covariances = covariances  # full, tied [c, d, d]; diag, spherical [k, d]

    @classmethod
    def of(cls, parameters):
        """Of `ops.GmmParameters`."""
        return cls(parameters.log_weights, parameters.means, parameters.precisions_cholesky, parameters.covariance_type)


class Patterns:
    """Rows ``[n, d]`` with NaN, grouped by which features they lack."""

    def __init__(self, x):
        self.x = x.double()
        self.seen = ~x.isnan()
        n, d = x.shape
        seen = self.seen.cpu().numpy()
        packed = np.ascontiguousarray(np.packbits(seen, axis=1))
        names = packed.view(np.dtype((np.void, max(packed.shape[1], 1))))[:, 0] if packed.size else np.zeros(n)
        _, inverse, counts = np.unique(names, return_inverse=True, return_counts=True)
        self.order = np.argsort(inverse, kind="stable")
        slots = -(-counts // _SLOT)  # of every pattern
        pattern = np.repeat(np.arange(len(counts)), slots)
        within = (np.arange(len(pattern)) - np.repeat(np.cumsum(slots) - slots, slots)) * _SLOT
        self.sizes = np.minimum(_SLOT, counts[pattern] - within)
        self.starts = (np.cumsum(counts) - counts)[pattern] + within
        by_size = np.argsort(self.sizes, kind="stable")
        self.sizes, self.starts = self.sizes[by_size], self.starts[by_size]

    def _batches(self, k, matrix):
        """(rows [P, R], valid [P, R]): patterns of about the same number of rows."""
        d, at = self.x.shape[1], 0
        while at < len(self.sizes):
            end = min(len(self.sizes), at + max(1, _MATRICES // max(1, matrix)))
            while end - at > 1 and (end - at) * self.sizes[end - 1] * k * d > _ROWS:
                end = at + (end - at) // 2
            most = self.sizes[end - 1]
            place = np.arange(most)[None, :]
            valid = place < self.sizes[at:end, None]
            rows = self.order[np.where(valid, self.starts[at:end, None] + place, self.starts[at:end, None])]
            yield torch.from_numpy(rows).to(self.x.device), torch.from_numpy(valid).to(self.x.device)
            at = end

    def parts(self, mixture):
        k, d = mixture.means.shape
        elementwise = mixture.kind in ("diag", "spherical")
        for rows, valid in self._batches(k, d if elementwise else len(mixture.covariances) * d * d):
            make = _elementwise if elementwise else _matrices
            yield make(mixture, rows, valid, self.x[rows], self.seen[rows[:, 0]])


def _elementwise(mixture, rows, valid, x, seen):
    variance, mean = mixture.covariances, mixture.means
    here = seen[:, None, None, :]
    distance = torch.where(here, x[:, :, None] - mean, 0.0)
    scaled = (distance * variance.rsqrt()).square().sum(-1)
    constant = (seen[:, None] * (math.log(2 * math.pi) + variance.log())).sum(-1)
    log_prob = mixture.log_weights - 0.5 * (scaled + constant[:, None])
    filled = torch.where(here, x[:, :, None], mean)
    return Part(rows, valid, log_prob, filled, torch.where(seen[:, None], 0.0, variance), seen)


def _matrices(mixture, rows, valid, x, seen):
    S, mean, d = mixture.covariances, mixture.means, x.shape[-1]
    o = seen.double()[:, None]  # [P, 1, d]
    m = 1 - o
    L = _cholesky(S * o[..., None] * o[..., None, :] + torch.diag_embed(m.expand(-1, len(S), d)))
    distance = torch.where(seen[:, None, None, :], x[:, None] - mean[:, None], 0.0)  # [P, k, R, d]
    root = torch.linalg.solve_triangular(L, torch.eye(d).to(L), upper=False)  # root^T root = S_oo^-1
    z = distance @ root.mT
    log_prob = mixture.log_weights[:, None] - 0.5 * (
        z.square().sum(-1) + (o.sum(-1) * math.log(2 * math.pi))[..., None]
    ) - L.diagonal(dim1=-2, dim2=-1).log().sum(-1)[..., None]
    filled = torch.where(seen[:, None, None, :], x[:, None], mean[:, None] + z @ (root @ (S * o[..., None])))
    half = root @ (S * o[..., None] * m[..., None, :])
    spread = S * m[..., None] * m[..., None, :] - half.mT @ half
    return Part(rows, valid, log_prob.mT, filled.transpose(1, 2), spread, seen)


def _cholesky(A):
    """Of matrices that are positive definite but for rounding."""
    L, failed = torch.linalg.cholesky_ex(A)
    ridge = 1e-15
    while bool(failed.any()) and ridge < 1:
        at = failed.nonzero(as_tuple=True)
        size = A[at].diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None] * ridge
        L[at], failed[at] = torch.linalg.cholesky_ex(A[at] + size * torch.eye(A.shape[-1]).to(A))
        ridge *= 10
    return L


# prediction -----------------------------------------------------------------------------------------------------------


def log_prob(x, mixture):
    """Log-density of what is observed ``[n]``; 0 for a row without any entry, when the weights sum to 1."""
    out = x.new_empty(len(x), dtype=torch.float64)
    for part in Patterns(x).parts(mixture):
        out[part.rows[part.valid]] = torch.logsumexp(part.log_prob, -1)[part.valid]
    return out.to(x.dtype)


def responsibilities(x, mixture):
    """``[n, k]``, given what is observed."""
    out = x.new_empty(len(x), len(mixture.means), dtype=torch.float64)
    for part in Patterns(x).parts(mixture):
        out[part.rows[part.valid]] = torch.softmax(part.log_prob, -1)[part.valid]
    return out.to(x.dtype)


def impute(x, mixture):
    """``[n, d]``: the expectation of what is missing."""
    out = x.clone()
    for part in Patterns(x).parts(mixture):
        mean = (torch.softmax(part.log_prob, -1)[..., None] * part.filled).sum(-2)
        rows = part.rows[part.valid]
        out[rows] = torch.where(x[rows].isnan(), mean[part.valid].to(x.dtype), x[rows])
    return out


def draw(x, mixture, n_draws, random_state):
    """``[n_draws, n, d]``: what is missing, drawn from its distribution given what is observed."""
    n, d = x.shape
    uniform = torch.from_numpy(random_state.random_sample((n_draws, n))).to(x.device)
    normal = torch.from_numpy(random_state.standard_normal((n_draws, n, d))).to(x.device)
    out = x.expand(n_draws, n, d).clone()
    for part in Patterns(x).parts(mixture):
        (P, R, k), spread = part.log_prob.shape, part.spread
        if mixture.kind in ("full", "tied"):
            seen = torch.diag_embed(part.seen.double())[:, None]
            root = _cholesky(spread + seen) - seen
        else:
            root = spread.sqrt()
        cumulated = torch.softmax(part.log_prob, -1).cumsum(-1)
        for i in range(n_draws):
            u = uniform[i, part.rows][..., None] * cumulated[..., -1:]
            component = (cumulated <= u).sum(-1).clamp(max=k - 1)  # [P, R]
            value = part.filled.gather(2, component[..., None, None].expand(P, R, 1, d))[:, :, 0]
            z = normal[i, part.rows]
            for c in range(root.shape[1]):
                of_c = z @ root[:, c].mT if root.dim() == 4 else z * root[:, c, None]
                chosen = component[..., None] == c
                value = value + (of_c if mixture.kind == "tied" else torch.where(chosen, of_c, 0.0))
            rows = part.rows[part.valid]
            out[i, rows] = torch.where(x[rows].isnan(), value[part.valid].to(x.dtype), x[rows])
    return out
