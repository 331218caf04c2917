"""The training side of diffusion and flow models: noise for the data, and the loss of what a model says of it."""

import math

import torch

from .. import _C, reference
from .._call import DTYPE_CODE, Kernel, Op, check_int, check_same_dtype, check_tensor, plain_eager, split_seed
from .._loss import keeps_graph
from ..reference.diffusion import real_dtype, term
from ..reference.noising import TARGETS, WEIGHTS, pairs, per_sample, target_pair, weights
from .random import STREAM_ADD_NOISE
from .random import _op as _philox

_add, _loss, _flow = Kernel("add_noise"), Kernel("denoising_loss", scratch=1), Kernel("flow_pair")
_FLOATS = tuple(DTYPE_CODE)
_NO_TARGET = len(TARGETS)


# checks ---------------------------------------------------------------------------------------------------------------


def _check_data(name, x, **others):
    if x.dtype not in DTYPE_CODE:
        raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPE_CODE))}, got {x.dtype}")
    check_same_dtype(name, x, **others)
    for other, o in others.items():
        if o is not None and o.shape != x.shape:
            raise ValueError(f"{other} must have the shape of {name}, {tuple(x.shape)}, got {tuple(o.shape)}")


def _check_real(name, values, x):
    if values.dtype is not torch.float32 and not (values.dtype is torch.float64 and x.dtype is torch.float64):
        allowed = "float32 or float64" if x.dtype is torch.float64 else "float32"
        raise TypeError(f"{name} must be {allowed} for data of {x.dtype}, got {values.dtype}")


def _check_per_sample(name, values, x):
    if values.dim() > 1 or (values.dim() and (not x.dim() or values.shape[0] != x.shape[0])):
        expected = f"[{x.shape[0]}] or []" if x.dim() else "[]"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(values.shape)}")


def _check_schedule(x, t, schedule):
    _check_real("schedule", schedule, x)
    if t is None:
        if not x.dim() or schedule.shape != (x.shape[0], 2):
            raise ValueError(f"schedule must be [{x.shape[0] if x.dim() else 'b'}, 2] (alpha, sigma) where t is None, "
                             f"got {tuple(schedule.shape)}")
        return
    if t.dtype is not torch.int64:
        raise TypeError(f"t must be int64, indices of rows of the schedule, got {t.dtype}")
    _check_per_sample("t", t, x)
    if schedule.dim() != 2 or schedule.shape[1] != 2 or schedule.shape[0] == 0:
        raise ValueError(f"schedule must be [times, 2] (alpha, sigma), got {tuple(schedule.shape)}")


def _check_range(t, schedule):
    """On the CPU: elsewhere it would wait for the device, and a sample whose t is outside becomes NaN."""
    if t is None or not t.is_cpu or not t.numel() or Kernel.backend is not None:
        return
    low, high = (v.item() for v in torch.aminmax(t))
    if low < 0 or high >= schedule.shape[0]:
        raise ValueError(f"t must be in [0, {schedule.shape[0]}), the rows of the schedule, got {low} to {high}")


def _samples(t, x):
    return x.shape[0] if t is None or t.dim() else 1


def _seed_rows(seeds):
    return seeds.shape[0] if seeds is not None and seeds.dim() else 1


def _contiguous(*tensors):
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _draw(x, seeds, seed, step, stream):
    if seeds is None:  # the dispatcher has no way to call an op without a tensor under transforms
        seeds = x.new_full((), seed, dtype=torch.int64)
    return _philox(seeds, tuple(x.shape), 0, step, stream, True, real_dtype(x), x.device)


def _finite(c, t):
    """t, as the derivative by a coefficient c sees it: 0 where c is 0 and hides what t holds."""
    return torch.where((c == 0) & ~torch.isfinite(t), 0.0, t)


def _sum(c, product):
    """The sum over what shares a coefficient, of c's shape; in float64."""
    axes = tuple(range(1 if c.dim() else 0, product.dim()))
    return product.double().sum(axes, keepdim=bool(c.dim())) if axes else product.double()


# add_noise ------------------------------------------------------------------------------------------------------------


def _add_outputs(x0, t, schedule, z, seeds, seed, step, out=None):
    _check_data("x0", x0, noise=z)
    _check_schedule(x0, t, schedule)
    return torch.empty_like(x0, memory_format=torch.contiguous_format)


def _add_target_outputs(x0, t, schedule, z, seeds, target, seed, step, out=None):
    return _add_outputs(x0, t, schedule, z, seeds, seed, step), torch.empty_like(
        x0, memory_format=torch.contiguous_format)


def _add_target_launch(outs, x0, t, schedule, z, seeds, target, seed, step):
    _check_range(t, schedule)
    ins = x0, t, schedule, z, seeds = _contiguous(x0, t, schedule, z, seeds)
    _add(outs, ins, x0.numel(), schedule.shape[0], _samples(t, x0), schedule.dtype is torch.float64, _seed_rows(seeds),
         seed & (2**64 - 1), step, target, DTYPE_CODE[x0.dtype])


def _add_launch(xt, x0, t, schedule, z, seeds, seed, step):
    _add_target_launch((xt, None), x0, t, schedule, z, seeds, _NO_TARGET, seed, step)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.scalars = inputs[5:]


def _add_gradients(ctx, g, g_target, target, seed, step):
    x0, t, schedule, z, seeds = ctx.saved_tensors
    need, real = ctx.needs_input_grad, real_dtype(x0)
    alpha, sigma = pairs(schedule, t, x0)
    p, q = target_pair(alpha, sigma, target)
    g = torch.zeros_like(x0, dtype=real) if g is None else g.to(real)
    h = torch.zeros_like(g) if g_target is None else g_target.to(real)
    by_x0 = (term(alpha, g) + term(p, h)).to(x0.dtype) if need[0] else None
    by_z = (term(sigma, g) + term(q, h)).to(z.dtype) if need[3] and z is not None else None
    by_schedule = None
    if need[2]:
        n = _draw(x0, seeds, seed, step, STREAM_ADD_NOISE) if z is None else z.to(real)
        x = x0.to(real)
        by_alpha, by_sigma = _sum(alpha, g * _finite(alpha, x)), _sum(sigma, g * _finite(sigma, n))
        if target == "v":
            by_alpha = by_alpha + _sum(alpha, h * _finite(alpha, n))
            by_sigma = by_sigma - _sum(sigma, h * _finite(sigma, x))
        elif target == "score":
            by_sigma = by_sigma + _sum(sigma, h * n) / sigma.double() ** 2
        rows = torch.stack((by_alpha.flatten(), by_sigma.flatten()), -1)
        if t is None:
            by_schedule = rows.to(schedule.dtype)
        else:
            index = t.reshape(-1).clamp(0, schedule.shape[0] - 1)
            by_schedule = torch.zeros_like(schedule, dtype=torch.float64).index_add(0, index, rows).to(schedule.dtype)
    return by_x0, None, by_schedule, by_z, None


def _add_backward(ctx, g):
    return *_add_gradients(ctx, g, None, "epsilon", *ctx.scalars), None, None


def _add_target_backward(ctx, g, g_target):
    target, seed, step = ctx.scalars
    return *_add_gradients(ctx, g, g_target, TARGETS[target], seed, step), None, None, None


_ADD = "(Tensor x0, Tensor? t, Tensor schedule, Tensor? z, Tensor? seeds, "
_add_op = Op("add_noise" + _ADD + "SymInt seed, SymInt step) -> Tensor", outputs=_add_outputs, launch=_add_launch,
             reference=reference.noising.add_noise, kernel=_add, dtypes=_FLOATS, setup=_setup, backward=_add_backward)
_add_target_op = Op("add_noise_target" + _ADD + "int target, SymInt seed, SymInt step) -> (Tensor, Tensor)",
                    outputs=_add_target_outputs, launch=_add_target_launch,
                    reference=reference.noising.add_noise_target, kernel=_add, dtypes=_FLOATS, setup=_setup,
                    backward=_add_target_backward)


def add_noise(x0, t, schedule, *, seed=None, noise=None, target=None, step=0):
    r"""Noisy data, and what a model should say of them, in one pass over memory; the noise is made in registers.

    .. math::
        x_t = \alpha x_0 + \sigma z, \qquad (\alpha, \sigma) = \text{schedule}[t]

    ============ ================================== ===========================================
    ``target``   second result                      of
    ============ ================================== ===========================================
    "epsilon"    :math:`z`                          the noise
    "x0"         :math:`x_0`                        the data
    "v"          :math:`\alpha z - \sigma x_0`      Salimans and Ho 2022; diffusers' get_velocity
    "score"      :math:`-z / \sigma`                the gradient of log p(x_t | x0)
    "velocity"   :math:`z - x_0`                    flow matching, with alpha = 1 - sigma
    ============ ================================== ===========================================

    Half types are computed in float32 and rounded once. A term whose factor is exactly 0 adds exactly 0, whatever it
    holds. The score at sigma = 0 is infinite.

    Args:
        x0: [b, ...], float32, float64, bfloat16 or float16, any strides.
        t: int64 [b], the row of the schedule of each sample; [] for one that all share; None: sample i has row i
            (continuous times). On the CPU a t outside the schedule is refused; on a GPU, where that would wait for
            the device, such a sample becomes NaN.
        schedule: float32 [times, 2], pairs (alpha, sigma); for float64 data also float64.
        seed: as in :func:`philox_normal`: None draws one, an int counts over the whole tensor, an int64 tensor [b]
            seeds each sample on its own. z is ``philox_normal(x0.shape, seed, step, stream=8)``.
        noise: a tensor to use as z, of x0's shape and dtype; then no seed.
        target: None, or a name of the table.
        step: counter word 2, in ``[0, 2**32)``.

    Returns ``x_t``, or ``(x_t, target)``. Gradients flow to x0, the schedule and a ``noise`` tensor, any number of
    times; drawn noise is drawn again, never stored.

    Errors: ``TypeError`` for wrong types and dtypes, ``ValueError`` for wrong shapes, ranges and names.

    Source: Ho et al. 2020; Salimans and Ho 2022; Lipman et al. 2023.

    >>> schedule = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> xt, eps = add_noise(torch.ones(2, 3), torch.tensor([0, 1]), schedule, seed=0, target="epsilon")
    """
    _check_tensors("t", "noise", x0=x0, t=t, schedule=schedule, noise=noise)
    step = check_int("step", step, 0, 2**32)
    if noise is None:
        seeds, seed = split_seed(seed, x0.device, x0.shape[0] if x0.dim() else None)
    elif seed is not None:
        raise ValueError("seed must be None where noise is a tensor")
    else:
        seeds, seed = None, 0
    if target is None:
        return _add_op(x0, t, schedule, noise, seeds, seed, step)
    return _add_target_op(x0, t, schedule, noise, seeds, _index("target", target), seed, step)


def _check_tensors(*optional, **tensors):
    """Those whose names are in `optional` may be None."""
    for name, value in tensors.items():
        if value is not None or name not in optional:
            check_tensor(name, value)


def _index(name, value):
    if value not in TARGETS:
        raise ValueError(f"{name} must be one of {', '.join(TARGETS)}, got {value!r}")
    return TARGETS.index(value)


# denoising_loss -------------------------------------------------------------------------------------------------------


def _loss_outputs(pred, x0, t, schedule, weight, seeds, target, weighting, gamma, with_grad, seed, step, out=None):
    _check_data("pred", pred, x0=x0)
    _check_schedule(pred, t, schedule)
    if weight is not None:
        check_same_dtype("schedule", schedule, weight=weight)
        samples = _samples(t, pred)
        if weight.shape != ((samples,) if t is None or t.dim() else ()):
            raise ValueError(f"weight must have the shape of t, {() if t is not None and not t.dim() else (samples,)}, "
                             f"got {tuple(weight.shape)}")
    grad = torch.empty_like(pred, memory_format=torch.contiguous_format) if with_grad else pred.new_empty(0)
    return pred.new_empty((), dtype=real_dtype(pred)), grad


def _loss_launch(outs, pred, x0, t, schedule, weight, seeds, target, weighting, gamma, with_grad, seed, step):
    loss, grad = outs
    if not pred.numel():
        loss.fill_(math.nan)  # as the mean of nothing in torch
        return
    _check_range(t, schedule)
    x0 = None if TARGETS[target] in ("epsilon", "score") else x0
    ins = pred, x0, t, schedule, weight, seeds = _contiguous(pred, x0, t, schedule, weight, seeds)
    rows = _seed_rows(seeds)
    partials = pred.new_empty(_C.denoising_loss_partials(pred.numel(), rows), dtype=torch.float64)
    _loss((loss, grad if with_grad else None, partials), ins, pred.numel(), schedule.shape[0], _samples(t, pred),
          schedule.dtype is torch.float64, rows, seed & (2**64 - 1), step, target, weighting, gamma,
          DTYPE_CODE[pred.dtype])


def _loss_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of the second output: zeros of pred's size
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.scalars = inputs[6:]


def _loss_backward(ctx, g, _):
    if g is None:
        return (None,) * 12
    pred, x0, t, schedule, weight, seeds, grad = ctx.saved_tensors
    target, weighting, gamma, with_grad, seed, step = ctx.scalars
    need = ctx.needs_input_grad
    if with_grad and need[0] and not (need[1] or need[4] or torch.is_grad_enabled()):
        if type(g) is torch.Tensor and g.is_cpu and plain_eager() and not keeps_graph() and g.item() == 1:
            return grad, *(None,) * 11
        return grad * g.to(grad.dtype if grad.dtype is torch.float64 else torch.float32), *(None,) * 11
    # Plain torch, so that it can be differentiated again.
    real = real_dtype(pred)
    alpha, sigma = pairs(schedule, t, pred)
    p, q = target_pair(alpha, sigma, TARGETS[target])
    w = weights(alpha, sigma, weight, weighting, gamma, TARGETS[target], pred)
    want = term(q, _draw(pred, seeds, seed, step, STREAM_ADD_NOISE))
    if x0 is not None:
        want = want + term(p, x0.to(real))
    difference = pred.to(real) - want
    by_pred = g.to(real) * (2.0 / max(pred.numel(), 1)) * w * difference
    by_x0 = term(-p, by_pred).to(x0.dtype) if need[1] and x0 is not None else None
    by_weight = None
    if need[4]:
        squares = _sum(w, difference * difference) / pred.numel()
        by_weight = (squares.reshape(weight.shape) * g).to(weight.dtype)
    return by_pred.to(pred.dtype), by_x0, None, None, by_weight, *(None,) * 7


_loss_op = Op(
    "denoising_loss(Tensor pred, Tensor? x0, Tensor? t, Tensor schedule, Tensor? weight, Tensor? seeds, int target,"
    " int weighting, float gamma, bool with_grad, SymInt seed, SymInt step) -> (Tensor, Tensor)",
    outputs=_loss_outputs, launch=_loss_launch, reference=reference.noising.denoising_loss, kernel=_loss,
    dtypes=_FLOATS, setup=_loss_setup, backward=_loss_backward,
)


def denoising_loss(pred, x0, t, schedule, seed, *, target="epsilon", weight=None, gamma=5.0, step=0):
    r"""The mean squared error of a model that was given :func:`add_noise` with this seed; no noise in memory.

    .. math::
        \text{loss} = \mathrm{mean}(w (\text{pred} - \text{target})^2)

    The target of :func:`add_noise` is made again from the seed where it is compared. Where pred wants a gradient, the
    same pass writes it, so the memory of a training step is the gradient only: neither noise nor target nor difference.
    Sums are float64 and have a fixed order: the same bits on any number of threads.

    Args:
        pred: [b, ...], what the model said; float32, float64, bfloat16 or float16, any strides.
        x0: of pred's shape and dtype; may be None for the targets "epsilon" and "score", which have none of it.
        t, schedule, target, step: those that :func:`add_noise` was given.
        seed: that of :func:`add_noise`, an int or an int64 tensor; not None, for other noise would be another target.
        weight: None, a tensor of t's shape (of the schedule's dtype), or "min_snr" for the targets "epsilon", "x0" and
            "v": min(snr, gamma), divided by snr for epsilon and by snr + 1 for v, where snr = alpha^2 / sigma^2.
        gamma: of "min_snr".

    Returns a float32 scalar (float64 for float64 pred); NaN for no elements. Gradients flow to pred, x0 and weight,
    not to the schedule, which must not ask for one.

    Errors: ``TypeError`` for wrong types and dtypes, ``ValueError`` for wrong shapes, ranges and names.

    Source: Ho et al. 2020; Hang et al. 2023 (min-SNR).

    >>> x0, t, schedule = torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> xt = add_noise(x0, t, schedule, seed=5)
    >>> loss = denoising_loss(torch.zeros(2, 3), x0, t, schedule, 5, target="v")
    """
    _check_tensors("x0", "t", pred=pred, x0=x0, t=t, schedule=schedule)
    index = _index("target", target)
    step = check_int("step", step, 0, 2**32)
    if seed is None:
        raise TypeError("seed must be that of add_noise, an int or an int64 tensor, got None")
    if x0 is None and target not in ("epsilon", "score"):
        raise TypeError(f"x0 must be a torch.Tensor for the target {target}, got NoneType")
    if not isinstance(gamma, (int, float)) or isinstance(gamma, bool):
        raise TypeError(f"gamma must be a float, got {type(gamma).__name__}")
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    if isinstance(weight, torch.Tensor):
        weighting = WEIGHTS.index("given")
    elif weight is None or weight == "min_snr":
        weighting, weight = WEIGHTS.index(weight), None
        if weighting and target not in ("epsilon", "x0", "v"):
            raise ValueError(f"weight \"min_snr\" is for the targets epsilon, x0 and v, got {target}")
    else:
        raise TypeError(f"weight must be None, \"min_snr\" or a torch.Tensor, got {weight!r}")
    grad = torch.is_grad_enabled()
    if grad and schedule.requires_grad:
        raise ValueError("schedule must not require a gradient: denoising_loss has none for it")
    seeds, seed = split_seed(seed, pred.device, pred.shape[0] if pred.dim() else None)
    with_grad = grad and pred.requires_grad and not any(t is not None and t.requires_grad for t in (x0, weight))
    return _loss_op(pred, x0, t, schedule, weight, seeds, index, weighting, float(gamma), with_grad, seed, step)[0]


# flow_pair ------------------------------------------------------------------------------------------------------------


def _flow_outputs(x0, x1, t, seeds, sigma, seed, step, out=None):
    _check_data("x0", x0, x1=x1)
    _check_real("t", t, x0)
    _check_per_sample("t", t, x0)
    return tuple(torch.empty_like(x0, memory_format=torch.contiguous_format) for _ in range(2))


def _flow_launch(outs, x0, x1, t, seeds, sigma, seed, step):
    ins = x0, x1, t, seeds = _contiguous(x0, x1, t, seeds)
    _flow(outs, ins, x0.numel(), t.shape[0] if t.dim() else 1, t.dtype is torch.float64, sigma, _seed_rows(seeds),
          seed & (2**64 - 1), step, DTYPE_CODE[x0.dtype])


def _flow_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _flow_backward(ctx, g, h):
    x0, x1, t = ctx.saved_tensors
    need, real = ctx.needs_input_grad, real_dtype(x0)
    s, g, h = per_sample(t, x0), g.to(real), h.to(real)
    by_t = None
    if need[2]:
        by_t = _sum(s, g * (x1.to(real) - x0.to(real))).reshape(t.shape).to(t.dtype)
    return (((1.0 - s) * g - h).to(x0.dtype) if need[0] else None, (s * g + h).to(x1.dtype) if need[1] else None,
            by_t, None, None, None, None)


_flow_op = Op("flow_pair(Tensor x0, Tensor x1, Tensor t, Tensor? seeds, float sigma, SymInt seed, SymInt step) ->"
              " (Tensor, Tensor)",
              outputs=_flow_outputs, launch=_flow_launch, reference=reference.noising.flow_pair, kernel=_flow,
              dtypes=_FLOATS, setup=_flow_setup, backward=_flow_backward)


def flow_pair(x0, x1, t, sigma=0.0, *, seed=None, step=0):
    r"""A point on the straight path between two samples, and the velocity there: conditional flow matching.

    .. math::
        x_t = (1 - t) x_0 + t x_1 + \sigma z, \qquad u_t = x_1 - x_0

    Both in one pass over memory; the noise is made in registers, and not at all where sigma is 0.

    Args:
        x0, x1: [b, ...] of one shape and dtype, the source and the data; float32, float64, bfloat16 or float16.
        t: float32 [b] or [] (for float64 data also float64), usually in [0, 1]; not checked.
        sigma: a float, not negative.
        seed, step: as in :func:`philox_normal`; z is ``philox_normal(x0.shape, seed, step, stream=9)``.

    Returns ``(x_t, u_t)``. Gradients flow to x0, x1 and t, any number of times. NaN and infinity pass through.

    Errors: ``TypeError`` for wrong types and dtypes, ``ValueError`` for wrong shapes and ranges.

    Source: Lipman et al. 2023; Tong et al. 2024 (sigma).

    >>> xt, ut = flow_pair(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0.0, 0.5]))
    """
    _check_tensors(x0=x0, x1=x1, t=t)
    if not isinstance(sigma, (int, float)) or isinstance(sigma, bool):
        raise TypeError(f"sigma must be a float, got {type(sigma).__name__}")
    if not (sigma >= 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be finite and not negative, got {sigma}")
    step = check_int("step", step, 0, 2**32)
    if sigma or seed is not None:
        seeds, seed = split_seed(seed, x0.device, x0.shape[0] if x0.dim() else None)
    else:
        seeds, seed = None, 0
    return _flow_op(x0, x1, t, seeds, float(sigma), seed, step)
