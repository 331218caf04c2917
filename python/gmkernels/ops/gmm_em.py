"""Expectation maximisation for Gaussian mixtures: sums over the rows, and the parameters that they give."""

import dataclasses
import math

import torch

from .. import reference
from .._call import DTYPE_CODE, Kernel, Op, check_floating, check_same_dtype, check_tensor
from .gmm import GmmArguments, _arguments, _batch, _flat, _prepared_bytes, _sums_bytes, check_covariance_type

GMM_EM_ROWS = reference.gmm_em.GROUP_ROWS
_TYPES = reference.gmm.COVARIANCE_TYPES
_MATRICES = 1056  # CUDA: that are factorised at a time, at most


@dataclasses.dataclass(frozen=True, eq=False)
class GmmStatistics:
    """The sums over rows that an M-step needs, float64: what `gmm_em_statistics` returns.

    Everything lies in one tensor, ``sums``, so that adding, scaling and an all-reduce are one operation; the other
    names are views of it. With r the responsibilities times the sample weights and t = x - shift:

    ================  =======================  =======================================================
    log_likelihood    [...]                    sum_i weight_i log p(x_i)
    weight            [...]                    sum_i weight_i
    nk                [..., k]                 sum_i r_ik
    s1                [..., k, d]              sum_i r_ik t_i
    s2, full          [..., k, d, d]           sum_i r_ik t_i t_i^T
    s2, tied          [..., d, d]              sum_ik r_ik t_i t_i^T
    s2, diag          [..., k, d]              sum_i r_ik t_i^2
    s2, spherical     [..., k]                 sum_i r_ik |t_i|^2
    shift             [..., d]                 what the sums are about
    ================  =======================  =======================================================

    ``a + b`` adds the sums of two sets of rows; their shifts must be equal. ``a * number`` scales every sum.
    """

    sums: torch.Tensor  # [..., 2 + numbers]: log_likelihood, weight, nk, s1, s2, one after the other
    shift: torch.Tensor
    covariance_type: str
    k: int

    @classmethod
    def of(cls, nk, s1, s2, log_likelihood, weight, shift, covariance_type):
        """From the parts, as float64 tensors of the shapes above."""
        lead, (k, d) = nk.shape[:-1], s1.shape[-2:]
        check_covariance_type(covariance_type)
        want = reference.gmm.covariance_shape(covariance_type, k, d)
        parts = {"nk": (nk, (k,)), "s1": (s1, (k, d)), "s2": (s2, want), "log_likelihood": (log_likelihood, ()),
                 "weight": (weight, ()), "shift": (shift, (d,))}
        for name, (t, shape) in parts.items():
            if t.dtype is not torch.float64:
                raise TypeError(f"{name} must be torch.float64, got {t.dtype}")
            if tuple(t.shape) != (*lead, *shape):
                raise ValueError(f"{name} must be {(*lead, *shape)} for covariance_type={covariance_type!r} with"
                                 f" k={k}, d={d}, got {tuple(t.shape)}")
        flat = [t.reshape(*lead, math.prod(t.shape[len(lead):])) for t in (log_likelihood, weight, nk, s1, s2)]
        return cls(torch.cat(flat, -1), shift, covariance_type, k)

    @property
    def log_likelihood(self):
        return self.sums[..., 0]

    @property
    def weight(self):
        return self.sums[..., 1]

    @property
    def nk(self):
        return self.sums[..., 2 : 2 + self.k]

    @property
    def s1(self):
        return self._parts()[3]

    @property
    def s2(self):
        return self._parts()[4]

    def _parts(self):
        return reference.gmm_em.split(self.sums, self.k, self.shift.shape[-1], self.covariance_type)

    def __add__(self, other):
        if not isinstance(other, GmmStatistics):
            return NotImplemented
        if (self.covariance_type, self.k) != (other.covariance_type, other.k):
            raise ValueError(f"statistics of {self.k} {self.covariance_type!r} components cannot be added to those of"
                             f" {other.k} {other.covariance_type!r} components")
        if not torch.equal(self.shift, other.shift):
            raise ValueError("statistics can be added only when their shifts are equal; give gmm_em_statistics the"
                             " same shift for every part of the data")
        return dataclasses.replace(self, sums=self.sums + other.sums)

    def __mul__(self, number):
        return dataclasses.replace(self, sums=self.sums * number)

    __rmul__ = __mul__


@dataclasses.dataclass(frozen=True, eq=False)
class GmmParameters:
    """A mixture, as `gmm_m_step` returns it: scikit-learn's shapes."""

    weights: torch.Tensor  # [..., k]
    log_weights: torch.Tensor  # [..., k]
    means: torch.Tensor  # [..., k, d]
    covariances: torch.Tensor  # full [..., k, d, d], tied [..., d, d], diag [..., k, d], spherical [..., k]
    precisions_cholesky: torch.Tensor  # the same shape
    status: torch.Tensor  # uint8 [..., k]: 0 healthy, 1 dead, 2 singular, 3 not finite
    covariance_type: str

    @property
    def arguments(self):
        """As `gmm_log_prob` and the others take them: ``gmm_log_prob(x, *parameters.arguments, covariance_type)``."""
        return GmmArguments(self.log_weights, self.means, self.precisions_cholesky)


# statistics ----------------------------------------------------------------------------------------------------------


def _statistics_batch(x, log_weights, means, precisions_cholesky, sample_weight, shift, covariance_type):
    batch = _batch(x, log_weights, means, precisions_cholesky, covariance_type)
    check_same_dtype("x", x, log_weights=log_weights, means=means, precisions_cholesky=precisions_cholesky)
    n, d = x.shape[-2:]
    for name, t, last in (("sample_weight", sample_weight, n), ("shift", shift, d)):
        if t is None:
            continue
        if t.dim() < 1 or t.shape[-1] != last:
            letter = "n" if name == "sample_weight" else "d"
            raise ValueError(f"{name} must be [..., {letter}] with {letter}={last} as in x, got {tuple(t.shape)}")
        try:
            batch = tuple(torch.broadcast_shapes(batch, t.shape[:-1]))
        except RuntimeError:
            raise ValueError(f"the leading dimensions of {name} must broadcast with {batch} of the others, got"
                             f" {tuple(t.shape[:-1])}") from None
    check_same_dtype("x", x, sample_weight=sample_weight)
    if shift is not None and shift.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"shift must be torch.float32 or torch.float64, got {shift.dtype}")
    return batch


def _statistics_outputs(x, log_weights, means, precisions_cholesky, sample_weight, shift, initial, covariance_type,
                        allow_tf32, out=None):
    batch = _statistics_batch(x, log_weights, means, precisions_cholesky, sample_weight, shift, covariance_type)
    k, d = means.shape[-2:]
    numbers = 2 + sum(reference.gmm_em.sizes(k, d, covariance_type))
    if initial is not None:
        if initial.dtype is not torch.float64:
            raise TypeError(f"initial must be torch.float64, got {initial.dtype}")
        if tuple(initial.shape) != (*batch, numbers):
            raise ValueError(f"initial must hold {(*batch, numbers)} sums, got {tuple(initial.shape)}")
    return (x.new_empty((*batch, numbers), dtype=torch.float64), x.new_empty((*batch, d), dtype=torch.float64))


_statistics = Kernel("gmm_em_statistics", scratch=4)


def _statistics_launch(outs, x, log_weights, means, precisions_cholesky, sample_weight, shift, initial,
                       covariance_type, allow_tf32):
    batch = outs[1].shape[:-1]
    ins, scalars = _arguments(x, log_weights, means, precisions_cholesky, covariance_type, batch)
    sample_weight, weight_step = (None, 0) if sample_weight is None else _flat(sample_weight, batch, 1)
    shift, shift_step = (None, 0) if shift is None else _flat(shift.double(), batch, 1)
    initial = None if initial is None else initial.contiguous()
    scratch, slabs, prepared = (None,) * 4, 0, 0
    if on_cuda(x):
        scratch, slabs, prepared = _workspace(x, *scalars[1:5], covariance_type)
    _statistics((*outs, *scratch), (*ins, sample_weight, shift, initial), slabs, prepared, *scalars, weight_step,
                shift_step, allow_tf32)


def on_cuda(t):
    """Does a CUDA kernel take it, or the emulator's?"""
    return t.is_cuda or Kernel.backend is not None


def _workspace(x, b, n, k, d, covariance_type):
    """Of the CUDA kernels (csrc/gmm/gmm_em.h): four tensors, the number of slabs, the bytes of the last."""
    sums, prepared = _sums_bytes(b, n, k, d, covariance_type), _prepared_bytes(x, b, n, k, d, covariance_type)
    one = _sums_bytes(b, 1, k, d, covariance_type)  # slab
    tensors = (x.new_empty(sums // 8, dtype=torch.float64),
               x.new_empty(2 * b * -(-n // GMM_EM_ROWS), dtype=torch.float64),
               x.new_empty(2 * b * n),
               x.new_empty(prepared, dtype=torch.uint8))
    return tensors, sums // max(one, 1), prepared


_statistics_op = Op(
    "gmm_em_statistics(Tensor x, Tensor log_weights, Tensor means, Tensor precisions_cholesky, Tensor? sample_weight,"
    " Tensor? shift, Tensor? initial, str covariance_type, bool allow_tf32) -> (Tensor, Tensor)",
    outputs=_statistics_outputs,
    launch=_statistics_launch,
    reference=reference.gmm_em.gmm_em_statistics,
    kernel=_statistics,
)


def gmm_em_statistics(x, log_weights, means, precisions_cholesky, covariance_type="full", sample_weight=None,
                      shift=None, *, initial=None, allow_tf32=False):
    r"""The E-step of a Gaussian mixture and the sums over rows that the M-step needs, in one pass over ``x``.

    ``r[i, c] = weight_i exp(lp[i, c] - logsumexp_c lp[i, c])`` with ``lp`` as in `gmm_log_prob`; then ``nk = sum_i r``,
    ``s1 = sum_i r (x_i - shift)`` and ``s2 = sum_i r (x_i - shift)(x_i - shift)^T``: see `GmmStatistics`.

    Args:
        x: rows ``[..., n, d]``.
        log_weights, means, precisions_cholesky, covariance_type: the mixture, as for `gmm_log_prob`.
        sample_weight: ``[..., n]``. A row of weight 0 counts nowhere, whatever it holds.
        shift: ``[..., d]``, what the sums are about; rounded to the dtype of ``x``. Default: the mean of the mixture
            (means weighted by ``exp(log_weights)``), so that shards of one data set agree. Take a point in the midst of
            the data.
        initial: `GmmStatistics` to go on from: the rows are added to it group by group, as if they followed its own.
        allow_tf32: on CUDA, "full" and "tied" in float32 use tensor cores: by default three products of tf32 numbers
            (11 bits) for each, which keep float32's digits; with True one, three times fewer, and responsibilities
            that are right to about 2^-10 of a squared distance. Elsewhere it changes nothing.

    Leading dimensions are batches of mixtures and broadcast. x, mixture and sample_weight have one dtype, float32 or
    float64.

    Returns: `GmmStatistics`, float64. Rows are summed in groups of ``GMM_EM_ROWS``, and the groups in order, on any
    number of threads. So the bits do not depend on threads, and a stream of blocks, each a multiple of that many rows
    but for the last, gives the bits of the whole through ``initial``; blocks of exactly that many also through ``+``.
    (On CUDA slabs of rows, which depend on the sizes alone, take the place of groups: the same bits for the same calls
    on every GPU, a stream and the whole within rounding.)

    A row with an infinity (and no NaN), or so far away that every component has density 0, adds ``-inf`` to
    ``log_likelihood``, its weight to ``weight`` and nothing else. A row with a NaN makes ``log_likelihood`` and the
    sums NaN. No gradient.

    Errors: ``ValueError`` for shapes, unknown covariance types, an ``initial`` with another shift; ``TypeError`` for
    dtypes.

    Source: Dempster, Laird, Rubin, "Maximum likelihood from incomplete data via the EM algorithm", 1977.

    >>> x, means = torch.randn(1000, 2), torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    >>> log_weights, scales = torch.tensor([0.5, 0.5]).log(), torch.ones(2, 2)
    >>> for _ in range(10):
    ...     stat = gmm_em_statistics(x, log_weights, means, scales, "diag")
    ...     new = gmm_m_step(stat, dtype=x.dtype)
    ...     log_weights, means, scales = new.log_weights, new.means, new.precisions_cholesky
    """
    check_tensor("x", x)
    check_tensor("log_weights", log_weights)
    check_tensor("means", means)
    check_tensor("precisions_cholesky", precisions_cholesky)
    check_floating("x", x)
    if not isinstance(allow_tf32, bool):
        raise TypeError(f"allow_tf32 must be a bool, got {type(allow_tf32).__name__}")
    if sample_weight is not None:
        check_tensor("sample_weight", sample_weight)
    if initial is not None:
        if not isinstance(initial, GmmStatistics):
            raise TypeError(f"initial must be GmmStatistics, got {type(initial).__name__}")
        if initial.covariance_type != covariance_type or initial.k != means.shape[-2]:
            raise ValueError(f"initial must be of {means.shape[-2]} {covariance_type!r} components, got {initial.k}"
                             f" {initial.covariance_type!r}")
        if shift is None:
            shift = initial.shift
        elif not torch.equal(shift.to(x.dtype).double().expand_as(initial.shift), initial.shift):
            raise ValueError("initial has another shift")
    if shift is not None:
        check_tensor("shift", shift)
    sums, shift = _statistics_op(x, log_weights, means, precisions_cholesky, sample_weight, shift,
                                 None if initial is None else initial.sums, covariance_type, allow_tf32)
    return GmmStatistics(sums, shift, covariance_type, means.shape[-2])


# M step --------------------------------------------------------------------------------------------------------------


def _m_step_outputs(sums, shift, covariance_type, k, reg_covar, dtype, out=None):
    lead, d = shift.shape[:-1], shift.shape[-1]
    matrix = reference.gmm.covariance_shape(covariance_type, k, d)
    shapes = (k,), (k,), (k, d), matrix, matrix
    return (*(sums.new_empty((*lead, *shape), dtype=dtype) for shape in shapes),
            sums.new_empty((*lead, k), dtype=torch.uint8))


_m_step = Kernel("gmm_m_step", scratch=2)


def _m_step_launch(outs, sums, shift, covariance_type, k, reg_covar, dtype):
    b, d = shift.shape[:-1].numel(), shift.shape[-1]
    scratch, at_a_time = (None, None), 0
    if on_cuda(sums):
        matrices = {"full": b * k, "tied": b}.get(covariance_type, 0)
        at_a_time = min(matrices, _MATRICES)
        scratch = sums.new_empty(2 * b * k), sums.new_empty(2 * at_a_time * d * d)
    _m_step((*outs, *scratch), (sums.contiguous(), shift.contiguous()), at_a_time, b, k, d,
            _TYPES.index(covariance_type), reg_covar, DTYPE_CODE[dtype])


_m_step_op = Op(
    "gmm_m_step(Tensor sums, Tensor shift, str covariance_type, int k, float reg_covar, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    outputs=_m_step_outputs,
    launch=_m_step_launch,
    reference=reference.gmm_em.gmm_m_step,
    kernel=_m_step,
    dtypes=(torch.float64,),
)


def gmm_m_step(stat, covariance_type=None, reg_covar=1e-6, *, dtype=torch.float64):
    r"""The mixture that maximises the expected likelihood, from the sums of `gmm_em_statistics`.

    With ``delta = s1 / nk``: ``weights = nk / sum nk``, ``means = shift + delta``, and as scikit-learn has them, the
    ``covariances``: full ``s2 / nk - delta delta^T``, tied ``(s2 - sum_k nk delta delta^T) / sum nk``, diag
    ``s2 / nk - delta^2``, spherical the mean of diag's over the features; ``reg_covar`` is added to every variance.

    Args:
        stat: `GmmStatistics`.
        covariance_type: that of ``stat`` (the default).
        reg_covar: not negative.
        dtype: of the result, float64 or float32; the arithmetic is float64.

    Returns: `GmmParameters`. Components that cannot be used as they are get these parameters and a ``status``:

    - 1, dead (``nk`` at most 2^-40 of the total): a copy of the component that is heaviest by then, with half of its
      weight, its mean 0.5 to 1.5 standard deviations aside along the first feature of largest variance. When nothing
      was seen at all: equal weights, means at ``shift``, unit covariances.
    - 2, singular (a pivot of the Cholesky factor, or a variance, at most 2^-46 of its second moment; where scikit-learn
      raises "ill-defined empirical covariance"): 1e-6 of the mean variance (its own or that of the whole mixture,
      whichever is larger; 1e-6 when that is 0) is added to the diagonal, ten times more until it works; "diag" and
      "spherical": it takes the place of the variances that are too small. "tied": every component has this status.
    - 3, not finite: the statistics have a NaN or an infinity, or are so large that nothing that is added helps (39
      times); the precisions are NaN.

    Errors: ``ValueError`` for a negative or NaN ``reg_covar``, ``TypeError`` for other dtypes.

    Source: ``sklearn.mixture._gaussian_mixture._estimate_gaussian_parameters``.
    """
    if not isinstance(stat, GmmStatistics):
        raise TypeError(f"stat must be GmmStatistics, got {type(stat).__name__}")
    if covariance_type is None:
        covariance_type = stat.covariance_type
    check_covariance_type(covariance_type)
    if covariance_type != stat.covariance_type:
        raise ValueError(f"covariance_type must be {stat.covariance_type!r} as in stat, got {covariance_type!r}")
    if not 0 <= reg_covar < math.inf:
        raise ValueError(f"reg_covar must be finite and not negative, got {reg_covar}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    made = _m_step_op(stat.sums, stat.shift, covariance_type, stat.k, float(reg_covar), dtype)
    return GmmParameters(*made, covariance_type)


# responsibilities ----------------------------------------------------------------------------------------------------


def _responsibilities_outputs(x, log_weights, means, precisions_cholesky, covariance_type, out=None):
    batch = _batch(x, log_weights, means, precisions_cholesky, covariance_type)
    check_same_dtype("x", x, log_weights=log_weights, means=means, precisions_cholesky=precisions_cholesky)
    return x.new_empty((*batch, x.shape[-2], means.shape[-2]))


_responsibilities = Kernel("gmm_responsibilities", scratch=2)


def _responsibilities_launch(out, *args):
    ins, scalars = _arguments(*args, out.shape[:-2])
    scratch, prepared = (None, None), 0
    if on_cuda(out):
        prepared = _prepared_bytes(ins[0], *scalars[1:5], args[4])
        scratch = out.new_empty(out.shape[:-1].numel()), out.new_empty(prepared, dtype=torch.uint8)
    _responsibilities((out, *scratch), ins, prepared, *scalars)


def _responsibilities_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.covariance_type = inputs[4]


def _responsibilities_backward(ctx, grad):
    def formula(*tensors):
        return reference.gmm_em.gmm_responsibilities(*tensors, ctx.covariance_type)

    _, pull = torch.func.vjp(formula, *ctx.saved_tensors)
    return *pull(grad), None


_responsibilities_op = Op(
    "gmm_responsibilities(Tensor x, Tensor log_weights, Tensor means, Tensor precisions_cholesky,"
    " str covariance_type) -> Tensor",
    outputs=_responsibilities_outputs,
    launch=_responsibilities_launch,
    reference=reference.gmm_em.gmm_responsibilities,
    kernel=_responsibilities,
    setup=_responsibilities_setup,
    backward=_responsibilities_backward,
    autocast=torch.float32,
)


def gmm_responsibilities(x, log_weights, means, precisions_cholesky, covariance_type="full"):
    r"""The posterior probability of every component for every row, ``[..., n, k]``: for those who want that much.

    ``r[i, c] = exp(lp[i, c] - logsumexp_c lp[i, c])`` with ``lp`` as in `gmm_log_prob`, whose arguments these are.

    Rows sum to 1. A row with an infinity (and no NaN), or so far away that every component has density 0, gives zeros;
    a row with a NaN gives NaN. A component that is left out (``log_weights`` ``-inf``, a zero on the diagonal of ``P``)
    gives 0. Float32 and float64, with gradients (through the formula in plain torch, ``n k d`` numbers in memory).

    Errors: ``ValueError`` for shapes and unknown covariance types, ``TypeError`` for dtypes.

    Source: ``sklearn.mixture.GaussianMixture.predict_proba``.
    """
    check_tensor("x", x)
    check_tensor("log_weights", log_weights)
    check_tensor("means", means)
    check_tensor("precisions_cholesky", precisions_cholesky)
    check_floating("x", x)
    return _responsibilities_op(x, log_weights, means, precisions_cholesky, covariance_type)
