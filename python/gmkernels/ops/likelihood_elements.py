"""Likelihood heads whose elements are independent: one logistic a pixel channel, by the mixture's kernel; categorical,
Gaussian and Bernoulli by torch."""

import math

import torch
import torch.nn.functional as F

from .._call import HALVES, check_floating, check_same_dtype, check_tensor
from .._loss import check_reduction, reduced
from .likelihood import discretized_logistic_mixture_nll


def _checked(names, tensors, x, reduction):
    """Tensors of x's shape and one floating dtype; half types, and all under autocast, in float32."""
    for name, t in zip((*names, "x"), (*tensors, x), strict=True):
        check_tensor(name, t)
    check_reduction(reduction)
    first = tensors[0]
    for name, t in zip(names, tensors, strict=True):
        check_floating(name, t)
        check_same_dtype(names[0], first, **{name: t})
        if t.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(t.shape)}")
    if x.dim() < 1:
        raise ValueError("x must be [b, ...], got a tensor without dimensions")
    real = torch.float32 if first.dtype in HALVES else first.dtype
    if x.dtype.is_floating_point and x.dtype not in (first.dtype, real):
        raise TypeError(f"x must be {first.dtype} as {names[0]}, got {x.dtype}")
    return (*(t.to(real) for t in tensors), x.to(real))


def discretized_logistic_nll(mean, log_scale, x, *, parametrization="openai", low=-1.0, high=1.0, levels=256,
                             reduction="mean"):
    r"""Negative log-likelihood of one discretized logistic for every element, in nats.

    :func:`discretized_logistic_mixture_nll` with one component and independent elements: exact, gradient in one pass.

    Args:
        mean, log_scale: ``[b, ...]``, of x scaled to [-1, 1]; log_scale counts as -7 at least, or with
            ``parametrization="tfp"`` is a scale under ``softplus + e^-7``.
        x: ``[b, ...]``, as there; integers too.
        low, high, levels: as there.
        reduction: ``"none"`` an element; ``"image"`` ``[b]`` sums; ``"sum"``; ``"mean"`` over elements.

    Values, errors: as there. Source: Kingma et al., "Improved variational inference with inverse autoregressive flow",
    NeurIPS 2016.

    >>> nll = discretized_logistic_nll(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    """
    mean, log_scale, x = _checked(("mean", "log_scale"), (mean, log_scale), x, reduction)
    params = torch.stack((torch.zeros_like(mean), mean, log_scale), 1)
    return discretized_logistic_mixture_nll(params, x[:, None], 1, parametrization=parametrization, low=low, high=high,
                                            levels=levels, reduction=reduction)


def categorical_nll(logits, x, *, reduction="mean"):
    r"""Negative log-likelihood of pixels that each have a softmax over their values, in nats.

    Args:
        logits: ``[b, levels, ...]``, classes in dimension 1 as in :func:`torch.nn.functional.cross_entropy`, which
            computes it; for images of c channels ``[b, levels, c, h, w]``.
        x: ``[b, ...]``, integers in ``[0, levels)``.
        reduction: ``"none"`` an element of x; ``"image"`` ``[b]`` sums; ``"sum"``; ``"mean"`` over elements.

    A NaN logit makes its pixel NaN. bfloat16 and float16 are computed in float32. Errors: ``ValueError`` for shapes,
    ``TypeError`` for dtypes; an x out of range is torch's ``IndexError`` on the CPU, its device assertion on CUDA.

    Source: van den Oord et al., "Pixel recurrent neural networks", ICML 2016.

    >>> nll = categorical_nll(torch.zeros(2, 256, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.int64))
    """
    check_tensor("logits", logits)
    check_tensor("x", x)
    check_floating("logits", logits)
    check_reduction(reduction)
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype is torch.bool:
        raise TypeError(f"x must hold integers, got {x.dtype}")
    if logits.dim() < 2 or logits.shape[:1] + logits.shape[2:] != x.shape:
        raise ValueError(f"logits must be [b, levels, ...] for x [b, ...], got {tuple(logits.shape)}, {tuple(x.shape)}")
    logits = logits.float() if logits.dtype in HALVES else logits
    if not x.numel():
        return reduced(logits.sum(1) if logits.shape[1] else logits.new_zeros(x.shape), reduction)
    # torch's default, -100, would be a value of x that is left out in silence
    torchs = reduction if reduction in ("sum", "mean") else "none"
    nll = F.cross_entropy(logits, x.long(), reduction=torchs, ignore_index=-(2**62))
    return nll if torchs != "none" else reduced(nll, reduction)


def gaussian_nll(mean, log_std, x, *, reduction="mean"):
    r"""Negative log-density of independent normals, in nats: ``1/2 log(2 pi) + log_std + 1/2 ((x - mean) / std)^2``.

    Args:
        mean, log_std, x: ``[b, ...]``; gradients flow to all of them. Plain torch.
        reduction: ``"none"``; ``"image"`` ``[b]`` sums; ``"sum"``; ``"mean"`` over elements.

    Errors: ``ValueError`` for shapes, ``TypeError`` for dtypes.

    >>> nll = gaussian_nll(torch.zeros(2, 5), torch.zeros(2, 5), torch.ones(2, 5), reduction="image")
    """
    mean, log_std, x = _checked(("mean", "log_std"), (mean, log_std), x, reduction)
    z = (x - mean) * torch.exp(-log_std)
    return reduced(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi), reduction)


def bernoulli_nll(logits, x, *, reduction="mean"):
    r"""Negative log-likelihood of binary pixels, in nats: ``softplus(logits) - x logits``.

    Args:
        logits: ``[b, ...]``.
        x: ``[b, ...]``, 0 or 1; values between count as probabilities. By
            :func:`torch.nn.functional.binary_cross_entropy_with_logits`.
        reduction: ``"none"``; ``"image"`` ``[b]`` sums; ``"sum"``; ``"mean"`` over elements.

    Errors: ``ValueError`` for shapes, ``TypeError`` for dtypes.

    >>> nll = bernoulli_nll(torch.zeros(2, 5), torch.ones(2, 5), reduction="image")
    """
    logits, x = _checked(("logits",), (logits,), x, reduction)
    return reduced(F.binary_cross_entropy_with_logits(logits, x, reduction="none"), reduction)
