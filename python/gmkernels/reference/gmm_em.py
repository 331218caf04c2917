"""One iteration of expectation maximisation for Gaussian mixtures in plain torch, a block of rows at a time."""

import math

import torch

from .gmm import TRAILING, _without_infinities, covariance_shape, gmm_component_log_prob

GROUP_ROWS = 2048  # rows whose sums are added to the total at once (csrc/gmm/gmm_em.h)

HEALTHY, DEAD, SINGULAR, NOT_FINITE = range(4)  # status of a component after gmm_m_step
_DEAD = 2.0**-40  # of the total weight
_TINY = 2.0**-46  # of the second moment: a pivot of the Cholesky factor below it is rounding
_GOLDEN = 0.6180339887498949  # no two copies are displaced by the same amount
_RIDGE = 1e-6  # of the mean variance: the first that is tried
_ATTEMPTS = 40


def sizes(k, d, covariance_type):
    """Numbers of nk, s1, s2."""
    return k, k * d, math.prod(covariance_shape(covariance_type, k, d))


def split(sums, k, d, covariance_type):
    """log_likelihood [...], weight [...], nk [..., k], s1 [..., k, d], s2: views of sums [..., 2 + numbers]."""
    lead, parts = sums.shape[:-1], sums[..., 2:].split(sizes(k, d, covariance_type), -1)
    shape = covariance_shape(covariance_type, k, d)
    return (sums[..., 0], sums[..., 1], parts[0], parts[1].unflatten(-1, (k, d)) if k * d else parts[1].reshape(
        *lead, k, d), parts[2].reshape(*lead, *shape))


def gmm_responsibilities(x, log_weights, means, precisions_cholesky, covariance_type="full"):
    """Posterior probabilities of the components [..., n, k]. See :func:`gmkernels.ops.gmm_responsibilities`."""
    x, infinite = _without_infinities(x)
    lp = gmm_component_log_prob(x, log_weights, means, precisions_cholesky, covariance_type)
    if lp.shape[-1] == 0:
        return lp
    empty = (lp == -math.inf).all(-1, keepdim=True) | infinite[..., None]
    return torch.where(empty, 0.0, torch.softmax(torch.where(empty, 0.0, lp), -1))


def default_shift(log_weights, means):
    """The mean of the mixture [..., d], float64."""
    w = log_weights.double()
    top = w.detach().amax(-1, keepdim=True).clamp(min=-1e300) if w.shape[-1] else w.new_zeros(*w.shape[:-1], 1)
    w = (w - top).exp()
    w = w / w.sum(-1, keepdim=True).clamp(min=1e-300)
    return (w[..., None] * torch.where(w[..., None] == 0, 0.0, means.double())).sum(-2)


def gmm_em_statistics(x, log_weights, means, precisions_cholesky, sample_weight, shift, initial, covariance_type,
                      allow_tf32=False):
    """(sums [..., 2 + numbers], shift [..., d]), float64. See :func:`gmkernels.ops.gmm_em_statistics`."""
    lead = TRAILING[covariance_type]
    leads = [x.shape[:-2], log_weights.shape[:-1], means.shape[:-2],
             precisions_cholesky.shape[: precisions_cholesky.dim() - lead]]
    leads += [] if sample_weight is None else [sample_weight.shape[:-1]]
    leads += [] if shift is None else [shift.shape[:-1]]
    batch = torch.broadcast_shapes(*leads)
    k, d = means.shape[-2:]
    if shift is None:
        shift = default_shift(log_weights, means)
    shift = shift.to(x.dtype).double().expand(*batch, d).contiguous()
    total = x.new_zeros((*batch, 2 + sum(sizes(k, d, covariance_type))), dtype=torch.float64)
    total = total if initial is None else initial.clone()
    x = x.expand(*batch, *x.shape[-2:])
    weights = x.new_ones(x.shape[:-1]) if sample_weight is None else sample_weight.expand(x.shape[:-1])
    for rows, w in zip(x.split(GROUP_ROWS, -2), weights.split(GROUP_ROWS, -1), strict=True):
        if rows.shape[-2]:
            total = total + _group(rows, log_weights, means, precisions_cholesky, w, shift, covariance_type)
    return total, shift


def _group(x, log_weights, means, precisions_cholesky, w, shift, covariance_type):
    x = torch.where((w == 0)[..., None], 0.0, x)
    clean, infinite = _without_infinities(x)
    lp = gmm_component_log_prob(clean, log_weights, means, precisions_cholesky, covariance_type)
    if lp.shape[-1]:
        row = torch.where(infinite, -math.inf, torch.logsumexp(lp, -1))
    else:
        row = lp.sum(-1) - math.inf
    row = torch.where(w == 0, 0.0, row.double() * w.double())
    r = gmm_responsibilities(x, log_weights, means, precisions_cholesky, covariance_type).double()
    r = r * w[..., None].double()
    t = clean.double() - shift[..., None, :]
    return sums_of(r, t, row.sum(-1), w.double().sum(-1), covariance_type)


def sums_of(r, t, log_likelihood, weight, covariance_type):
    """All sums [..., 2 + numbers], from r [..., n, k], responsibilities times weights, and t = x - shift."""
    nk = r.sum(-2)
    s1 = r.mT @ t
    if covariance_type == "full":
        s2 = torch.einsum("...nk,...na,...nb->...kab", r, t, t)
    elif covariance_type == "tied":
        s2 = (t * r.sum(-1)[..., None]).mT @ t
    elif covariance_type == "diag":
        s2 = r.mT @ (t * t)
    else:
        s2 = (r.mT @ (t * t).sum(-1)[..., None])[..., 0]
    lead = nk.shape[:-1]
    return torch.cat([log_likelihood[..., None], weight[..., None], nk, s1.reshape(*lead, -1),
                      s2.reshape(*lead, -1)], -1)


# M step --------------------------------------------------------------------------------------------------------------


def gmm_m_step(sums, shift, covariance_type, k, reg_covar, dtype):
    """weights, log_weights, means, covariances, precisions_cholesky, status. See :func:`gmkernels.ops.gmm_m_step`."""
    batch, d = shift.shape[:-1], shift.shape[-1]
    b = batch.numel()
    made = [_one_m_step(s, c, covariance_type, k, reg_covar)
            for s, c in zip(sums.reshape(b, sums.shape[-1]), shift.reshape(b, d), strict=True)]
    matrix = covariance_shape(covariance_type, k, d)
    shapes = (k,), (k,), (k, d), matrix, matrix, (k,)
    out = []
    for i, shape in enumerate(shapes):
        kind = torch.uint8 if i == 5 else dtype
        parts = [m[i].to(kind) for m in made]
        out.append(torch.stack(parts).reshape(*batch, *shape) if parts else
                   torch.empty(*batch, *shape, dtype=kind, device=sums.device))
    return tuple(out)


def _one_m_step(sums, shift, covariance_type, k, reg_covar):
    d = len(shift)
    _, _, nk, s1, s2 = split(sums, k, d, covariance_type)
    total = nk.sum()
    status = torch.zeros(k, dtype=torch.uint8, device=sums.device)
    dead = nk <= _DEAD * total
    if k == 0 or bool(total <= 0):  # nothing was seen
        one = torch.ones_like(s2) if covariance_type in ("diag", "spherical") else torch.eye(d).to(s2).expand_as(s2)
        weights = torch.full_like(nk, 1 / max(k, 1))
        return weights, weights.log(), shift.expand(k, d).clone(), one.clone(), one.clone(), status + DEAD
    safe = torch.where(dead, 1.0, nk)
    delta = s1 / safe[:, None]
    if covariance_type == "full":
        moment = s2 / safe[:, None, None]
        covariance = moment - delta[:, :, None] * delta[:, None, :] + reg_covar * torch.eye(d).to(s2)
        noise = moment.diagonal(dim1=1, dim2=2)
        variance = covariance.diagonal(dim1=1, dim2=2)
    elif covariance_type == "tied":
        moment = s2 / total
        covariance = moment - (nk[:, None] * delta).T @ delta / total + reg_covar * torch.eye(d).to(s2)
        noise, variance = moment.diagonal()[None], covariance.diagonal()[None]
    elif covariance_type == "diag":
        noise = s2 / safe[:, None]
        variance = covariance = noise - delta**2 + reg_covar
    else:
        noise = s2[:, None] / safe[:, None] / max(d, 1)
        covariance = noise[:, 0] - (delta**2).sum(1) / max(d, 1) + reg_covar
        variance = covariance[:, None]
    least = _TINY * (noise + reg_covar)
    mean_variance = torch.where(variance <= least, 0.0, variance).sum(1) / max(variance.shape[1], 1)
    share = torch.where(dead, 0.0, nk) / total
    pooled = mean_variance[0] if covariance_type == "tied" else (
        torch.where(dead, 0.0, mean_variance) * share).sum()
    ridge = _RIDGE * torch.maximum(mean_variance, pooled)
    ridge = torch.where(ridge > 0, ridge, _RIDGE)

    precision = torch.empty_like(covariance)
    covariance = covariance.clone()
    for c in range(len(ridge)):
        if covariance_type != "tied" and dead[c]:
            continue
        if covariance_type in ("full", "tied"):
            at = covariance[c] if covariance_type == "full" else covariance
            to = precision[c] if covariance_type == "full" else precision
            state = _cholesky(at, to, least[c], ridge[c])
        else:
            state = _variances(covariance[c : c + 1].view(-1), precision[c : c + 1].view(-1), least[c], ridge[c])
        if covariance_type == "tied":
            status[:] = state
        else:
            status[c] = state
    means = shift + delta
    heads = nk.clone()
    status[nk.isnan()] = NOT_FINITE
    for m, c in enumerate(dead.nonzero()[:, 0].tolist()):  # a copy of the heaviest, about a standard deviation aside
        heads[c] = -1.0
        donor = int(heads.argmax())
        heads[donor] = heads[c] = heads[donor] / 2
        means[c] = means[donor]
        if d:
            own = covariance if covariance_type == "tied" else covariance[donor]
            own = own.diagonal() if covariance_type in ("full", "tied") else own.expand(d)
            f = next((i for i, e in enumerate((own == own.max()).tolist()) if e), 0)
            means[c, f] += (0.5 + (0.5 + m * _GOLDEN) % 1.0) * own[f].sqrt()
        if covariance_type != "tied":
            covariance[c], precision[c] = covariance[donor], precision[donor]
        status[c] = DEAD
    weights = heads / heads.sum()
    return weights, weights.log(), means, covariance, precision, status


def _cholesky(covariance, precision, least, ridge):
    """precision = L^-T of covariance = L L^T, in place; where that fails, of covariance + a ridge that grows."""
    d = len(least)
    if not bool(covariance.isfinite().all()):
        precision.fill_(math.nan)
        return NOT_FINITE
    state, added = HEALTHY, 0.0
    eye = torch.eye(d).to(covariance)
    for attempt in range(_ATTEMPTS):
        work, low = covariance + added * eye, torch.zeros_like(covariance)
        fine = True
        for j in range(d):
            pivot = work[j, j] - (low[j, :j] ** 2).sum()
            fine = fine and bool(pivot > least[j])
            if not fine:
                break
            low[j, j] = pivot.sqrt()
            low[j + 1 :, j] = (work[j + 1 :, j] - low[j + 1 :, :j] @ low[j, :j]) / low[j, j]
        if fine:
            break
        if attempt == _ATTEMPTS - 1:
            covariance += added * eye
            precision.fill_(math.nan)
            return NOT_FINITE
        state, added = SINGULAR, float(ridge) * 10.0**attempt
    covariance += added * eye
    precision.copy_(torch.linalg.solve_triangular(low, eye, upper=False).mT)
    return state


def _variances(covariance, precision, least, ridge):
    if not bool(covariance.isfinite().all()):
        precision.fill_(math.nan)
        return NOT_FINITE
    low = covariance <= least
    covariance[low] = torch.clamp(2 * least[low], min=float(ridge))
    precision.copy_(covariance.rsqrt())
    return SINGULAR if bool(low.any()) else HEALTHY
