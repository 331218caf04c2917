r"""The part of rows with missing entries in EM. Exact; float64; plain torch.

The E-step counts a row as its conditional mean, and adds ``r C`` to the second moments, C the conditional covariance
(_patterns.py): leaving that out shrinks every covariance.

Source: Ghahramani and Jordan, "Supervised learning from incomplete data via an EM approach", 1994.
"""

import torch

from .. import ops
from .._patterns import Mixture
from ..reference.gmm import covariance_shape


def statistics(patterns, weights, parameters, shift):
    """`GmmStatistics` of the rows: what `ops.gmm_em_statistics` is for complete ones."""
    mixture = Mixture.of(parameters)
    kind, (k, d) = mixture.kind, mixture.means.shape
    nk, s1 = shift.new_zeros(k), shift.new_zeros(k, d)
    s2 = shift.new_zeros(covariance_shape(kind, k, d))
    log_likelihood, total = shift.new_zeros(()), shift.new_zeros(())
    for part in patterns.parts(mixture):
        w = part.valid.double() if weights is None else part.valid * weights[part.rows].double()
        row = torch.logsumexp(part.log_prob, -1)
        r = (part.log_prob - row[..., None]).exp() * w[..., None]  # [P, R, k]
        log_likelihood += (row * w).sum()
        total += w.sum()
        nk += r.sum((0, 1))
        t = (part.filled - shift).flatten(0, 1).transpose(0, 1)  # [k, rows, d]
        weighted = t * r.flatten(0, 1).T[..., None]
        s1 += weighted.sum(1)
        per_pattern = r.sum(1)  # [P, k]
        if kind == "full":
            s2 += t.mT @ weighted + torch.einsum("pk,pkab->kab", per_pattern, part.spread)
        elif kind == "tied":
            s2 += t.flatten(0, 1).T @ weighted.flatten(0, 1)
            s2 += torch.einsum("pk,pab->ab", per_pattern, part.spread[:, 0])
        else:
            square = (t * weighted).sum(1) + torch.einsum("pk,pkd->kd", per_pattern, part.spread)
            s2 += square if kind == "diag" else square.sum(1)
    return ops.GmmStatistics.of(nk, s1, s2, log_likelihood, total, shift, kind)
