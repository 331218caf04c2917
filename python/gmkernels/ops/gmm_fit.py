"""Whole fits of thousands of small Gaussian mixtures, one call."""

import dataclasses
import math

import torch

from .. import reference
from .._call import (
    DTYPE_CODE,
    Kernel,
    Op,
    check_floating,
    check_int,
    check_same_dtype,
    check_tensor,
    plain_eager,
    split_seed,
)
from .gmm import _SHAPES, _TRAILING, _TYPES, _flat, check_covariance_type
from .gmm_em import GmmParameters, on_cuda
from .kmeans import local_trials

LLOYD_ROUNDS = {"kmeans": 20, "k-means++": 0}  # of the starts that draw


@dataclasses.dataclass(frozen=True, eq=False)
class GmmFit(GmmParameters):
    """Fitted mixtures, as `gmm_fit` returns them: `GmmParameters`, and how the fits went."""

    recovered: torch.Tensor  # int64 [..., k]: M-steps that had to repair the component
    log_likelihood: torch.Tensor  # float64 [...]: of the mean row, at the last E-step (scikit-learn's lower_bound_)
    n_iter: torch.Tensor  # int64 [...]
    converged: torch.Tensor  # bool [...]


# arguments -----------------------------------------------------------------------------------------------------------


def _leads(x, sample_weight, responsibilities, start, covariance_type):
    """The batch shape that all arguments broadcast to."""
    trailing = ("x", x, 2), ("sample_weight", sample_weight, 1), ("responsibilities", responsibilities, 2), (
        "log_weights", start[0], 1), ("means", start[1], 2), ("precisions_cholesky", start[2],
                                                             _TRAILING[covariance_type])
    batch = ()
    for name, t, last in trailing:
        if t is None:
            continue
        lead = t.shape[: t.dim() - last]
        try:
            batch = tuple(torch.broadcast_shapes(batch, lead))
        except RuntimeError:
            raise ValueError(f"the leading dimensions of {name} must broadcast with {batch} of the others, got"
                             f" {tuple(lead)}") from None
    return batch


def _check_start(x, k, responsibilities, start, covariance_type):
    n, d = x.shape[-2:]
    matrix = reference.gmm.covariance_shape(covariance_type, k, d)
    shapes = (("responsibilities", responsibilities, (n, k), f"[..., n, k] with n={n}, k={k}"),
              ("log_weights of init", start[0], (k,), f"[..., k] with k={k}"),
              ("means of init" if start[0] is not None else "init", start[1], (k, d), f"[..., k, d] with k={k}, d={d}"),
              ("precisions_cholesky of init", start[2], matrix,
               f"{_SHAPES[covariance_type]} for covariance_type={covariance_type!r} with k={k}, d={d}"))
    for name, t, shape, words in shapes:
        if t is not None and tuple(t.shape[max(t.dim() - len(shape), 0):]) != shape:
            raise ValueError(f"{name} must be {words}, got {tuple(t.shape)}")
        check_same_dtype("x", x, **{name: t})


def _outputs(x, sample_weight, seeds, responsibilities, log_weights, means, precisions_cholesky, k, covariance_type,
             max_iter, rounds, candidates, n_init, seed, tol, reg_covar, out=None):
    start = log_weights, means, precisions_cholesky
    batch = _leads(x, sample_weight, responsibilities, start, covariance_type)
    matrix = reference.gmm.covariance_shape(covariance_type, k, x.shape[-1])
    shapes = (k,), (k,), (k, x.shape[-1]), matrix, matrix
    kinds = ((k,), torch.uint8), ((k,), torch.int64), ((), torch.float64), ((), torch.int64), ((), torch.bool)
    return (*(x.new_empty((*batch, *shape)) for shape in shapes),
            *(x.new_empty((*batch, *shape), dtype=kind) for shape, kind in kinds))


_fit = Kernel("gmm_fit", scratch=1)
_SHARED_NUMBERS = 5120  # CUDA: float64 numbers of a block's shared memory (csrc/gmm/gmm_fit.cu)
_BLOCKS, _WORKSPACE = 2112, 1 << 25  # at a time; numbers of them all


def _workspace(x, b, n, k, d, covariance_type):
    """Of the CUDA kernel (csrc/gmm/gmm_fit.h): a tensor, blocks at a time, numbers of a block."""
    matrices = math.prod(reference.gmm.covariance_shape(covariance_type, k, d))
    numbers = (n * (d + k + 2) + 2 + sum(reference.gmm_em.sizes(k, d, covariance_type)) + k * (d + 3)
               + 2 * d * (d + 1) + 2 * (k * (d + 4) + 2 * matrices))
    if numbers <= _SHARED_NUMBERS:
        return None, b, numbers
    blocks = max(1, min(b, _BLOCKS, _WORKSPACE // numbers))
    return x.new_empty(blocks * numbers, dtype=torch.float64), blocks, numbers


def _launch(outs, x, sample_weight, seeds, responsibilities, log_weights, means, precisions_cholesky, k,
            covariance_type, max_iter, rounds, candidates, n_init, seed, tol, reg_covar):
    batch = outs[7].shape
    tensors = ((x, 2), (sample_weight, 1), (responsibilities, 2), (log_weights, 1), (means, 2),
               (precisions_cholesky, _TRAILING[covariance_type]))
    flat = [(None, 0) if t is None else _flat(t, batch, last) for t, last in tensors]
    n, d = x.shape[-2:]
    ins = flat[0][0], flat[1][0], None if seeds is None else seeds.contiguous(), *(t for t, _ in flat[2:])
    workspace, blocks, numbers = None, 0, 0
    if on_cuda(x):
        workspace, blocks, numbers = _workspace(x, batch.numel(), n, k, d, covariance_type)
    _fit((*outs, workspace), ins, tuple(step for _, step in flat), batch.numel(), n, k, d, max_iter, rounds, candidates,
         n_init, seed & (2**64 - 1), 1 if seeds is None else seeds.numel(), tol, reg_covar, DTYPE_CODE[x.dtype],
         _TYPES.index(covariance_type), blocks, numbers)


_op = Op(
    "gmm_fit(Tensor x, Tensor? sample_weight, Tensor? seeds, Tensor? responsibilities, Tensor? log_weights,"
    " Tensor? means, Tensor? precisions_cholesky, int k, str covariance_type, int max_iter, int rounds,"
    " int candidates, int n_init, int seed, float tol, float reg_covar)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    outputs=_outputs,
    launch=_launch,
    reference=reference.gmm_fit.gmm_fit,
    kernel=_fit,
)


# values --------------------------------------------------------------------------------------------------------------


def _finite(t):
    return bool(t.sum().isfinite()) or bool(t.isfinite().all())


def _check_values(x, k, sample_weight, responsibilities, start):
    if sample_weight is not None:
        if not _finite(sample_weight) or bool((sample_weight < 0).any()):
            raise ValueError("sample_weight must be finite and not negative")
        count = (sample_weight > 0).sum(-1)
        if count.numel() and int(count.min()) < k:
            raise ValueError(f"every mixture needs at least k={k} rows of positive sample_weight, one has"
                             f" {int(count.min())}")
    if not _finite(x) and (sample_weight is None
                           or bool((~x.isfinite().all(-1) & (sample_weight > 0)).any())):
        raise ValueError("x must be finite, got NaN or infinity")
    if responsibilities is not None and (not _finite(responsibilities) or bool((responsibilities < 0).any())):
        raise ValueError("responsibilities must be finite and not negative")
    for name, t in zip(("log_weights", "means", "precisions_cholesky"), start, strict=True):
        if t is not None and bool(t.isnan().any() if name == "log_weights" else not _finite(t)):
            raise ValueError(f"{name} of init must be finite" if start[0] is not None else "init must be finite")
    if start[0] is not None and bool((start[0].logsumexp(-1).abs() == math.inf).any()):
        raise ValueError("log_weights of init must be below infinity, and not all -inf")


def gmm_fit(x, k, covariance_type="full", *, sample_weight=None, init="kmeans", responsibilities=None, max_iter=100,
            tol=1e-3, reg_covar=1e-6, n_init=1, seed=None):
    r"""Fits a Gaussian mixture to every data set of a batch: thousands of small ones in one call.

    EM from the start to convergence, scikit-learn's loop: E-step, M-step (`gmm_m_step`), until the log-likelihood of
    the mean row changes by less than ``tol``. On the CPU one mixture is one task of one thread, and everything happens
    in the kernel: for few and large data sets use `gmkernels.GaussianMixture`.

    Args:
        x: rows ``[..., n, d]``.
        k: components of each mixture.
        covariance_type: "full", "tied", "diag" or "spherical".
        sample_weight: ``[..., n]``, not negative; a row of weight 0 counts nowhere, whatever it holds.
        init: where EM starts. ``"kmeans"``: k-means++ (the best of ``2 + floor(log k)`` candidates, as scikit-learn
            picks) and at most 20 rounds of Lloyd, whose labels are the first responsibilities. ``"k-means++"``: without
            the rounds, every row belongs to the nearest pick. A tensor ``[..., k, d]``: to the nearest of these means.
            `GmmParameters` (so also a `GmmFit`): that mixture, and EM begins with its E-step; log_weights are
            normalised.
        responsibilities: ``[..., n, k]``, not negative: a start in place of ``init``. Every row is divided by its sum;
            a row of zeros counts nowhere in the start.
        max_iter, tol, reg_covar: scikit-learn's.
        n_init: starts that are drawn; the one with the highest ``log_likelihood`` is kept.
        seed: of the picks. ``None`` draws one from torch's default generator; an int counts over the whole batch; an
            int64 tensor ``[b]`` gives each of b mixtures numbers of its own, whatever the batch
            (docs/random-numbers.md).

    Leading dimensions are batches and broadcast (one data set with many weights, or many starts). Float32 and float64;
    the arithmetic is float64 about the mean of the rows, parameters have the dtype of ``x``.

    Returns: `GmmFit`. ``status`` as of `gmm_m_step`, after the last M-step; ``recovered`` counts the M-steps, that of
    the start included, that repaired a dead or singular component. A fit whose numbers overflow is NaN, of status 3.
    The same bits on any number of threads, and on every GPU, where one mixture is one block's (its rows in shared
    memory where they fit) and the host waits for none. No gradient.

    Errors: ``ValueError`` for shapes, fewer rows (of positive weight) than ``k``, ``k=0``, ``d=0``, NaN or infinity in
    ``x`` (torch.compile does not look at values), bad weights and options; ``TypeError`` for dtypes.

    Source: ``sklearn.mixture.GaussianMixture.fit``; Arthur and Vassilvitskii, "k-means++: the advantages of careful
    seeding", SODA 2007.

    >>> fit = gmm_fit(torch.randn(1000, 200, 4), 3, seed=0)
    >>> lp = gmm_log_prob(torch.randn(5, 4), fit.log_weights, fit.means, fit.precisions_cholesky)  # [1000, 5]
    """
    check_tensor("x", x)
    check_floating("x", x)
    check_covariance_type(covariance_type)
    if x.dim() < 2:
        raise ValueError(f"x must be [..., n, d], got {tuple(x.shape)}")
    n, d = x.shape[-2:]
    k = check_int("k", k, 1, 2**31)
    if d < 1:
        raise ValueError(f"x must have at least one feature, got {tuple(x.shape)}")
    if n < k:
        raise ValueError(f"x must have at least k={k} rows, got n={n}")
    max_iter = check_int("max_iter", max_iter, 0, 2**31)
    n_init = check_int("n_init", n_init, 1, 2**31)
    for name, value in (("tol", tol), ("reg_covar", reg_covar)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    start, rounds, drawn = _start(init, responsibilities, covariance_type, k)
    if sample_weight is not None:
        check_tensor("sample_weight", sample_weight)
        if sample_weight.dim() < 1 or sample_weight.shape[-1] != n:
            raise ValueError(f"sample_weight must be [..., n] with n={n} as in x, got {tuple(sample_weight.shape)}")
        check_same_dtype("x", x, sample_weight=sample_weight)
    _check_start(x, k, responsibilities, start, covariance_type)
    batch = _leads(x, sample_weight, responsibilities, start, covariance_type)
    if n_init > 1 and not drawn:
        raise ValueError(f"n_init must be 1 where the start is given, got {n_init}")
    if plain_eager() and not x.is_meta:
        _check_values(x, k, sample_weight, responsibilities, start)
    seeds, seed = split_seed(seed, x.device, batch[0] if len(batch) == 1 else None) if drawn else (None, 0)
    made = _op(x, sample_weight, seeds, responsibilities, *start, k, covariance_type, max_iter, rounds,
               local_trials(k), n_init, seed, float(tol), float(reg_covar))
    return GmmFit(*made[:6], covariance_type, *made[6:])


def _start(init, responsibilities, covariance_type, k):
    """(log_weights, means, precisions_cholesky), rounds of Lloyd, and are picks drawn?"""
    nothing = None, None, None
    if responsibilities is not None:
        check_tensor("responsibilities", responsibilities)
        if not isinstance(init, str) or init != "kmeans":
            raise ValueError("init and responsibilities are two starts: give one of them")
        return nothing, 0, False
    if isinstance(init, GmmParameters):
        if init.covariance_type != covariance_type:
            raise ValueError(f"init must be a mixture of covariance_type={covariance_type!r}, got"
                             f" {init.covariance_type!r}")
        return (init.log_weights, init.means, init.precisions_cholesky), 0, False
    if isinstance(init, torch.Tensor):
        return (None, init, None), 0, False
    if not isinstance(init, str):
        raise TypeError(f"init must be a str, a torch.Tensor or GmmParameters, got {type(init).__name__}")
    if init not in LLOYD_ROUNDS:
        raise ValueError(f"init must be one of {', '.join(map(repr, LLOYD_ROUNDS))}, got {init!r}")
    return nothing, LLOYD_ROUNDS[init], True
