"""k-means: greedy k-means++ and Lloyd's iteration, for one data set or many."""

import math
from typing import NamedTuple

import torch

from .. import reference
from .._call import DTYPE_CODE, Kernel, Op, check_floating, check_int, check_same_dtype, check_tensor
from .gmm import _flat
from .random import STREAM_KMEANS, philox_uniform


class KMeansResult(NamedTuple):
    """What `kmeans` returns."""

    centers: torch.Tensor  # [..., k, d], dtype of x
    labels: torch.Tensor  # [..., n], int64: the nearest centre of every row
    inertia: torch.Tensor  # [...], float64: sum of weight times squared distance to the nearest centre
    n_iter: torch.Tensor  # [...], int64


# checks --------------------------------------------------------------------------------------------------------------


def _batch(x, k, sample_weight, **others):
    """Checks everything but values; the leading dimensions of all. others: name -> (tensor, trailing dimensions)."""
    if x.dim() < 2:
        raise ValueError(f"x must be [..., n, d], got {tuple(x.shape)}")
    n = x.shape[-2]
    if not 1 <= k <= n:
        raise ValueError(f"k must be at least 1 and at most the number of rows, n={n}, got {k}")
    if sample_weight is not None:
        if sample_weight.dim() < 1 or sample_weight.shape[-1] != n:
            raise ValueError(f"sample_weight must be [..., n] with n={n} as in x, got {tuple(sample_weight.shape)}")
        check_same_dtype("x", x, sample_weight=sample_weight)
    leads = {"x": x.shape[:-2], **{name: t.shape[: t.dim() - m] for name, (t, m) in others.items()}}
    if sample_weight is not None:
        leads["sample_weight"] = sample_weight.shape[:-1]
    try:
        return torch.Size(torch.broadcast_shapes(*leads.values()))
    except RuntimeError:
        raise ValueError(f"the leading dimensions of {', '.join(leads)} must broadcast, got"
                         f" {', '.join(str(tuple(lead)) for lead in leads.values())}") from None


def _check_values(sample_weight, uniforms=None, **rows):
    """Finite numbers, and not so large that a squared distance overflows; weights that mean something."""
    if uniforms is not None and not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError("uniforms must be in [0, 1)")
    for name, t in rows.items():
        if not t.numel():
            continue
        dtype = torch.float64 if t.dtype is torch.float64 else torch.float32
        limit = math.sqrt(torch.finfo(dtype).max / t.shape[-1]) / 4
        low, high = (float(v) for v in t.aminmax())
        if not max(-low, high) < limit:
            worst = high if not -low > high else low
            raise ValueError(f"{name} must hold finite numbers below {limit:.1e} in size, so that no squared distance"
                             f" overflows {dtype}, got {worst}")
    if sample_weight is not None and sample_weight.numel():
        low, high = (float(v) for v in sample_weight.aminmax())
        if not (low >= 0 and high < math.inf):
            raise ValueError("sample_weight must be finite and not negative, got"
                             f" {high if low >= 0 or math.isnan(high) else low}")
        if not bool((sample_weight.amax(-1) > 0).all()):
            raise ValueError("sample_weight must have a number above 0 in every data set, got 0 only")


def _rows(x, sample_weight, other, trailing, batch):
    """Inputs of the kernels: tensors, scalars up to b, n."""
    x, x_step = _flat(x, batch, 2)
    other, step = _flat(other, batch, trailing)
    sample_weight, weight_step = (None, 0) if sample_weight is None else _flat(sample_weight, batch, 1)
    return (x, other, sample_weight), ((x_step, weight_step, step), batch.numel(), x.shape[-2])


# Workspace of the CUDA kernels (csrc/kmeans/kmeans.h): what depends on sizes only gives the same bits on every GPU.
_GROUP_ROWS = 2048
_SLAB_ROWS, _MOST_SLABS, _SLAB_BYTES = (256, 512), 1056, 256 << 20  # few or many sums
_FEW_SUMS = 2048  # they lie in shared memory


def _on_cuda(t):
    return t.is_cuda or Kernel.backend is not None


def _slabs(b, n, k, d):
    """Slabs of rows that are summed apart, and the sums of one."""
    numbers = max(k * (d + 1) + 2, 2 * d + 1)
    rows = _SLAB_ROWS[numbers > _FEW_SUMS]
    return max(1, min(-(-n // rows), -(-_MOST_SLABS // b), _SLAB_BYTES // (8 * b * numbers))), numbers


def _plus_plus_workspace(x, b, n, trials):
    groups = -(-n // _GROUP_ROWS)
    return (x.new_empty(b * n), x.new_empty(b * (1 + trials) * groups, dtype=torch.float64),
            x.new_empty(2 * b * trials, dtype=torch.int64))


def _workspace(x, b, n, k, d):
    slabs, numbers = _slabs(b, n, k, d)
    tensors = (x.new_empty(slabs * b * numbers, dtype=torch.float64), x.new_empty(b * -(-k // 8) * 8 * d),
               x.new_empty(3 * (b + 1), dtype=torch.int64))
    return tensors, slabs


# k-means++ -----------------------------------------------------------------------------------------------------------


def _plus_plus_outputs(x, uniforms, sample_weight, k, trials, out=None):
    batch = _batch(x, k, sample_weight, uniforms=(uniforms, 1))
    return x.new_empty((*batch, k, x.shape[-1])), x.new_empty((*batch, k), dtype=torch.int64)


_plus_plus = Kernel("kmeans_plus_plus", scratch=3)


def _plus_plus_launch(outs, x, uniforms, sample_weight, k, trials):
    _check_values(sample_weight, uniforms, x=x)
    ins, scalars = _rows(x, sample_weight, uniforms, 1, outs[1].shape[:-1])
    b, n = scalars[1:]
    scratch = _plus_plus_workspace(x, b, n, trials) if b and _on_cuda(x) else (None,) * 3
    _plus_plus((*outs, *scratch), ins, *scalars, k, x.shape[-1], DTYPE_CODE[x.dtype], trials)


def _plus_plus_reference(x, uniforms, sample_weight, k, trials):
    _check_values(sample_weight, uniforms, x=x)
    return reference.kmeans.kmeans_plus_plus(x, uniforms, sample_weight, k, trials)


_plus_plus_op = Op(
    "kmeans_plus_plus(Tensor x, Tensor uniforms, Tensor? sample_weight, int k, int trials) -> (Tensor, Tensor)",
    outputs=_plus_plus_outputs,
    launch=_plus_plus_launch,
    reference=_plus_plus_reference,
    kernel=_plus_plus,
)


def local_trials(k):
    """scikit-learn's number of candidates."""
    return 2 + int(math.log(k))


def kmeans_plus_plus(x, k, *, sample_weight=None, n_local_trials=None, seed=None, uniforms=None):
    r"""k rows that lie far from each other: the start of k-means, by greedy k-means++.

    The first row is drawn by weight. Every other: ``n_local_trials`` candidates are drawn with probability proportional
    to ``weight_i min_j |x_i - c_j|^2`` over the centres j so far, and the one is taken that leaves the least sum of
    these. Where all rows equal centres, the first row of weight above 0 is taken again.

    Args:
        x: rows ``[..., n, d]``; leading dimensions are data sets.
        k: number of rows to choose, at most n.
        sample_weight: ``[..., n]``, not negative, not all 0. A row of weight 2 is two rows, one of weight 0 none.
        n_local_trials: default ``2 + int(log k)``, as in scikit-learn.
        seed: ``None`` draws one from torch's default generator; an int counts over all data sets; an int64 tensor
            ``[b]`` gives each of b data sets numbers of its own. Philox stream 5 (docs/random-numbers.md).
        uniforms: ``[..., 1 + (k - 1) n_local_trials]``, float64 in [0, 1), instead of a seed: the numbers to draw with,
            in order. ``np.random.RandomState(s).random_sample(...)`` gives scikit-learn's choice for
            ``random_state=s``, but for the rounding of its distances.

    x and sample_weight have one dtype, float32 or float64.

    Returns: ``(centers [..., k, d], indices [..., k] int64)``, without gradients: the same bits on any number of
    threads, and on every GPU. CPU and CUDA add in other orders: they choose the same rows unless a draw falls on the
    edge between two, within rounding.

    Errors: ``ValueError`` for shapes, k below 1 or above n, values that are not finite or whose squares overflow, and
    weights as above; ``TypeError`` for dtypes.

    Source: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007;
    ``sklearn.cluster.kmeans_plusplus``.

    >>> centers, indices = kmeans_plus_plus(torch.randn(1000, 2), 8, seed=0)
    """
    check_tensor("x", x)
    check_floating("x", x)
    if sample_weight is not None:
        check_tensor("sample_weight", sample_weight)
    k = check_int("k", k, -(2**31), 2**31)
    batch = _batch(x, k, sample_weight)
    trials = local_trials(k) if n_local_trials is None else check_int("n_local_trials", n_local_trials, 1, 2**31)
    count = 1 + (k - 1) * trials
    if uniforms is None:
        words = philox_uniform((batch.numel(), 2 * count), seed, stream=STREAM_KMEANS, device=x.device,
                               dtype=torch.float64)
        uniforms = (words[:, ::2] + words[:, 1::2] * 2.0**-24).view(*batch, count)
    else:
        check_tensor("uniforms", uniforms)
        if seed is not None:
            raise ValueError("seed and uniforms cannot both be given")
        if uniforms.dtype is not torch.float64:
            raise TypeError(f"uniforms must be torch.float64, got {uniforms.dtype}")
        if uniforms.dim() < 1 or uniforms.shape[-1] != count:
            raise ValueError(f"uniforms must be [..., {count}] for k={k} and {trials} trials, got"
                             f" {tuple(uniforms.shape)}")
    return _plus_plus_op(x, uniforms, sample_weight, k, trials)


# Lloyd ---------------------------------------------------------------------------------------------------------------


def _outputs(x, init, sample_weight, max_iter, tol, out=None):
    if init.dim() < 2 or init.shape[-1] != x.shape[-1]:
        raise ValueError(f"init must be [..., k, d] with d={x.shape[-1]} as in x, got {tuple(init.shape)}")
    check_same_dtype("x", x, init=init)
    k, d = init.shape[-2:]
    batch = _batch(x, k, sample_weight, init=(init, 2))
    return (x.new_empty((*batch, k, d)), x.new_empty((*batch, x.shape[-2]), dtype=torch.int32),
            x.new_empty(batch, dtype=torch.float64), x.new_empty(batch, dtype=torch.int64))


_kmeans = Kernel("kmeans", scratch=3)


def _launch(outs, x, init, sample_weight, max_iter, tol):
    _check_values(sample_weight, x=x, init=init)
    ins, scalars = _rows(x, sample_weight, init, 2, outs[2].shape)
    scratch, slabs = (None,) * 3, 0
    if outs[2].numel() and _on_cuda(x):
        scratch, slabs = _workspace(x, *scalars[1:], *init.shape[-2:])
    _kmeans((*outs, *scratch), ins, slabs, *scalars, *init.shape[-2:], DTYPE_CODE[x.dtype], max_iter, tol)


def _reference(x, init, sample_weight, max_iter, tol):
    _check_values(sample_weight, x=x, init=init)
    centers, labels, inertia, n_iter = reference.kmeans.kmeans(x, init, sample_weight, max_iter, tol)
    return centers, labels.int(), inertia, n_iter


MAX_ITER, TOL = 300, 1e-4  # scikit-learn's

# centers, labels int32, inertia, n_iter
lloyd = Op(
    "kmeans(Tensor x, Tensor init, Tensor? sample_weight, int max_iter, float tol)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    outputs=_outputs,
    launch=_launch,
    reference=_reference,
    kernel=_kmeans,
)


def kmeans(x, k=None, *, init="k-means++", max_iter=MAX_ITER, tol=TOL, sample_weight=None, seed=None):
    r"""k-means by Lloyd's iteration: centres with a small ``inertia = sum_i weight_i min_j |x_i - c_j|^2``.

    Every iteration takes each row to its nearest centre (the first of equals) and each centre to the weighted mean of
    its rows. Centres without rows of weight above 0 take the rows that are farthest from their own centres; where no
    row is away from its centre, the place of the heaviest centre. It ends when no label changes, when the squared shift
    of all centres is at most ``tol`` times the mean variance of the features, or after ``max_iter`` iterations; labels
    and inertia are those of the returned centres.

    Args:
        x: rows ``[..., n, d]``; leading dimensions are data sets.
        k: number of centres, at most n.
        init: ``"k-means++"`` (see `kmeans_plus_plus`), or centres ``[..., k, d]``.
        max_iter: 0 gives labels and inertia of ``init``.
        tol: not negative. 0: until nothing moves.
        sample_weight: ``[..., n]``, not negative, not all 0. A row of weight 2 is two rows; one of weight 0 counts
            nowhere, it only has a label.
        seed: of ``init="k-means++"``.

    x, init and sample_weight have one dtype, float32 or float64.

    Returns: `KMeansResult` ``(centers, labels, inertia, n_iter)``, without gradients. Distances are sums of squared
    differences in the dtype of x, feature after feature. Sums over rows are float64, in groups of 2048 rows added in
    order: the same bits on any number of threads. On CUDA slabs of rows, whose number depends on sizes only, take the
    place of the groups: the same bits on every GPU, those of the CPU within rounding.

    Errors: ``ValueError`` for shapes, k below 1 or above n, values that are not finite or whose squares overflow,
    weights, ``max_iter`` and ``tol`` as above; ``TypeError`` for dtypes.

    Source: Lloyd, "Least squares quantization in PCM", 1982. From one start the path of
    ``sklearn.cluster.KMeans(algorithm="lloyd")``, which takes its tolerance from unweighted variances.

    >>> centers, labels, inertia, n_iter = kmeans(torch.randn(1000, 2), 8, seed=0)
    """
    check_tensor("x", x)
    check_floating("x", x)
    if sample_weight is not None:
        check_tensor("sample_weight", sample_weight)
    max_iter = check_int("max_iter", max_iter, 0, 2**31)
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol must be finite and not negative, got {tol}")
    if isinstance(init, str):
        if init != "k-means++":
            raise ValueError(f"init must be 'k-means++' or a tensor [..., k, d], got {init!r}")
        if k is None:
            raise TypeError("k must be given where init is not a tensor")
        init = kmeans_plus_plus(x, k, sample_weight=sample_weight, seed=seed)[0]
    else:
        check_tensor("init", init)
        if k is not None and init.dim() >= 2 and check_int("k", k, -(2**31), 2**31) != init.shape[-2]:
            raise ValueError(f"init must be [..., k, d] with k={k}, got {tuple(init.shape)}")
        if seed is not None:
            raise ValueError("seed is for init='k-means++', but init is a tensor")
    centers, labels, inertia, n_iter = lloyd(x, init, sample_weight, max_iter, float(tol))
    return KMeansResult(centers, labels.long(), inertia, n_iter)
