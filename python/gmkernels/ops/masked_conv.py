"""Masked convolution: taps that the mask hides are skipped, not multiplied by zero."""

import contextlib

import torch
import torch.nn.functional as F

from .. import _C, reference
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
    threads,
)
from .._packed import Packed, keeping, packed
from .masked_conv_masks import check_mask, live_taps, ordered_weight

_forward = Kernel("masked_conv2d", scratch=1)
_gate = Kernel("gate_backward")
_weight = Kernel("masked_conv2d_backward_weight", scratch=1)
_PLAIN, _GATE, _GATE_GRADIENT = 0, 1, 2  # csrc/masked_conv/masked_conv.h
_DTYPES = tuple(DTYPE_CODE)
_GATES = (None, "tanh_sigmoid", "identity_sigmoid")
MAX_TAPS = 512
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


def _check(x, weight, bias, cond, residual, taps, gate):
    check_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must be [b, c_in, h, w], got {tuple(x.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must be [c_out, c_in, kh, kw], got {tuple(weight.shape)}")
    c_out, c_in, kh, kw = weight.shape
    b, _, h, w = x.shape
    if c_in != x.shape[1]:
        expected = f"[c_out, c_in, kh, kw] with c_in={x.shape[1]} as in x"
        raise ValueError(f"weight must be {expected}, got {tuple(weight.shape)}")
    if kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(f"weight must have odd kernel sizes (an even kernel has no centre), got {kh} x {kw}")
    if bias is not None and tuple(bias.shape) != (c_out,):
        raise ValueError(f"bias must be [c_out] with c_out={c_out} as in weight, got {tuple(bias.shape)}")
    if gate is not None and c_out % 2:
        raise ValueError(f"gate needs an even number of output channels (two halves), got c_out={c_out}")
    if cond is not None and tuple(cond.shape) not in ((b, c_out), (b, c_out, h, w)):
        expected = f"[b, c_out] = {(b, c_out)} or [b, c_out, h, w] = {(b, c_out, h, w)}"
        raise ValueError(f"cond must be {expected}, got {tuple(cond.shape)}")
    if residual is not None and tuple(residual.shape) != (b, c_out // (2 if gate else 1), h, w):
        expected = f"the shape of the output, {(b, c_out // (2 if gate else 1), h, w)}"
        raise ValueError(f"residual must have {expected}, got {tuple(residual.shape)}")
    if len(taps) > MAX_TAPS:
        raise ValueError(f"weight must have at most {MAX_TAPS} live taps, got {len(taps)} of a {kh} x {kw} kernel")
    check_same_dtype("x", x, weight=weight, bias=bias, cond=cond, residual=residual)


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


def _convolve(out, x, weight, bias, taps, dilation, gate=None, *, z=None, cond=None, residual=None, grad=None,
              transposed=False):
    """z: filled with what enters the gate. With `grad`: the gradient of the gate."""
    x, weight, cond, residual, grad = _dense(x), weight.contiguous(), _dense(cond), _dense(residual), _dense(grad)
    bias = None if bias is None else bias.contiguous()
    c_out = weight.shape[1 if transposed else 0]
    b, c_in, h, w = x.shape
    taps = _reaching(taps, *weight.shape[2:], dilation, h, w)
    nhwc = [t is not None and t.dim() == 4 and _nhwc(t) for t in (out, x, grad, cond, residual)]
    kind = _PLAIN if gate is None else _GATE if grad is None else _GATE_GRADIENT
    sizes, kernel = [b, c_in, c_out, h, w], [*weight.shape[2:], *dilation]
    kept, workspace, size, dtype = Packed(), None, 0, DTYPE_CODE[x.dtype]
    if _on_cuda(x):
        size = _packed_size(c_in, c_out, taps, kind, x.dtype)
        workspace = x.new_empty(size) if size else None
    elif keeping():
        of = (sizes, taps, kernel, transposed, kind, dtype, threads())
        kept = packed(("masked_conv2d", _C.isa(), repr(of)), (weight, bias))
        workspace = kept.buffer
        if workspace is None:
            workspace = torch.empty(_C.masked_conv2d_packed_size(*of), dtype=torch.uint8)
        size = workspace.numel()
    _forward((out, z, workspace), (x, weight, bias, cond, residual, grad), sizes, taps, kernel, transposed, nhwc, kind,
             gate == "identity_sigmoid", cond is not None and cond.dim() == 4, dtype, size,
             kept.buffer is not None)
    kept.buffer = workspace


def _outputs(x, weight, bias, cond, residual, taps, dilation, gate, keep, out=None):
    _check(x, weight, bias, cond, residual, taps, gate)
    out = _like(x, weight.shape[0] // (2 if gate else 1), None if out is None else out[0])
    return out, _like(out, weight.shape[0]) if keep else x.new_empty((0,))


def _launch(outs, x, weight, bias, cond, residual, taps, dilation, gate, keep):
    _convolve(outs[0], x, weight, bias, taps, dilation, gate, z=outs[1] if keep else None, cond=cond,
              residual=residual)


def _setup(ctx, inputs, output):
    x, weight, bias, cond, _, ctx.taps, ctx.dilation, ctx.gate, ctx.keep = inputs
    ctx.set_materialize_grads(False)
    ctx.per_image = cond is not None and cond.dim() == 2
    if ctx.gate is None or ctx.keep:  # the gradients for bias and cond are those of z, whatever their values
        bias = cond = None
    ctx.save_for_backward(x, weight, bias, cond, output[1] if ctx.keep else None)


def _backward(ctx, grad, grad_z):
    x, weight, bias, cond, z = ctx.saved_tensors
    needed = ctx.needs_input_grad
    nothing = (None,) * 9
    grad_z = grad_z if ctx.keep else None  # else of the empty tensor
    if grad is None and grad_z is None:
        return nothing
    residual = grad if needed[4] else None
    dx = dw = db = None
    if not any(needed[:4]):
        return (*nothing[:4], residual, *nothing[5:])
    if grad is not None and ctx.gate is not None:
        if ctx.keep:
            grad = _gate_kept_op(grad, z, ctx.gate)
        else:
            grad = _gate_op(grad, x, weight, bias, cond, ctx.taps, ctx.dilation, ctx.gate)
    if grad_z is not None:  # only a second derivative sees z
        grad = grad_z if grad is None else grad + grad_z
    if any(needed[:3]):
        dx, dw, db = _gradients(needed, grad, x, weight, ctx.taps, ctx.dilation)
    dcond = (grad.sum((2, 3)) if ctx.per_image else grad) if needed[3] else None
    return dx, dw, db, dcond, residual, *nothing[5:]


def _gradients(needed, grad, x, weight, taps, dilation):
    """For x, weight and bias, of what is needed, from the gradient of the ungated output."""
    dx = _input_op(grad, weight, taps, dilation) if needed[0] else None
    dw = db = None
    if needed[1] or needed[2]:
        dw, db = _weight_op(grad, x, *weight.shape[2:], taps, dilation)
    return dx, dw if needed[1] else None, db if needed[2] else None


_op = Op(
    "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? cond, Tensor? residual, int[] taps, int[] dilation,"
    " str? gate, bool keep) -> (Tensor, Tensor)",
    outputs=_outputs,
    launch=_launch,
    reference=_ref.masked_conv2d_and_z,
    kernel=_forward,
    dtypes=_DTYPES,
    setup=_setup,
    backward=_backward,
)


def _plain(x, weight, bias, taps, dilation, cond=None):
    return _op(x, weight, bias, cond, None, taps, dilation, None, False)[0]


def _input_setup(ctx, inputs, output):
    grad, weight, ctx.taps, ctx.dilation = inputs
    ctx.save_for_backward(grad, weight)


def _input_backward(ctx, gg):
    grad, weight = ctx.saved_tensors
    dgrad = _plain(gg, weight, None, ctx.taps, ctx.dilation) if ctx.needs_input_grad[0] else None
    dweight = None
    if ctx.needs_input_grad[1]:
        dweight, _ = _weight_op(grad, gg, *weight.shape[2:], ctx.taps, ctx.dilation)
    return dgrad, dweight, None, None


_input_op = Op(
    "masked_conv2d_backward_input(Tensor grad, Tensor weight, int[] taps, int[] dilation) -> Tensor",
    outputs=lambda grad, weight, taps, dilation, out=None: _like(grad, weight.shape[1], out),
    launch=lambda out, grad, weight, taps, dilation: _convolve(
        out, grad, weight, None, taps, dilation, transposed=True),
    reference=_ref.masked_conv2d_backward_input,
    kernel=_forward,
    dtypes=_DTYPES,
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
    dgrad = _plain(x, ggw, ggb, ctx.taps, ctx.dilation) if ctx.needs_input_grad[0] else None
    dx = _input_op(grad, ggw, ctx.taps, ctx.dilation) if ctx.needs_input_grad[1] else None
    return dgrad, dx, None, None, None, None


_weight_op = Op(
    "masked_conv2d_backward_weight(Tensor grad, Tensor x, int kh, int kw, int[] taps, int[] dilation)"
    " -> (Tensor, Tensor)",
    outputs=_weight_outputs,
    launch=_weight_launch,
    reference=_ref.masked_conv2d_backward_weight,
    kernel=_weight,
    dtypes=_DTYPES,
    setup=_weight_setup,
    backward=_weight_backward,
)


def _of_gate(grad, gg, a, b, gate):
    """The derivatives of <gg, gate gradient> by grad and by z = (a, b)."""
    ga, gb = gg.chunk(2, 1)
    s = torch.sigmoid(b)
    ds, dds = s * (1 - s), s * (1 - s) * (1 - 2 * s)
    if gate == "tanh_sigmoid":
        f = torch.tanh(a)
        df = 1 - f * f
        mixed = gb * df * ds
        dz = torch.cat((grad * (mixed - 2 * ga * f * df * s), grad * (ga * df * ds + gb * f * dds)), 1)
    else:
        f, df = a, 1
        dz = torch.cat((grad * gb * ds, grad * (ga * ds + gb * a * dds)), 1)
    return ga * df * s + gb * f * ds, dz


def _gate_kept_launch(out, grad, z, gate):
    last = _nhwc(z)
    grad = grad.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    b, c, h, w = grad.shape
    rows, n = (b * h * w, c) if last else (b, c * h * w)
    _gate((out,), (grad, _dense(z)), rows, n, gate == "identity_sigmoid", DTYPE_CODE[z.dtype])


def _gate_kept_setup(ctx, inputs, output):
    grad, z, ctx.gate = inputs
    ctx.save_for_backward(grad, z)


def _gate_kept_backward(ctx, gg):
    grad, z = ctx.saved_tensors
    return (*_of_gate(grad, gg, *z.chunk(2, 1), ctx.gate), None)


_gate_kept_op = Op(
    "gate_backward(Tensor grad, Tensor z, str gate) -> Tensor",
    outputs=lambda grad, z, gate, out=None: _like(z, z.shape[1], out),
    launch=_gate_kept_launch,
    reference=_ref.gate_backward,
    kernel=_gate,
    dtypes=_DTYPES,
    setup=_gate_kept_setup,
    backward=_gate_kept_backward,
)


def _gate_setup(ctx, inputs, output):
    grad, x, weight, bias, cond, ctx.taps, ctx.dilation, ctx.gate = inputs
    ctx.save_for_backward(grad, x, weight, bias, cond)


def _gate_backward(ctx, gg):
    grad, x, weight, bias, cond = ctx.saved_tensors
    needed = ctx.needs_input_grad
    a, b = _plain(x, weight, bias, ctx.taps, ctx.dilation, cond).chunk(2, 1)
    dgrad, dz = _of_gate(grad, gg, a, b, ctx.gate)
    dcond = (dz if cond.dim() == 4 else dz.sum((2, 3))) if needed[4] else None
    gradients = _gradients(needed[1:], dz, x, weight, ctx.taps, ctx.dilation)
    return (dgrad, *gradients, dcond, None, None, None)


_gate_op = Op(
    "masked_conv2d_gate_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? cond, int[] taps,"
    " int[] dilation, str gate) -> Tensor",
    outputs=lambda grad, x, weight, bias, cond, taps, dilation, gate, out=None: _like(x, weight.shape[0], out),
    launch=lambda out, grad, x, weight, bias, cond, taps, dilation, gate: _convolve(
        out, x, weight, bias, taps, dilation, gate, cond=cond, grad=grad),
    reference=_ref.masked_conv2d_gate_backward,
    kernel=_forward,
    dtypes=_DTYPES,
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


def masked_conv2d(x, weight, bias=None, mask_type="B", *, mask_order="raster", data_channels=1, gate=None, cond=None,
                  residual=None, dilation=1, recompute=False, out=None):
    r"""Convolution in which an output pixel sees only pixels before it in some order ("same" padding, stride 1).

    ``z[b, o, p] = bias[o] + cond[b, o, p] + sum_{t, i} weight[o, i, t] x[b, i, p + offset(t)]`` over the live taps
    ``t``. Pixels outside the image are zero. Other taps are skipped: their values, NaN included, are never read, their
    gradients are exactly zero, and ``weight`` is never changed. The output is ``z``, or with a gate, computed before
    ``z`` leaves the registers, ``f(z[:, :c_out / 2]) * sigmoid(z[:, c_out / 2:])``; plus ``residual``.

    Args:
        x: ``[b, c_in, h, w]``, contiguous or channels_last; the output has the same memory format.
        weight: ``[c_out, c_in, kh, kw]``, kh and kw odd, at most 512 live taps.
        bias: ``[c_out]`` or None.
        mask_type: ``"A"`` (first layer: without the centre), ``"B"``, or a boolean ``[kh, kw]``, True where a tap is
            used, read on the host.
        mask_order: ``"raster"``: the rows above the centre, and its row left of it. ``"vertical"``: the rows above, and
            with "B" the whole own row. ``"horizontal"``: its row left of the centre. "B" adds the centre.
        data_channels: 3 orders the colours of a pixel: channel c of C belongs to data channel
            ``c * data_channels // C`` (with a gate, of the C of a half; C need not be divisible), and the centre tap
            sees, with "A", data channels before the output's, with "B" its own too. Nothing changes for "vertical".
        gate: None, ``"tanh_sigmoid"`` (f = tanh) or ``"identity_sigmoid"`` (f(z) = z).
        cond: what conditions z: a vector for each image, ``[b, c_out]``, or a map, ``[b, c_out, h, w]``, or None.
        residual: added to the output, of its shape, or None.
        dilation: an int or a pair (down, across).
        recompute: with a gate, compute z again in backward instead of keeping it: a third more time, a third of the
            memory.
        out: a contiguous tensor to write into (no gradients then).

    Returns ``[b, c_out, h, w]``, or ``[b, c_out / 2, h, w]`` with a gate.

    float32, float64, bfloat16 and float16 have kernels; sums of the half types are float32, and one rounding at the
    end. Sums in float32 on a CPU are made for pairs of pixels from 8 input channels on: fewer products, and two to
    three times the rounding of a plain sum, within 16 * 2^-24 of the sum of absolute values (docs/masked_conv.md). A
    CPU with AVX512_BF16 takes subnormal bfloat16 numbers, and sums below 2^-126, for zero. A 1x1 convolution with its
    centre alone, without gate, cond and residual, is torch's own. Under autocast the op computes in the dtype of its
    inputs. The backward pass keeps x and weight, and with a gate z, or with ``recompute=True`` bias and cond instead.

    A NaN or infinite pixel reaches exactly the outputs that see it, but for torch's own convolution; with data channels
    those that see any channel of it (the order of channels is a matter of zeros in the weight, and zero times NaN is
    NaN).

    Errors: ``ValueError`` for shapes, even kernels, an odd number of gated channels, options; ``TypeError`` for dtypes.

    Source: van den Oord et al., "Pixel Recurrent Neural Networks" (masks, order of colours) and "Conditional Image
    Generation with PixelCNN Decoders" (gate, conditioning, two stacks), both 2016; Dauphin et al., "Language Modeling
    with Gated Convolutional Networks", 2017 (identity_sigmoid); Lavin and Gray, "Fast Algorithms for Convolutional
    Neural Networks", 2016 (pairs of pixels).

    >>> y = masked_conv2d(torch.randn(1, 3, 8, 8), torch.randn(16, 3, 7, 7), mask_type="A", gate="tanh_sigmoid")
    """
    plain = gate is None and cond is None and residual is None
    simple = plain and data_channels == 1 and isinstance(mask_type, str) and mask_order == "raster"
    if simple and mask_type == "B" and out is None and dilation == 1 and not is_compiling():
        result = _pointwise(x, weight, bias)
        if result is not None:
            return result
    check_tensor("x", x)
    check_tensor("weight", weight)
    for name, t in (("bias", bias), ("cond", cond), ("residual", residual)):
        if t is not None:
            check_tensor(name, t)
    mask_type, mask_order, data_channels = check_mask(mask_type, mask_order, data_channels)
    if gate not in _GATES:
        raise ValueError(f'gate must be None, "tanh_sigmoid" or "identity_sigmoid", got {gate!r}')
    if isinstance(dilation, (tuple, list)):
        if len(dilation) != 2:
            raise ValueError(f"dilation must be an int or a pair, got {dilation!r}")
        dilation = [check_int("dilation", d, 1, 2**31) for d in dilation]
    else:
        dilation = [check_int("dilation", dilation, 1, 2**31)] * 2
    taps = []
    if weight.dim() == 4:
        taps = live_taps(*weight.shape[2:], mask_type, mask_order, data_channels)
        if data_channels > 1:
            _check(x, weight, bias, cond, residual, taps, gate)
            weight = ordered_weight(weight, mask_type, mask_order, data_channels, gate is not None)
    if plain and weight.shape[2:] == (1, 1) and taps and x.numel() and weight.numel():
        _check(x, weight, bias, cond, residual, taps, gate)
        with _no_autocast(x):
            result = F.conv2d(x, weight, bias)
        if out is None:
            return result
        _op._no_grad_into(out, (x, weight, bias))
        return _copy_into(_like(x, weight.shape[0], out), result)
    keep = gate is not None and not recompute and out is None and torch.is_grad_enabled()
    keep = keep and any(t is not None and t.requires_grad for t in (x, weight, bias, cond))
    into = None if out is None else (out, x.new_empty((0,)))
    return _op(x, weight, bias, cond, residual, taps, dilation, gate, keep, out=into)[0]
