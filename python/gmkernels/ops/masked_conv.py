"""Masked convolution: taps that the mask hides are skipped, not multiplied by zero."""

import contextlib

import torch
import torch.nn.functional as F

from .. import reference
from .._call import (
    DTYPE_CODE,
    HALVES,
    Kernel,
    Op,
    _copy_into,
    _is_any_autocast_enabled,
    check_floating,
    check_int,
    check_same_dtype,
    check_tensor,
    is_compiling,
)

_forward = Kernel("masked_conv2d", scratch=1)
_weight = Kernel("masked_conv2d_backward_weight", scratch=1)
_PLAIN, _GATE, _GATE_GRADIENT = 0, 1, 2  # csrc/masked_conv/masked_conv.h
_MAX_TAPS = 512
_ref = reference.masked_conv


# layout --------------------------------------------------------------------------------------------------------------


def _nhwc(t):
    """Stored as [b, h, w, c]? Where both formats are the same bytes (one channel, one pixel) the answer is no."""
    return not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _dense(t):
    return t if t is None or t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last) else t.contiguous()


def _like(x, channels, out=None):
    """An output of `channels` in the memory format of x."""
    b, _, h, w = x.shape
    if out is None:
        return torch.empty((b, channels, h, w), dtype=x.dtype, device=x.device,
                           memory_format=torch.channels_last if _nhwc(x) else torch.contiguous_format)
    if out.shape != (b, channels, h, w) or out.dtype is not x.dtype:
        raise ValueError(f"out must be {x.dtype} {(b, channels, h, w)}, got {out.dtype} {tuple(out.shape)}")
    return out


def _check(x, weight, bias, taps, gated):
    check_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must be [b, c_in, h, w], got {tuple(x.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must be [c_out, c_in, kh, kw], got {tuple(weight.shape)}")
    c_out, c_in, kh, kw = weight.shape
    if c_in != x.shape[1]:
        expected = f"[c_out, c_in, kh, kw] with c_in={x.shape[1]} as in x"
        raise ValueError(f"weight must be {expected}, got {tuple(weight.shape)}")
    if kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(f"weight must have odd kernel sizes (an even kernel has no centre), got {kh} x {kw}")
    if bias is not None and tuple(bias.shape) != (c_out,):
        raise ValueError(f"bias must be [c_out] with c_out={c_out} as in weight, got {tuple(bias.shape)}")
    if gated and c_out % 2:
        raise ValueError(f"gate needs an even number of output channels (tanh | sigmoid), got c_out={c_out}")
    if len(taps) > _MAX_TAPS:
        raise ValueError(f"weight must have at most {_MAX_TAPS} live taps, got {len(taps)} of a {kh} x {kw} kernel")
    check_same_dtype("x", x, weight=weight, bias=bias)


# ops -----------------------------------------------------------------------------------------------------------------


def _reaching(taps, kh, kw, dilation, h, w):
    """Taps that reach any pixel of the image: the others add zeros, and scratch must not grow with the dilation."""
    return [t for t in taps if abs(t // kw - kh // 2) * dilation[0] < h and abs(t % kw - kw // 2) * dilation[1] < w]


def _on_cuda(t):
    return t.is_cuda or Kernel.backend is not None


def _packed_size(c_in, c_out, taps, gate, dtype):
    """Elements of the packed weight (csrc/masked_conv/masked_conv.cu): [64 channels][64 bytes of k], float32 twice."""
    group = 64 // dtype.itemsize
    columns = c_out if gate == _PLAIN else -(-(c_out // 2) // group) * group * 2
    return -(-columns // 64) * 64 * -(-len(taps) * c_in // group) * group * (2 if dtype is torch.float32 else 1)


def _convolve(out, x, weight, bias, grad, taps, dilation, gate, transposed=False):
    x, weight, grad = _dense(x), weight.contiguous(), _dense(grad)
    bias = None if bias is None else bias.contiguous()
    c_out = weight.shape[1 if transposed else 0]
    b, c_in, h, w = x.shape
    taps = _reaching(taps, *weight.shape[2:], dilation, h, w)
    nhwc = [_nhwc(out), _nhwc(x), grad is not None and _nhwc(grad)]
    size = _packed_size(c_in, c_out, taps, gate, x.dtype) if _on_cuda(x) else 0
    workspace = x.new_empty(size) if size else None
    _forward((out, workspace), (x, weight, bias, grad), [b, c_in, c_out, h, w], taps, [*weight.shape[2:], *dilation],
             transposed, nhwc, gate, DTYPE_CODE[x.dtype], size)


def _outputs(x, weight, bias, taps, dilation, gated, out=None):
    _check(x, weight, bias, taps, gated)
    return _like(x, weight.shape[0] // (2 if gated else 1), out)


def _launch(out, x, weight, bias, taps, dilation, gated):
    _convolve(out, x, weight, bias, None, taps, dilation, _GATE if gated else _PLAIN)


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.taps, ctx.dilation, ctx.gated = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    if ctx.gated:
        grad = _gate_op(grad, x, weight, bias, ctx.taps, ctx.dilation)
    return (*_gradients(ctx.needs_input_grad, grad, x, weight, ctx.taps, ctx.dilation), None, None, None)


def _gradients(needed, grad, x, weight, taps, dilation):
    """For x, weight and bias, of what is needed, from the gradient of the ungated output."""
    dx = _input_op(grad, weight, taps, dilation) if needed[0] else None
    dw = db = None
    if needed[1] or needed[2]:
        dw, db = _weight_op(grad, x, *weight.shape[2:], taps, dilation)
    return dx, dw if needed[1] else None, db if needed[2] else None


_op = Op(
    "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, int[] taps, int[] dilation, bool gated) -> Tensor",
    outputs=_outputs,
    launch=_launch,
    reference=_ref.masked_conv2d,
    kernel=_forward,
    cuda_dtypes=HALVES,
    setup=_setup,
    backward=_backward,
)


def _input_setup(ctx, inputs, output):
    grad, weight, ctx.taps, ctx.dilation = inputs
    ctx.save_for_backward(grad, weight)


def _input_backward(ctx, gg):
    grad, weight = ctx.saved_tensors
    dgrad = _op(gg, weight, None, ctx.taps, ctx.dilation, False) if ctx.needs_input_grad[0] else None
    dweight = None
    if ctx.needs_input_grad[1]:
        dweight, _ = _weight_op(grad, gg, *weight.shape[2:], ctx.taps, ctx.dilation)
    return dgrad, dweight, None, None


_input_op = Op(
    "masked_conv2d_backward_input(Tensor grad, Tensor weight, int[] taps, int[] dilation) -> Tensor",
    outputs=lambda grad, weight, taps, dilation, out=None: _like(grad, weight.shape[1], out),
    launch=lambda out, grad, weight, taps, dilation: _convolve(
        out, grad, weight, None, None, taps, dilation, _PLAIN, transposed=True),
    reference=_ref.masked_conv2d_backward_input,
    kernel=_forward,
    cuda_dtypes=HALVES,
    setup=_input_setup,
    backward=_input_backward,
)


def _weight_outputs(grad, x, kh, kw, taps, dilation, out=None):
    c_out, c_in = grad.shape[1], x.shape[1]
    return x.new_empty((c_out, c_in, kh, kw)), x.new_empty((c_out,))


def _weight_launch(outs, grad, x, kh, kw, taps, dilation):
    grad, x = _dense(grad), _dense(x)
    b, c_in, h, w = x.shape
    taps = _reaching(taps, kh, kw, dilation, h, w)
    c_out, rows = grad.shape[1], len(taps) * c_in + 1
    workspace, groups = None, 1
    if _on_cuda(x):  # parts of the sum over pixels, together no larger than x and grad
        groups = max(1, min(64, -(-b * h * w // 512), (x.numel() + grad.numel()) // max(1, rows * c_out)))
        workspace = x.new_empty((groups, rows, c_out), dtype=torch.float32 if x.dtype in HALVES else None)
    _weight((*outs, workspace), (grad, x), [b, c_in, c_out, h, w], taps, [kh, kw, *dilation], groups,
            [_nhwc(grad), _nhwc(x)], DTYPE_CODE[x.dtype])


def _weight_setup(ctx, inputs, output):
    grad, x, _, _, ctx.taps, ctx.dilation = inputs
    ctx.save_for_backward(grad, x)


def _weight_backward(ctx, ggw, ggb):
    grad, x = ctx.saved_tensors
    dgrad = _op(x, ggw, ggb, ctx.taps, ctx.dilation, False) if ctx.needs_input_grad[0] else None
    dx = _input_op(grad, ggw, ctx.taps, ctx.dilation) if ctx.needs_input_grad[1] else None
    return dgrad, dx, None, None, None, None


_weight_op = Op(
    "masked_conv2d_backward_weight(Tensor grad, Tensor x, int kh, int kw, int[] taps, int[] dilation)"
    " -> (Tensor, Tensor)",
    outputs=_weight_outputs,
    launch=_weight_launch,
    reference=_ref.masked_conv2d_backward_weight,
    kernel=_weight,
    cuda_dtypes=HALVES,
    setup=_weight_setup,
    backward=_weight_backward,
)


def _gate_setup(ctx, inputs, output):
    grad, x, weight, bias, ctx.taps, ctx.dilation = inputs
    ctx.save_for_backward(grad, x, weight, bias)


def _gate_backward(ctx, gg):
    grad, x, weight, bias = ctx.saved_tensors
    a, b = _op(x, weight, bias, ctx.taps, ctx.dilation, False).chunk(2, 1)
    ga, gb = gg.chunk(2, 1)
    t, s = torch.tanh(a), torch.sigmoid(b)
    dt, ds = 1 - t * t, s * (1 - s)
    dgrad = ga * dt * s + gb * t * ds
    dz = torch.cat((grad * (gb * dt * ds - 2 * ga * t * dt * s), grad * (ga * dt * ds + gb * t * ds * (1 - 2 * s))), 1)
    return (dgrad, *_gradients(ctx.needs_input_grad[1:], dz, x, weight, ctx.taps, ctx.dilation), None, None)


_gate_op = Op(
    "masked_conv2d_gate_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int[] taps, int[] dilation)"
    " -> Tensor",
    outputs=lambda grad, x, weight, bias, taps, dilation, out=None: _like(x, weight.shape[0], out),
    launch=lambda out, grad, x, weight, bias, taps, dilation: _convolve(
        out, x, weight, bias, grad, taps, dilation, _GATE_GRADIENT),
    reference=_ref.masked_conv2d_gate_backward,
    kernel=_forward,
    cuda_dtypes=HALVES,
    setup=_gate_setup,
    backward=_gate_backward,
)


# the public function -------------------------------------------------------------------------------------------------


def _no_autocast(x):
    """The op follows its inputs; torch's own convolution inside it must not follow autocast instead."""
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _halves(x, weight, bias, mask_type, dilation, gated):
    """torch's convolutions of the two rectangles that a raster mask leaves: the rows above, the centre row's left."""
    kh, kw = weight.shape[2:]
    (dy, dx), (cy, cx) = dilation, (kh // 2, kw // 2)
    left, h, w = cx + (mask_type == "B"), *x.shape[2:]
    parts = []
    if cy:
        above = F.pad(x, (cx * dx, cx * dx, cy * dy, 0))[:, :, : h + (cy - 1) * dy]
        parts.append(F.conv2d(above, weight[:, :, :cy], bias, dilation=dilation))
    if left:
        row = F.pad(x, (cx * dx, 0))[..., : w + (left - 1) * dx]
        parts.append(F.conv2d(row, weight[:, :, cy : cy + 1, :left], None if cy else bias, dilation=dilation))
    z = parts[0] + parts[1] if len(parts) > 1 else parts[0]
    return _ref.tanh_sigmoid(z) if gated else z


def _pointwise(x, weight, bias):
    """A 1x1 convolution by torch, or None where it is none or torch refuses: then the checks below find the words.

    Checked first, it would cost 2 % of the convolution: Python is slow where that has just emptied the caches.
    """
    if not (isinstance(weight, torch.Tensor) and weight.shape[2:] == (1, 1) and isinstance(x, torch.Tensor)):
        return None
    if x.dim() != 4 or not x.is_floating_point() or not x.numel() or _is_any_autocast_enabled():
        return None
    try:
        return torch.conv2d(x, weight, bias)
    except (RuntimeError, TypeError):
        return None


def masked_conv2d(x, weight, bias=None, mask_type="B", *, gate=None, dilation=1, out=None):
    r"""Convolution in which an output pixel sees only pixels before it in raster order ("same" padding, stride 1).

    ``z[b, o, p] = bias[o] + sum_{t, i} weight[o, i, t] x[b, i, p + offset(t)]`` over the live taps ``t``: the rows
    above the centre and, in its row, those left of it; ``mask_type="B"`` adds the centre itself. Pixels outside
    the image are zero. Other taps are skipped: their values, NaN included, are never read, their gradients are exactly
    zero, and ``weight`` is never changed. With ``gate="tanh_sigmoid"`` the output is
    ``tanh(z[:, :c_out / 2]) * sigmoid(z[:, c_out / 2:])``, computed before ``z`` leaves the registers.

    Args:
        x: ``[b, c_in, h, w]``, contiguous or channels_last; the output has the same memory format.
        weight: ``[c_out, c_in, kh, kw]``, kh and kw odd, at most 512 live taps.
        bias: ``[c_out]`` or None.
        mask_type: ``"A"`` (first layer: without the centre) or ``"B"``.
        gate: None or ``"tanh_sigmoid"``.
        dilation: an int or a pair (down, across).
        out: a contiguous tensor to write into (no gradients then).

    Returns ``[b, c_out, h, w]``, or ``[b, c_out / 2, h, w]`` with a gate.

    float32 and float64 have kernels, on CUDA bfloat16 and float16 too (float32 sums). A 1x1 convolution without a gate,
    and bfloat16 and float16 on the CPU, are torch's own convolution of the live taps. Under autocast the op computes in
    the dtype of its inputs. The backward pass keeps x, weight and bias only; with a gate it computes z again.

    A NaN or infinite pixel reaches exactly the outputs that see it. Errors: ``ValueError`` for shapes, even kernels, an
    odd number of gated channels; ``TypeError`` for dtypes.

    Source: van den Oord et al., "Pixel Recurrent Neural Networks" (masks) and "Conditional Image Generation with
    PixelCNN Decoders" (gate), both 2016.

    >>> y = masked_conv2d(torch.randn(1, 3, 8, 8), torch.randn(16, 3, 7, 7), mask_type="A", gate="tanh_sigmoid")
    """
    if not is_compiling() and mask_type == "B" and gate is None and out is None and dilation == 1:
        result = _pointwise(x, weight, bias)
        if result is not None:
            return result
    check_tensor("x", x)
    check_tensor("weight", weight)
    if bias is not None:
        check_tensor("bias", bias)
    if mask_type not in ("A", "B"):
        raise ValueError(f'mask_type must be "A" or "B", got {mask_type!r}')
    if gate not in (None, "tanh_sigmoid"):
        raise ValueError(f'gate must be None or "tanh_sigmoid", got {gate!r}')
    if isinstance(dilation, (tuple, list)):
        if len(dilation) != 2:
            raise ValueError(f"dilation must be an int or a pair, got {dilation!r}")
        dilation = [check_int("dilation", d, 1, 2**31) for d in dilation]
    else:
        dilation = [check_int("dilation", dilation, 1, 2**31)] * 2
    gated = gate is not None
    taps = _ref.raster_taps(*weight.shape[2:], mask_type) if weight.dim() == 4 else []
    half, pointwise = x.dtype in HALVES and not _on_cuda(x), weight.shape[2:] == (1, 1) and not gated
    if (half or pointwise) and taps and x.numel() and weight.numel():
        _check(x, weight, bias, taps, gated)
        with _no_autocast(x):
            result = _halves(x, weight, bias, mask_type, dilation, gated) if half else F.conv2d(x, weight, bias)
        if out is None:
            return result
        _op._no_grad_into(out, (x, weight, bias))
        return _copy_into(out, result)
    return _op(x, weight, bias, taps, dilation, gated, out=out)
