"""Gaussian mixtures: the log-density of every row, with gradients, and nothing of size n x k in memory."""

from typing import NamedTuple

import torch

from .. import reference
from .._call import DTYPE_CODE, Kernel, Op, allocate, check_floating, check_same_dtype, check_tensor

_TYPES = reference.gmm.COVARIANCE_TYPES
_TRAILING = reference.gmm.TRAILING
_SHAPES = {"full": "[..., k, d, d]", "tied": "[..., d, d]", "diag": "[..., k, d]", "spherical": "[..., k]"}

# CUDA: d for which full and tied use tensor cores: below, plain arithmetic is as fast; above, tiles do not fit.
_MATRIX_FEATURES = 8, 128
# CUDA: row slabs whose sums are added in order. Their number depends on sizes only, not on the GPU: so does the result.
_SLAB_ROWS, _MOST_SLABS, _SLAB_BYTES = 2048, 64, 24 << 20


class GmmArguments(NamedTuple):
    """A mixture as the ops take it: ``gmm_log_prob(x, *mixture, covariance_type)``."""

    log_weights: torch.Tensor  # [..., k]
    means: torch.Tensor  # [..., k, d]
    precisions_cholesky: torch.Tensor  # full [..., k, d, d], tied [..., d, d], diag [..., k, d], spherical [..., k]


def check_covariance_type(covariance_type):
    if covariance_type not in _TYPES:
        raise ValueError(f"covariance_type must be one of {', '.join(map(repr, _TYPES))}, got {covariance_type!r}")


def _batch(x, log_weights, means, precisions_cholesky, covariance_type):
    """Checks everything but values; the batch shape that all four broadcast to."""
    check_covariance_type(covariance_type)
    if x.dim() < 2:
        raise ValueError(f"x must be [..., n, d], got {tuple(x.shape)}")
    d = x.shape[-1]
    if means.dim() < 2 or means.shape[-1] != d:
        raise ValueError(f"means must be [..., k, d] with d={d} as in x, got {tuple(means.shape)}")
    k = means.shape[-2]
    if log_weights.dim() < 1 or log_weights.shape[-1] != k:
        raise ValueError(f"log_weights must be [..., k] with k={k} as in means, got {tuple(log_weights.shape)}")
    p, m = precisions_cholesky, _TRAILING[covariance_type]
    want = reference.gmm.covariance_shape(covariance_type, k, d)
    if p.dim() < m or tuple(p.shape[p.dim() - m :]) != want:
        raise ValueError(
            f"precisions_cholesky must be {_SHAPES[covariance_type]} for covariance_type={covariance_type!r} with"
            f" k={k}, d={d} as in means, got {tuple(p.shape)}"
        )
    if x.dim() == means.dim() == 2 and log_weights.dim() == 1 and p.dim() == m:
        return ()
    leads = x.shape[:-2], log_weights.shape[:-1], means.shape[:-2], p.shape[: p.dim() - m]
    try:
        return tuple(torch.broadcast_shapes(*leads))
    except RuntimeError:
        got = ", ".join(str(tuple(lead)) for lead in leads)
        raise ValueError(
            f"the leading dimensions of x, log_weights, means, precisions_cholesky must broadcast, got {got}"
        ) from None


def check_mixture(log_weights, means, precisions_cholesky, covariance_type):
    """Everything but values of a mixture without rows; its batch shape."""
    for name, t in (("log_weights", log_weights), ("means", means), ("precisions_cholesky", precisions_cholesky)):
        check_tensor(name, t)
    check_floating("means", means)
    check_same_dtype("means", means, log_weights=log_weights, precisions_cholesky=precisions_cholesky)
    if means.dim() < 2:
        raise ValueError(f"means must be [..., k, d], got {tuple(means.shape)}")
    return _batch(means[..., :0, :], log_weights, means, precisions_cholesky, covariance_type)


def _outputs(x, log_weights, means, precisions_cholesky, covariance_type, out=None):
    batch = _batch(x, log_weights, means, precisions_cholesky, covariance_type)
    check_same_dtype("x", x, log_weights=log_weights, means=means, precisions_cholesky=precisions_cholesky)
    if out is not None:
        for name, t in zip(("x", "log_weights", "means", "precisions_cholesky"),
                           (x, log_weights, means, precisions_cholesky), strict=True):
            if out.numel() and t.numel() and out.data_ptr() < _end(t) and t.data_ptr() < _end(out):
                raise ValueError(f"out must not share memory with {name}")
    return allocate(out, x, (*batch, x.shape[-2]))


def _end(t):
    """The address past the last element."""
    return t.data_ptr() + (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def _flat(t, batch, trailing):
    """A contiguous tensor of one mixture, or of all of them, and the step from one to the next (0: shared)."""
    lead = t.dim() - trailing
    if not lead:
        return t.contiguous(), 0
    if all(size == 1 or step == 0 for size, step in zip(t.shape[:lead], t.stride()[:lead], strict=True)) and t.numel():
        return t[(0,) * lead].contiguous(), 0
    return t.expand(*batch, *t.shape[lead:]).contiguous(), t.shape[lead:].numel()


def _arguments(x, log_weights, means, precisions_cholesky, covariance_type, batch):
    tensors = x, log_weights, means, precisions_cholesky
    trailing = 2, 1, 2, _TRAILING[covariance_type]
    flat = [_flat(t, batch, m) for t, m in zip(tensors, trailing, strict=True)]
    b = torch.Size(batch).numel()
    scalars = (tuple(step for _, step in flat), b, x.shape[-2], means.shape[-2], x.shape[-1], DTYPE_CODE[x.dtype],
               _TYPES.index(covariance_type))
    return tuple(t for t, _ in flat), scalars


def _prepared_bytes(x, b, n, k, d, covariance_type, pull=False):
    """Parameters in the order of the tensor cores (csrc/gmm/gmm_cuda.h); 0 where the plain kernels are used."""
    if x.dtype is not torch.float32 or covariance_type not in ("full", "tied") or not n:
        return 0
    tiles = -(-d // 8)
    inside = _MATRIX_FEATURES[0] <= d <= _MATRIX_FEATURES[1]
    return 4 * b * k * (12 * tiles + 64 * tiles * (tiles + 1) * (2 if pull else 1)) if inside else 0


def _sums_bytes(b, n, k, d, covariance_type):
    """Float64 sums of every row slab."""
    bytes_per_slab = 8 * b * k * (1 + 2 * d if covariance_type in ("diag", "spherical") else 1 + d + d * (d + 1) // 2)
    return bytes_per_slab * max(1, min(-(-n // _SLAB_ROWS), _MOST_SLABS, _SLAB_BYTES // max(bytes_per_slab, 1)))


def _scratch(x, size):
    """Workspace of a CUDA kernel."""
    if not size or not (x.is_cuda or Kernel.backend is not None):
        return None
    return torch.empty(size, dtype=torch.uint8, device=x.device)


_forward = Kernel("gmm_log_prob", scratch=1)
_backward = Kernel("gmm_log_prob_backward", scratch=1)


def _launch(out, *args):
    ins, scalars = _arguments(*args, out.shape[:-1])
    scratch = _scratch(ins[0], _prepared_bytes(ins[0], *scalars[1:5], args[4]))
    _forward((out, scratch), ins, 0 if scratch is None else scratch.nbytes, *scalars)


def _backward_outputs(grad, log_prob, x, log_weights, means, precisions_cholesky, covariance_type, need_x,
                      need_parameters, out=None):
    batch = _batch(x, log_weights, means, precisions_cholesky, covariance_type)
    check_same_dtype("x", x, grad=grad, log_prob=log_prob, log_weights=log_weights, means=means,
                     precisions_cholesky=precisions_cholesky)
    for name, t in (("grad", grad), ("log_prob", log_prob)):
        if tuple(t.shape) != (*batch, x.shape[-2]):
            raise ValueError(f"{name} must be {(*batch, x.shape[-2])}, got {tuple(t.shape)}")
    p, nothing = precisions_cholesky, (0,)
    matrix = p.shape[p.dim() - _TRAILING[covariance_type] :]
    return (
        x.new_empty((*batch, *x.shape[-2:]) if need_x else nothing),
        x.new_empty((*batch, means.shape[-2]) if need_parameters else nothing),
        x.new_empty((*batch, *means.shape[-2:]) if need_parameters else nothing),
        x.new_empty((*batch, *matrix) if need_parameters else nothing),
    )


def _backward_launch(outs, grad, log_prob, x, log_weights, means, precisions_cholesky, covariance_type, need_x,
                     need_parameters):
    ins, scalars = _arguments(x, log_weights, means, precisions_cholesky, covariance_type, grad.shape[:-1])
    prepared = _prepared_bytes(x, *scalars[1:5], covariance_type, pull=need_x)
    sums = _sums_bytes(*scalars[1:5], covariance_type) if need_parameters else 0
    scratch = _scratch(x, prepared + sums)
    if scratch is None:
        prepared = sums = 0
    _backward((*outs, scratch), (grad.contiguous(), log_prob.contiguous(), *ins), prepared, sums, *scalars, need_x,
              need_parameters)


def _twice_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _twice(ctx, *grads):
    """The derivative of the backward: of its reference formula, in plain torch."""
    tensors = ctx.saved_tensors
    used = [i for i, (g, asked) in enumerate(zip(grads, (ctx.options[1], *[ctx.options[2]] * 3), strict=True))
            if g is not None and asked]

    def gradients(grad, *inputs):
        results = reference.gmm.gmm_log_prob_backward(grad, tensors[1], *inputs, *ctx.options)
        return tuple(results[i] for i in used)

    if not used:
        return (None,) * 9
    _, pull = torch.func.vjp(gradients, tensors[0], *tensors[2:])
    grad, *rest = pull(tuple(grads[i] for i in used))
    return grad, None, *rest, None, None, None


_backward_op = Op(
    "gmm_log_prob_backward(Tensor grad, Tensor log_prob, Tensor x, Tensor log_weights, Tensor means,"
    " Tensor precisions_cholesky, str covariance_type, bool need_x, bool need_parameters)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    outputs=_backward_outputs,
    launch=_backward_launch,
    reference=reference.gmm.gmm_log_prob_backward,
    kernel=_backward,
    setup=_twice_setup,
    backward=_twice,
)


def gradients(log_prob, x, log_weights, means, precisions_cholesky, covariance_type):
    """d log_prob[i] / d x[i]: [..., n, d]."""
    grad = torch.ones_like(log_prob, requires_grad=False)
    args = log_prob.detach(), x, log_weights, means, precisions_cholesky
    return _backward_op(grad, *args, covariance_type, True, False)[0]


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output, *inputs[:4])
    ctx.covariance_type = inputs[4]


def _differentiate(ctx, grad):
    log_prob, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads = _backward_op(grad, log_prob, *tensors, ctx.covariance_type, needs[0], any(needs[1:4]))
    return *(g.sum_to_size(t.shape) if need else None for g, t, need in zip(grads, tensors, needs, strict=False)), None


_op = Op(
    "gmm_log_prob(Tensor x, Tensor log_weights, Tensor means, Tensor precisions_cholesky, str covariance_type)"
    " -> Tensor",
    outputs=_outputs,
    launch=_launch,
    reference=reference.gmm.gmm_log_prob,
    kernel=_forward,
    setup=_setup,
    backward=_differentiate,
    autocast=torch.float32,
)


def gmm_log_prob(x, log_weights, means, precisions_cholesky, covariance_type="full", *, out=None):
    r"""Log-density of every row of ``x`` under a Gaussian mixture: differentiable, nothing of size ``n x k`` in memory.

    ``lp[i] = logsumexp_k(log_weights[k] + log|det P_k| - d/2 log(2 pi) - 1/2 |(x_i - means[k]) P_k|^2)``, the
    covariance of component k being ``(P_k P_k^T)^-1``: scikit-learn's ``precisions_cholesky_``.

    Args:
        x: rows ``[..., n, d]``.
        log_weights: ``[..., k]``, used as given: normalise them for a density. ``-inf`` leaves a component out.
        means: ``[..., k, d]``.
        precisions_cholesky: ``"full"`` ``[..., k, d, d]``, upper triangular (what lies below the diagonal is ignored
            and has gradient 0); ``"tied"`` ``[..., d, d]``, one for all components; ``"diag"`` ``[..., k, d]`` and
            ``"spherical"`` ``[..., k]``, reciprocals of standard deviations.
        covariance_type: which of these.
        out: a contiguous tensor ``[..., n]`` to write into (no gradients then).

    Leading dimensions are batches of mixtures and broadcast. All tensors have one dtype: float32 or float64 (bfloat16
    and float16 run the reference; under autocast the op computes in float32).

    Returns: ``[..., n]``, with gradients of any order for all four tensors. A row with a NaN gives NaN, to itself and
    to the gradients of the parameters only. A row with an infinity gives ``-inf``, and so does every row when no
    component is left (``k=0``); rows of ``-inf`` have gradient 0. With ``d=0`` the result is
    ``logsumexp(log_weights)``.

    Errors: ``ValueError`` for shapes and unknown covariance types, ``TypeError`` for dtypes.

    Source: McLachlan and Peel, "Finite mixture models", 2000; ``sklearn.mixture.GaussianMixture.score_samples``.

    >>> x, means = torch.randn(1000, 2), torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    >>> log_weights, scales = torch.tensor([0.5, 0.5]).log(), torch.ones(2, 2)
    >>> lp = gmm_log_prob(x, log_weights, means, scales, "diag")
    """
    check_tensor("x", x)
    check_tensor("log_weights", log_weights)
    check_tensor("means", means)
    check_tensor("precisions_cholesky", precisions_cholesky)
    check_floating("x", x)
    return _op(x, log_weights, means, precisions_cholesky, covariance_type, out=out)
