"""The one affine step behind every sampler of a diffusion or flow model."""

import math

import torch

from .. import _C, _call, reference
from .._call import DTYPE_CODE, Kernel, Op, allocate, check_int, check_same_dtype, check_tensor, split_seed
from ..reference.diffusion import blend, guided, real_dtype, rows, term
from .random import STREAM_DIFFUSION_STEP, STREAM_KNOWN
from .random import _op as _philox
from .step_statistics import with_statistics

_kernel = Kernel("diffusion_step")
_plain = _C.diffusion_step_plain
_FLOATS = tuple(DTYPE_CODE)
_NO_NOISE, _DRAWN_NOISE, _GIVEN_NOISE = 0, 1, 2
_TENSORS = 13  # arguments of the op that come first
COEFFICIENTS = ("A", "B", "c0", "c1", "c2", "c3", "c4", "s")


# checks and allocation; they also run on fake tensors ---------------------------------------------------------------


def _check(x, model_output, coefficients, uncond, h1, h2, h3, variance, z, seeds, mask=None, known=None, index=None):
    if x.dtype not in DTYPE_CODE:
        raise TypeError(f"x must be one of {', '.join(map(str, DTYPE_CODE))}, got {x.dtype}")
    others = {"model_output": model_output, "uncond": uncond, "history[0]": h1, "history[1]": h2, "history[2]": h3,
              "variance": variance, "noise": z, "mask": mask, "known": known}
    check_same_dtype("x", x, **others)
    for name, t in others.items():
        if t is not None and t.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(t.shape)}")
    c = coefficients
    if c.dtype is not torch.float32 and not (c.dtype is torch.float64 and x.dtype is torch.float64):
        allowed = "float32 or float64" if x.dtype is torch.float64 else "float32"
        raise TypeError(f"coefficients must be {allowed} for x of {x.dtype}, got {c.dtype}")
    if index is not None:
        if c.dim() != 2 or c.shape[-1] != len(COEFFICIENTS):
            raise ValueError(f"coefficients must be [steps, 8] where step is a tensor, got {tuple(c.shape)}")
        if index.dtype is not torch.int64 or index.dim():
            raise TypeError(f"step must be an int or an int64 tensor [], got {index.dtype} {tuple(index.shape)}")
        return
    samples = x.shape[0] if x.dim() else 0
    if c.dim() not in (1, 2) or c.shape[-1] != len(COEFFICIENTS) or (c.dim() == 2 and c.shape[0] != samples):
        per_sample = f" or [{samples}, 8]" if x.dim() else ""
        raise ValueError(f"coefficients must be [8]{per_sample} ({', '.join(COEFFICIENTS)}), got {tuple(c.shape)}")


def _check_overlap(outs, ins, coefficients, seeds, index):
    """An output may be an input, element by element; anything else would be overwritten before it is read."""

    def span(t):
        begin = t.data_ptr()
        return begin, begin + t.numel() * t.element_size()

    def meet(a, b):
        (begin, end), (low, high) = span(a), span(b)
        return begin < high and low < end

    out, x0 = outs
    if x0 is not None and meet(out, x0):
        raise ValueError("out and x0_out must not share memory")
    for name, o in (("out", out), ("x0_out", x0)):
        if o is None:
            continue
        for t in ins:
            if t is not None and t.data_ptr() != o.data_ptr() and meet(o, t):
                raise ValueError(f"{name} overlaps a part of an input; it may be an input itself, or memory of its own")
        for other, t in (("coefficients", coefficients), ("seed", seeds), ("step", index)):
            if t is not None and meet(o, t):
                raise ValueError(f"{name} must not share memory with {other}")


def _outputs_x0(*args, out=None):
    _check(*args[:_TENSORS])
    out, x0 = out or (None, None)
    return _fitting("out", out, args[0]), _fitting("x0_out", x0, args[0])


def _outputs(*args, out=None):
    _check(*args[:_TENSORS])
    return _fitting("out", out, args[0])


def _fitting(name, out, x):
    if out is not None and (out.shape != x.shape or out.dtype is not x.dtype):
        raise ValueError(f"{name} must be {x.dtype} {tuple(x.shape)}, got {out.dtype} {tuple(out.shape)}")
    return allocate(out, x, x.shape)


# the kernel ----------------------------------------------------------------------------------------------------------


def _launch_x0(outs, x, model_output, coefficients, uncond, h1, h2, h3, variance, z, seeds, mask, known, index,
               guidance_scale, low, high, noise, seed, step, known_signal, known_noise, known_x0):
    # Bound to names: a temporary would die before the kernel runs.
    ins = tuple(None if t is None else t.contiguous()
                for t in (x, model_output, uncond, h1, h2, h3, variance, z, mask, known))
    x, model_output, uncond, h1, h2, h3, variance, z, mask, known = ins
    coefficients = coefficients.contiguous()
    seeds = None if seeds is None else seeds.contiguous()
    _check_overlap(outs, ins, coefficients, seeds, index)
    if index is not None and index.is_cpu and not 0 <= index.item() < coefficients.shape[0]:
        raise ValueError(f"step must be in [0, {coefficients.shape[0]}), the rows of coefficients, got {index.item()}")
    kind = _GIVEN_NOISE if z is not None else _DRAWN_NOISE if noise else _NO_NOISE
    _kernel(
        outs, (x, model_output, coefficients, uncond, h1, h2, h3, variance, z, seeds, mask, known, index),
        x.numel(), coefficients.shape[0] if coefficients.dim() == 2 and index is None else 1,
        seeds.shape[0] if seeds is not None and seeds.dim() else 1, seed & (2**64 - 1), step,
        guidance_scale, low, high, kind, known_signal, known_noise, known_x0,
        0 if index is None else coefficients.shape[0], DTYPE_CODE[x.dtype], coefficients.dtype is torch.float64,
    )


def _launch(out, *args):
    _launch_x0((out, None), *args)


# gradients: plain torch, so they can be differentiated again. The noise is drawn anew, never stored. ----------------


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.scalars = inputs[_TENSORS:]


def _backward_x0(ctx, grad, grad_x0):
    x, model_output, coefficients, uncond, h1, h2, h3, variance, z, seeds, mask, known, index = ctx.saved_tensors
    guidance_scale, low, high, noise, seed, step, known_signal, known_noise, known_x0 = ctx.scalars
    need = ctx.needs_input_grad
    real = real_dtype(x)
    if index is not None:  # neither coefficients nor variance have a gradient then
        coefficients = coefficients.index_select(0, index.reshape(1))[0]
    A, B, c0, c1, c2, c3, c4, s = rows(coefficients, x)
    xr, g = x.to(real), grad.to(real)
    m = guided(model_output.to(real), None if uncond is None else uncond.to(real), guidance_scale)
    raw = term(A, xr) + term(B, m)
    grads = [None] * len(need)
    w = None if mask is None else mask.to(real)

    def of_unknown(g):
        """What is left of a gradient where something is known; the rest is that of `known`."""
        if need[11]:
            grads[11] = (w * known_signal * g).to(known.dtype)
        return torch.where(w == 1, 0.0, (1 - w) * g)

    if w is not None and not known_x0:
        g = of_unknown(g)
    g_raw = c0 * g if grad_x0 is None else c0 * g + grad_x0.to(real)
    if w is not None and known_x0:
        g_raw = of_unknown(g_raw)
    g_raw = torch.where((raw >= low) & (raw <= high), g_raw, 0.0)  # as torch.clamp
    g_m = B * g_raw

    def drawn(stream):
        # The dispatcher has no way to call an op without a tensor under transforms.
        of = x.new_full((), seed, dtype=torch.int64) if seeds is None else seeds
        return _philox(of, tuple(x.shape), 0, step, stream, True, real, x.device)

    def give(i, t, like):
        if need[i]:
            grads[i] = t.to(like.dtype)

    give(0, A * g_raw + c1 * g, x)
    give(1, g_m if uncond is None else guidance_scale * g_m, model_output)
    if uncond is not None:
        give(3, (1.0 - guidance_scale) * g_m, uncond)
    for i, c, h in ((4, c2, h1), (5, c3, h2), (6, c4, h3)):
        if h is not None:
            give(i, c * g, h)

    std = None if variance is None else variance.to(real).sqrt()
    zr = None
    if z is not None:
        zr = z.to(real)
    elif noise and (need[2] or (variance is not None and need[7])):
        zr = drawn(STREAM_DIFFUSION_STEP)
    if zr is not None:
        if variance is not None and need[7]:
            grads[7] = (term(s, g * zr) * 0.5 / std).to(variance.dtype)
        if z is not None:
            give(8, s * g if std is None else s * std * g, z)
    if need[2]:
        x0 = torch.clamp(raw, low, high)
        if w is not None and known_x0:
            k = known_signal * known.to(real)
            if known_noise:
                k = k + known_noise * drawn(STREAM_KNOWN)
            x0 = blend(w, k, x0)
        factors = [(g_raw, xr), (g_raw, m), (g, x0), (g, xr)]
        factors += [(g, None if h is None else h.to(real)) for h in (h1, h2, h3)]
        factors.append((g, zr if zr is None or std is None else std * zr))
        axes = tuple(range(1 if coefficients.dim() == 2 else 0, x.dim()))
        sums = [_total(c, a, t, axes) for c, (a, t) in zip((A, B, c0, c1, c2, c3, c4, s), factors, strict=True)]
        grads[2] = torch.stack(sums, -1).to(coefficients.dtype)
    return tuple(grads)


def _total(c, a, t, axes):
    """The sum of a * t, the derivative by coefficient c; in float64, for it has as many terms as the tensor."""
    product = torch.zeros_like(a) if t is None else a * torch.where((c == 0) & ~torch.isfinite(t), 0.0, t)
    return product.double().sum(axes) if axes else product.double()


def _backward(ctx, grad):
    return _backward_x0(ctx, grad, None)


_ARGUMENTS = (
    "(Tensor x, Tensor model_output, Tensor coefficients, Tensor? uncond, Tensor? h1, Tensor? h2, Tensor? h3,"
    " Tensor? variance, Tensor? z, Tensor? seeds, Tensor? mask, Tensor? known, Tensor? index, float guidance_scale,"
    " float low, float high, bool noise, SymInt seed, SymInt step, float known_signal, float known_noise,"
    " bool known_x0) -> "
)


def _reference(*args):
    """The op's arguments in the order of the reference, which a person may call."""
    mask, known, index = args[10:_TENSORS]
    signal, noise, of_x0 = args[-3:]
    return reference.diffusion.diffusion_step(*args[:10], *args[_TENSORS:-3], mask=mask, known=known, index=index,
                                              known_signal=signal, known_noise=noise, known_x0=of_x0)


_op = Op("diffusion_step" + _ARGUMENTS + "Tensor", outputs=_outputs, launch=_launch,
         reference=lambda *args: _reference(*args)[0], kernel=_kernel, dtypes=_FLOATS,
         setup=_setup, backward=_backward)
_op_x0 = Op("diffusion_step_x0" + _ARGUMENTS + "(Tensor, Tensor)", outputs=_outputs_x0, launch=_launch_x0,
            reference=_reference, kernel=_kernel, dtypes=_FLOATS, setup=_setup,
            backward=_backward_x0)


# the public function -------------------------------------------------------------------------------------------------


def diffusion_step(x, model_output, coefficients, *, uncond=None, guidance_scale=1.0, history=(), variance=None,
                   clip=None, noise=False, seed=None, step=0, return_x0=False, out=None, x0_out=None,
                   guidance_rescale=0.0, dynamic_threshold=None, mask=None, known=None, known_scale=(1.0, 0.0),
                   known_x0=False):
    r"""One step of any sampler that is affine in its inputs, in one pass over memory.

    .. math::
        m &= \text{uncond} + \text{guidance\_scale} (\text{model\_output} - \text{uncond}) \\
        x_0 &= \mathrm{clip}(A x + B m) \\
        \text{out} &= c_0 x_0 + c_1 x + c_2 h_1 + c_3 h_2 + c_4 h_3 + s \sqrt{\text{variance}}\, z

    Without ``uncond``, ``m`` is ``model_output``; without ``variance`` its factor is 1. Half types are computed in
    float32 and rounded once. A stream whose coefficient is exactly 0 adds exactly 0, whatever it holds: a history that
    is not filled yet may be NaN, and ``s = 0`` draws nothing. NaN passes through the clip, infinity is clipped.

    Args:
        x: [b, ...] (or any shape, with coefficients [8]), float32, float64, bfloat16 or float16, any strides.
        model_output: of x's shape and dtype, as are ``uncond``, ``history``, ``variance`` and a ``noise`` tensor.
        coefficients: ``(A, B, c0, c1, c2, c3, c4, s)``, [8] or one row per sample [b, 8], float32; for float64 x also
            float64. ``docs/diffusion.md`` lists those of the known samplers; :mod:`gmkernels.ops.diffusion` makes some.
        uncond: the model's output without the condition (classifier-free guidance).
        guidance_scale: a float.
        history: up to three tensors ``(h1, h2, h3)``, as earlier x0 of a multistep solver; None for one that is absent.
        variance: per element, not negative (learned variances).
        clip: None, a positive float ``c`` for [-c, c], or a pair ``(low, high)``.
        noise: True draws ``z = philox_normal(x.shape, seed, step, stream=2)``; a tensor is taken as z; False: no noise.
        seed: as in :func:`philox_normal`: None draws one, an int counts over the whole tensor, an int64 tensor [b]
            seeds each sample on its own. Only with ``noise=True``.
        step: counter word 2, in ``[0, 2**32)``: another one for every step that shares a seed. Or an int64 tensor []:
            then coefficients are [steps, 8], and it is the row as well, read where it is: with a seed tensor [] nothing
            of a loop comes from the host, so that one CUDA graph holds it. Neither coefficients nor variance may ask
            for a gradient then. A step outside the rows is an error on the CPU, and NaN on a GPU.
        return_x0: return ``(out, x0)``.
        out, x0_out: contiguous tensors to write into, without gradients. Each may be any of the inputs (in place), but
            not a part of one, and not each other. ``x0_out`` is written also if x0 is not returned.
        guidance_rescale: phi in [0, 1], only with ``uncond``: m is multiplied by ``phi std(model_output) / std(m) + 1 -
            phi``, the standard deviations over each sample; both in one pass before the step.
        dynamic_threshold: ``(q, largest)``, instead of a clip: ``x_0 = clip(y, -s, s) / s`` with ``y = A x + B m`` and
            s the quantile q of ``|y|`` over each sample, at least 1 and at most ``largest``. The quantile is exact, of
            samples of any size; one pass before the step.
        mask: of x's shape; 1 where ``known`` holds, 0 where not, between them for a mixture. bool, or x's dtype (then
            nothing is copied).
        known: of x's shape and dtype: what is known of the data (inpainting).
        known_scale: ``(a, b)``: where the mask is 1, ``out = a known + b z'`` with ``z' = philox_normal(x.shape, seed,
            step, stream=10)``: known data at the noise level of the next step (RePaint).
        known_x0: True puts it in the place of x_0 instead, from which the step goes on (DDNM, replacement).

    Gradients flow to every floating tensor, the coefficients included; the noise is drawn again for the backward pass,
    never stored. Where the clip cuts, the gradient is 0, as that of :func:`torch.clamp`. Under autocast the op follows
    its inputs.

    Errors: ``TypeError`` for wrong types and dtypes, ``ValueError`` for wrong shapes, devices, ranges and overlaps.

    Source: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Lu et al. 2022 (DPM-Solver++), Karras et al. 2022;
    Saharia et al. 2022 (dynamic thresholding), Lin et al. 2024 (rescale).

    >>> x, eps = torch.ones(2, 3), torch.zeros(2, 3)
    >>> diffusion_step(x, eps, torch.tensor([2., 0, 1, 0, 0, 0, 0, 0.5]), noise=True, seed=0, clip=1.0).shape
    torch.Size([2, 3])
    """
    if guidance_rescale or dynamic_threshold is not None:
        coefficients, clip = _by_sample(x, model_output, coefficients, uncond, guidance_scale, clip, guidance_rescale,
                                        dynamic_threshold, step)
    if mask is None and known is None and type(step) is int and _call.plain_eager():
        if seed is None and noise is True:
            seed = split_seed(None, None)[1]
        result = _plain(x, model_output, coefficients, uncond, guidance_scale, history, variance, clip, noise, seed,
                        step, return_x0, out, x0_out, torch.is_grad_enabled())
        if result is not None:
            return result
    return _general(x, model_output, coefficients, uncond, guidance_scale, history, variance, clip, noise, seed, step,
                    return_x0, out, x0_out, mask, known, known_scale, known_x0)


def _by_sample(x, model_output, coefficients, uncond, guidance_scale, clip, rescale, threshold, step):
    """(coefficients, clip) with what depends on whole samples put into the coefficients."""
    for name, t in (("x", x), ("model_output", model_output), ("coefficients", coefficients), ("uncond", uncond)):
        if t is not None or name != "uncond":
            check_tensor(name, t)
    if not isinstance(guidance_scale, (int, float)):
        raise TypeError(f"guidance_scale must be a float, got {type(guidance_scale).__name__}")
    what = "guidance_rescale" if rescale else "dynamic_threshold"
    if isinstance(step, torch.Tensor):
        raise TypeError(f"step must be an int with {what}, which is of the row, got a tensor")
    _check(x, model_output, coefficients, uncond, None, None, None, None, None, None)
    if not x.dim():
        raise ValueError(f"x must be [b, ...] for {what}, which is of each sample, got ()")
    if isinstance(rescale, bool) or not isinstance(rescale, (int, float)):
        raise TypeError(f"guidance_rescale must be a float, got {type(rescale).__name__}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale must be in [0, 1], got {rescale}")
    if rescale and uncond is None:
        raise ValueError("uncond must be given for guidance_rescale, got None")
    if threshold is not None:
        numbers = isinstance(threshold, (tuple, list)) and all(isinstance(v, (int, float)) for v in threshold)
        if not numbers or len(threshold) != 2:
            raise TypeError(f"dynamic_threshold must be (q, largest), got {threshold!r}")
        if not (0 <= threshold[0] <= 1 and threshold[1] > 0):
            raise ValueError(f"dynamic_threshold must be (q in [0, 1], largest above 0), got {threshold!r}")
        if clip is not None:
            raise ValueError(f"clip must be None with dynamic_threshold, got {clip!r}")
        clip, threshold = 1.0, (float(threshold[0]), float(threshold[1]))
    rows = with_statistics(coefficients, x, model_output, uncond, float(guidance_scale), float(rescale), threshold)
    return rows, clip


def _general(x, model_output, coefficients, uncond, guidance_scale, history, variance, clip, noise, seed, step,
             return_x0, out, x0_out, mask, known, known_scale, known_x0):
    tensors = {"x": x, "model_output": model_output, "coefficients": coefficients}
    optional = {"uncond": uncond, "variance": variance, "out": out, "x0_out": x0_out}
    for name, t in (*tensors.items(), *((n, t) for n, t in optional.items() if t is not None)):
        check_tensor(name, t)
    if isinstance(history, torch.Tensor) or not isinstance(history, (tuple, list)):
        raise TypeError(f"history must be a tuple of tensors, got {type(history).__name__}")
    if len(history) > 3:
        raise ValueError(f"history must have at most 3 tensors, got {len(history)}")
    for i, h in enumerate(history):
        if h is not None:
            check_tensor(f"history[{i}]", h)
    h1, h2, h3 = (*history, None, None, None)[:3]
    if not isinstance(guidance_scale, (int, float)):
        raise TypeError(f"guidance_scale must be a float, got {type(guidance_scale).__name__}")
    low, high = _clip_range(clip)
    index = None
    if isinstance(step, torch.Tensor):
        index, step = step, 0
        for name, t in (("coefficients", coefficients), ("variance", variance)):
            if t is not None and t.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} must not require a gradient where step is a tensor")
    step = check_int("step", step, 0, 2**32)
    z = seeds = None
    mask, known, signal, known_noise = _known(x, mask, known, known_scale, known_x0)
    if isinstance(noise, torch.Tensor):
        z, noise = noise, False
        if seed is not None and not known_noise:
            raise ValueError("seed must be None where noise is a tensor")
    elif not isinstance(noise, bool):
        raise TypeError(f"noise must be a bool or a tensor, got {type(noise).__name__}")
    if noise or known_noise:
        seeds, seed = split_seed(seed, x.device, x.shape[0] if x.dim() else None)
    else:
        seed = 0
    args = (x, model_output, coefficients, uncond, h1, h2, h3, variance, z, seeds, mask, known, index,
            float(guidance_scale), low, high, noise, seed, step, signal, known_noise, bool(known_x0))
    if not return_x0 and x0_out is None:
        return _op(*args, out=out)
    if out is None and x0_out is None:
        return _op_x0(*args)
    outs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) if o is None else o for o in (out, x0_out))
    outs = _op_x0(*args, out=outs)
    return outs if return_x0 else outs[0]


def _known(x, mask, known, scale, of_x0):
    """(mask in x's dtype, known, a, b)."""
    if (mask is None) != (known is None):
        raise ValueError(f"mask and known must be given together, got {'known' if mask is None else 'mask'} alone")
    if mask is None:
        return None, None, 1.0, 0.0
    check_tensor("mask", mask)
    check_tensor("known", known)
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("mask must not require a gradient: diffusion_step has none for it")
    if not isinstance(scale, (tuple, list)) or len(scale) != 2 or not all(isinstance(v, (int, float)) for v in scale):
        raise TypeError(f"known_scale must be (a, b), two floats, got {scale!r}")
    if not isinstance(of_x0, bool):
        raise TypeError(f"known_x0 must be a bool, got {type(of_x0).__name__}")
    return mask.to(x.dtype) if mask.dtype is torch.bool else mask, known, float(scale[0]), float(scale[1])


def _clip_range(clip):
    if clip is None:
        return -math.inf, math.inf
    pair = clip if isinstance(clip, (tuple, list)) else (None, clip)
    if len(pair) != 2 or not all(v is None or isinstance(v, (int, float)) for v in pair):
        raise TypeError(f"clip must be None, a positive float or a pair (low, high), got {clip!r}")
    low, high = pair if pair[0] is not None else (-pair[1], pair[1])
    if not low < high:
        raise ValueError(f"clip must be a positive float or a pair (low, high) with low < high, got {clip!r}")
    return float(low), float(high)
