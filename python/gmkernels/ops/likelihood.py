"""Likelihood heads of autoregressive models: what a network's outputs say of an image, and images drawn from them."""

import math

import torch

from .. import reference
from .._call import (
    DTYPE_CODE,
    HALVES,
    Kernel,
    Op,
    check_floating,
    check_int,
    check_same_dtype,
    check_tensor,
    split_seed,
)
from .._loss import check_reduction, loss_op, reduced, reduced_shape, wanted, weight

_ref = reference.likelihood
_MOST = 512  # components: a pixel's parameters stay in the shared memory of any GPU


# shapes and memory ---------------------------------------------------------------------------------------------------


def _last(t):
    """Are the channels innermost in memory? Of one pixel an image, yes: the images then join without a seam."""
    if t.dim() == 2 or t.shape[2:].numel() == 1:
        return t.is_contiguous()
    return not t.is_contiguous() and t.movedim(1, -1).is_contiguous()


def _dense(t, last):
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t.contiguous()


def _like(t):
    """Uninitialised, in t's memory format, contiguous if that has none."""
    b, n, *rest = t.shape
    return t.new_empty((b, *rest, n)).movedim(-1, 1) if _last(t) and rest else t.new_empty(t.shape)


def _check_params(params, num_mixtures, channels):
    check_floating("params", params)
    if params.dim() < 2:
        raise ValueError(f"params must be [b, n, ...], got {tuple(params.shape)}")
    n = num_mixtures * (10 if channels == 3 else 3)
    if params.shape[1] != n:
        raise ValueError(f"params must have {n} channels for num_mixtures={num_mixtures} and {channels} data channel"
                         f"{'s' * (channels > 1)}, got {tuple(params.shape)}")


def _scalars(params, num_mixtures, channels, low, high, levels, kind):
    b, rest = params.shape[0], params.shape[2:]
    return (b, rest.numel(), num_mixtures, channels, low, high, float(levels), _ref.KINDS.index(kind), _last(params),
            DTYPE_CODE[params.dtype])


# the mixture's nll ---------------------------------------------------------------------------------------------------

_nll = Kernel("logistic_mixture_nll")


def _nll_outputs(params, x, num_mixtures, kind, low, high, levels, reduction, need, out=None):
    if x.dim() < 2 or x.shape[1] not in (1, 3):
        raise ValueError(f"x must be [b, 1 or 3, ...], got {tuple(x.shape)}")
    if params.shape[:1] != x.shape[:1] or params.shape[2:] != x.shape[2:]:
        expected = ", ".join(map(str, (x.shape[0], "n", *x.shape[2:])))
        raise ValueError(f"params must be [{expected}] as x {tuple(x.shape)}, got {tuple(params.shape)}")
    _check_params(params, num_mixtures, x.shape[1])
    check_same_dtype("params", params, x=x)
    loss = params.new_empty(reduced_shape((params.shape[0], *params.shape[2:]), reduction))
    return loss, _like(params) if need else params.new_empty((0,))


def _nll_launch(outs, params, x, num_mixtures, kind, low, high, levels, reduction, need):
    loss, gradient = outs
    pixels = (params.shape[0], *params.shape[2:])
    nll = loss if reduction == "none" else params.new_empty(pixels)
    last = _last(params)
    params, x = _dense(params, last), _dense(x, last)
    _nll((nll, gradient if need else None), (params, x),
         *_scalars(params, num_mixtures, x.shape[1], low, high, levels, kind), weight(nll.numel(), reduction))
    if reduction != "none":
        loss.copy_(reduced(nll, reduction))


_nll_op = loss_op(
    "discretized_logistic_mixture_nll(Tensor params, Tensor x, int num_mixtures, str kind, float low, float high,"
    " int levels, str reduction, int need) -> (Tensor, Tensor)",
    outputs=_nll_outputs,
    launch=_nll_launch,
    reference=_ref.discretized_logistic_mixture_nll,
    kernel=_nll,
)


def _range(low, high, levels):
    levels = check_int("levels", levels, 2, 2**23)  # float32 tells the bins apart
    if not (isinstance(low, (int, float)) and isinstance(high, (int, float))):
        raise TypeError(f"low and high must be numbers, got {type(low).__name__} and {type(high).__name__}")
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"low must be less than high, and both finite, got {low} and {high}")
    return float(low), float(high), levels


def check_parametrization(parametrization):
    if parametrization not in ("openai", "tfp"):
        raise ValueError(f'parametrization must be "openai" or "tfp", got {parametrization!r}')


def check_temperature(temperature):
    """As a float; bool is refused."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a float, got {type(temperature).__name__}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be in [0, inf), got {temperature}")
    return float(temperature)


def _kind(mode, parametrization):
    if mode not in ("exact", "openai"):
        raise ValueError(f'mode must be "exact" or "openai", got {mode!r}')
    check_parametrization(parametrization)
    if mode == "openai" and parametrization == "tfp":
        raise ValueError('mode="openai" is the loss of parametrization="openai", got "tfp"')
    return "classic" if mode == "openai" else parametrization


def _data(x, logits):
    """x, which has no gradient, in the dtype of the computation; half types are computed in float32."""
    if x.requires_grad:
        raise ValueError("x must not require grad: it is data, and the loss has no gradient for it")
    if not x.dtype.is_floating_point:
        if x.dtype.is_complex or x.dtype is torch.bool:
            raise TypeError(f"x must hold integers or floating-point numbers, got {x.dtype}")
        x = x.to(torch.float32 if logits.dtype in HALVES else logits.dtype)
    if logits.dtype in HALVES:
        return logits.float(), x.float() if x.dtype in HALVES else x
    return logits, x


def discretized_logistic_mixture_nll(params, x, num_mixtures=10, *, mode="exact", parametrization="openai", low=-1.0,
                                     high=1.0, levels=256, reduction="mean"):
    r"""Negative log-likelihood of pixels under a mixture of discretized logistics (PixelCNN++), in nats.

    With ``x`` scaled to [-1, 1], ``h = 1 / (levels - 1)`` and ``i`` the reciprocal scale,
    ``P = sigma(p) - sigma(q)``, ``p, q = i (x - mean +- h)``; the lowest bin takes all that is below it
    (``sigma(q) = 0``), the highest all above (``sigma(p) = 1``). ``nll = -logsumexp_m(log_softmax(logits)_m + sum_c log
    P_mc)``, where the mean of green is ``mean + k0 red`` and that of blue ``mean + k1 red + k2 green``. No difference
    of near numbers is taken and there is no branch: exact to rounding, and so is the gradient, made in the same pass.

    Args:
        params: ``[b, n, ...]``, contiguous or channels_last (the gradient has the same format), n = 10 num_mixtures for
            three data channels, 3 num_mixtures for one.
        x: ``[b, 1 or 3, ...]``, the ``levels`` values from ``low`` to ``high``; params' dtype, or integers. What lies
            between two values counts as a bin of the same width around it.
        num_mixtures: M, at most 512.
        mode: ``"exact"``, or ``"openai"``: the classic loss, which takes the density in the middle of the bin where
            ``P <= 1e-5``: another function with another gradient.
        parametrization: ``"openai"``: M logits, then for each data channel M means, M log-scales (at least -7) and,
            with three channels, M coefficients (k0, k1, k2 in turn) under tanh. ``"tfp"``: for each component its
            logit, means, scales (``softplus + e^-7``) and coefficients (k0, k1, k2), as they are.
        low, high, levels: the grid of x, of 2 to 2^23 - 1 values. Bits per dimension: ``nll / (channels log 2)`` of a
            pixel.
        reduction: ``"none"`` ``[b, ...]`` a pixel; ``"image"`` ``[b]`` sums; ``"sum"``; ``"mean"`` over pixels.

    float32 and float64 have kernels; bfloat16 and float16 params, and all under autocast, are computed in float32.
    Besides its inputs, backward keeps the gradient only, and scales it in place. Higher derivatives, forward-mode AD
    and vmap are plain torch.

    A pixel with a NaN parameter, or with an ``x`` outside [low, high] or NaN, has nll NaN and gradient NaN, and no
    other has. A logit of ``-inf`` leaves its component out.

    Errors: ``ValueError`` for shapes, ranges, options and an x that requires grad; ``TypeError`` for dtypes.

    Source: Salimans et al., "PixelCNN++", ICLR 2017; ``tfp.distributions.PixelCNN``.

    >>> params = torch.zeros(2, 100, 8, 8, requires_grad=True)
    >>> nll = discretized_logistic_mixture_nll(params, torch.zeros(2, 3, 8, 8))
    """
    kind = _kind(mode, parametrization)
    check_tensor("params", params)
    check_tensor("x", x)
    check_floating("params", params)
    num_mixtures = check_int("num_mixtures", num_mixtures, 1, _MOST + 1)
    low, high, levels = _range(low, high, levels)
    check_reduction(reduction)
    params, x = _data(x, params)
    return _nll_op(params, x, num_mixtures, kind, low, high, levels, reduction, wanted(params))[0]


# samples of the mixture ----------------------------------------------------------------------------------------------

_sample = Kernel("logistic_mixture_sample")


def _sample_outputs(params, seeds, num_mixtures, kind, low, high, levels, channels, seed, temperature, out=None):
    _check_params(params, num_mixtures, channels)
    b, _, *rest = params.shape
    last = _last(params) and rest
    return params.new_empty((b, *rest, channels)).movedim(-1, 1) if last else params.new_empty((b, channels, *rest))


def _sample_launch(out, params, seeds, num_mixtures, kind, low, high, levels, channels, seed, temperature):
    params = _dense(params, _last(params))
    _sample((out,), (params, None if seeds is None else seeds.contiguous()),
            *_scalars(params, num_mixtures, channels, low, high, levels, kind),
            1 if seeds is None or not seeds.dim() else seeds.shape[0], seed & (2**64 - 1), temperature)


_sample_op = Op(
    "discretized_logistic_mixture_sample(Tensor params, Tensor? seeds, int num_mixtures, str kind, float low,"
    " float high, int levels, int channels, int seed, float temperature) -> Tensor",
    outputs=_sample_outputs,
    launch=_sample_launch,
    reference=_ref.discretized_logistic_mixture_sample,
    kernel=_sample,
    autocast=torch.float32,
)


def discretized_logistic_mixture_sample(params, num_mixtures=10, *, seed=None, temperature=1.0,
                                        parametrization="openai", low=-1.0, high=1.0, levels=256):
    r"""Pixels drawn from a mixture of discretized logistics: on the grid, reproducible on every device.

    A pixel draws its component, then its channels in turn: ``x_c = mean_c + temperature scale_c log(u / (1 - u))``,
    rounded to the nearest of the ``levels`` values *before* the next channel's mean is computed from it. That is the
    distribution of :func:`discretized_logistic_mixture_nll`; OpenAI's and TFP's samplers condition on unrounded values.

    Args:
        params, num_mixtures, parametrization, low, high, levels: as there.
        seed: ``None`` draws one from torch's default generator; an int counts the pixels of the whole tensor; an int64
            tensor ``[b]`` those of each image, so that an image does not depend on its batch. Pixel p takes Philox
            block p of stream 7: word 0 for the component, words 1 to 3 for the channels (docs/random-numbers.md).
        temperature: divides the logits and multiplies the scales. 0: the component of the largest logit, its means.

    Returns: ``[b, 3, ...]`` for 10 num_mixtures channels, ``[b, 1, ...]`` for 3 num_mixtures, in params' dtype and
    memory format, without gradients. A pixel with a NaN or +inf logit, without a finite one, or with a NaN in its
    component is NaN.

    Errors: ``ValueError`` for shapes, options, and a negative or infinite temperature; ``TypeError`` for dtypes.

    Source: Salimans et al., "PixelCNN++", ICLR 2017.

    >>> x = discretized_logistic_mixture_sample(torch.zeros(2, 100, 8, 8), seed=0)
    """
    check_tensor("params", params)
    check_floating("params", params)
    kind = _kind("exact", parametrization)
    num_mixtures = check_int("num_mixtures", num_mixtures, 1, _MOST + 1)
    low, high, levels = _range(low, high, levels)
    temperature = check_temperature(temperature)
    channels = 1 if params.dim() > 1 and params.shape[1] == 3 * num_mixtures else 3
    _check_params(params, num_mixtures, channels)
    seeds, seed = split_seed(seed, params.device, params.shape[0])
    dtype = params.dtype
    with torch.no_grad():
        params = params.detach()
        x = _sample_op(params.float() if dtype in HALVES else params, seeds, num_mixtures, kind, low, high, levels,
                       channels, seed, temperature)
        return x.to(dtype)
