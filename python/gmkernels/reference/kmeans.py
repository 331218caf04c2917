"""k-means in plain torch: one data set after the other, k distances of a block of rows in memory."""

import torch

BLOCK_ROWS = 2048


def _distances(x, centers):
    """Squared distances, block by block: rows [m], [m, k]."""
    for rows in x.split(BLOCK_ROWS):
        yield rows, (rows[:, None, :] - centers).square().sum(-1)


def _nearest(x, centers):
    """The nearest centre of every row, the first of equals, and the squared distance to it."""
    parts = [distance.min(1) for _, distance in _distances(x, centers)]
    return torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts])


def _each(function, batch, x, other, sample_weight):
    """function(rows, other, weights) of every data set, its results stacked: [*batch, ...]."""
    arithmetic = torch.float64 if x.dtype is torch.float64 else torch.float32
    x = x.expand(*batch, *x.shape[-2:]).to(arithmetic)
    weights = x.new_ones(x.shape[:-1]) if sample_weight is None else sample_weight.expand(x.shape[:-1])
    sets = zip(x.flatten(0, -3) if batch else x[None], other.flatten(0, len(batch) - 1) if batch else other[None],
               weights.flatten(0, -2) if batch else weights[None], strict=True)
    made = [function(rows, o, w.double()) for rows, o, w in sets]
    return [torch.stack(parts).unflatten(0, batch) if batch else parts[0] for parts in zip(*made, strict=True)]


def _leads(x, other, trailing, sample_weight):
    leads = [x.shape[:-2], other.shape[: other.dim() - trailing]]
    leads += [] if sample_weight is None else [sample_weight.shape[:-1]]
    return torch.broadcast_shapes(*leads)


# k-means++ -----------------------------------------------------------------------------------------------------------


def kmeans_plus_plus(x, uniforms, sample_weight, k, trials):
    """centers, indices. See :func:`gmkernels.ops.kmeans_plus_plus`."""
    batch = _leads(x, uniforms, 1, sample_weight)
    if not batch.numel():
        return x.new_empty(*batch, k, x.shape[-1]), x.new_empty(*batch, k, dtype=torch.int64)
    uniforms = uniforms.expand(*batch, uniforms.shape[-1])
    rows = _each(lambda *one: (_plus_plus(*one, k, trials),), batch, x, uniforms, sample_weight)[0]
    x = x.expand(*batch, *x.shape[-2:])
    return x.gather(-2, rows[..., None].expand(*rows.shape, x.shape[-1])), rows


def _plus_plus(x, uniforms, w, k, trials):
    chosen = _draw(w, uniforms[:1])
    closest = _to_rows(x, chosen)[0]
    for c in range(1, k):
        u = uniforms[1 + (c - 1) * trials : 1 + c * trials]
        candidates = _draw(closest.double() * w, u, w)
        left = torch.minimum(closest, _to_rows(x, candidates))
        best = (left.double() @ w).argmin()
        chosen, closest = torch.cat([chosen, candidates[best][None]]), left[best]
    return chosen


def _to_rows(x, rows):
    return torch.cat([distance for _, distance in _distances(x, x[rows])]).T


def _draw(mass, u, fall_back=None):
    """Rows with probability proportional to mass; where that is 0 everywhere, the first with a weight."""
    total = mass.cumsum(0)
    if not total[-1] > 0:
        return (fall_back > 0).double().argmax()[None].expand(len(u))
    last = (mass > 0).nonzero()[-1, 0]
    return torch.searchsorted(total, u * total[-1], right=True).clamp(max=last)


# Lloyd ---------------------------------------------------------------------------------------------------------------


def kmeans(x, init, sample_weight, max_iter, tol):
    """centers, labels, inertia, n_iter. See :func:`gmkernels.ops.kmeans`."""
    batch = _leads(x, init, 2, sample_weight)
    k, d = init.shape[-2:]
    if not batch.numel():
        return (x.new_empty(*batch, k, d), x.new_empty(*batch, x.shape[-2], dtype=torch.int64),
                x.new_empty(batch, dtype=torch.float64), x.new_empty(batch, dtype=torch.int64))
    init = init.expand(*batch, k, d)
    centers, labels, inertia, n_iter = _each(lambda *one: _lloyd(*one, max_iter, tol), batch, x, init, sample_weight)
    return centers.to(x.dtype), labels, inertia, n_iter


def _lloyd(x, init, w, max_iter, tol):
    centers, labels = init.to(x.dtype), torch.full((len(x),), -1, device=x.device)
    enough = tol * _mean_variance(x.double(), w) if tol else 0.0
    n_iter, fresh = 0, False
    while n_iter < max_iter:
        n_iter += 1
        before, (labels, distance) = labels, _nearest(x, centers)
        moved = _means(x, w, labels, centers).to(x.dtype)
        shift = (moved.double() - centers.double()).square().sum()
        centers, fresh = moved, bool(shift == 0)
        if torch.equal(labels, before) or bool(shift <= enough):
            break
    if not fresh:
        labels, distance = _nearest(x, centers)
    return centers, labels, (distance.double() * w).sum(), torch.tensor(n_iter, device=x.device)


def _mean_variance(x, w):
    if not x.shape[1]:
        return 0.0
    t = x - x[0]
    mean = w @ t / w.sum()
    return (w @ t.square() / w.sum() - mean.square()).mean()


def _means(x, w, labels, centers):
    k = len(centers)
    mass = w.new_zeros(k).index_add_(0, labels, w)
    sums = w.new_zeros(centers.shape).index_add_(0, labels, x.double() * w[:, None])
    empty = (mass == 0).nonzero()[:, 0]
    if len(empty):  # each takes the row that is farthest from its centre
        far = torch.where(w > 0, (x.double() - centers[labels].double()).square().sum(1), 0.0)
        rows = far.argsort(descending=True, stable=True)[: len(empty)]
        for c, row in zip(empty.tolist(), rows[far[rows] > 0].tolist(), strict=False):
            part, old = x[row].double() * w[row], labels[row]
            sums[old] -= part
            sums[c] = part
            mass[old] -= w[row]
            mass[c] = w[row]
    live = torch.where(mass > 0, torch.arange(k, device=mass.device), mass.argmax())
    return sums[live] / mass[live, None]
