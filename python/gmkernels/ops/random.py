"""Counter-based random numbers: the same bits on every device, instruction set and thread count."""

import math
from collections.abc import Sequence

import torch

from .. import reference
from .._call import DTYPE_CODE, Kernel, Op, check_int, check_tensor, plain_eager, split_seed, written

STREAM_NORMAL, STREAM_UNIFORM, STREAM_DIFFUSION_STEP = 0, 1, 2  # csrc/core/philox.h
STREAM_KMEANS = 5  # drawn in Python only
STREAM_LOGISTIC_MIXTURE = 7
STREAM_ADD_NOISE, STREAM_FLOW_PAIR = 8, 9
STREAM_KNOWN = 10  # of diffusion_step
STREAM_PIXELCNN = 11
_NORMAL, _UNIFORM = 0, 1

_fill = Kernel("philox_fill")
_DEFAULT = torch.float32


def _outputs(seeds, shape, seed, step, stream, normal, dtype, device, out=None):
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if out.shape != torch.Size(shape) or out.dtype is not dtype:
        raise ValueError(f"out must be {dtype} {tuple(shape)}, got {out.dtype} {tuple(out.shape)}")
    return out


def _launch(out, seeds, shape, seed, step, stream, normal, dtype, device):
    samples = 1 if seeds is None or seeds.dim() == 0 else seeds.shape[0]
    size = out.numel() // samples if samples else 0
    if seeds is not None:
        seeds = seeds.contiguous()
    _fill((out,), (seeds,), seed & (2**64 - 1), samples, size, step, stream, DTYPE_CODE[dtype],
          _NORMAL if normal else _UNIFORM)


def _reference(seeds, shape, seed, step, stream, normal, dtype, device):
    size = math.prod(shape if seeds is None or seeds.dim() == 0 else shape[1:])
    return reference.random.philox_fill(seeds, seed, size, step, stream, normal, dtype, device).reshape(shape)


_op = Op(
    "philox_fill(Tensor? seeds, SymInt[] shape, int seed, int step, int stream, bool normal, ScalarType dtype,"
    " Device device) -> Tensor",
    outputs=_outputs,
    launch=_launch,
    reference=_reference,
    kernel=_fill,
    dtypes=(torch.int64,),
    device_arg=7,
)


def _fast(normal, shape, seed, step, stream, device, dtype, out):
    """An ordinary call on the CPU, at a third of the general cost; None where anything is out of the ordinary."""
    dtype = dtype or _DEFAULT
    if (device is not None or type(seed) is not int or type(step) is not int or type(stream) is not int
            or not (0 <= step < 2**32 and 0 <= stream < 2**32 and -(2**63) <= seed < 2**64)
            or dtype not in DTYPE_CODE or not plain_eager()):  # fmt: skip
        return None
    if out is None:
        try:
            out = torch.empty(shape, dtype=dtype, device="cpu")
        except (TypeError, RuntimeError):
            return None  # the general route knows what to say
    elif (type(out) is not torch.Tensor or not out.is_cpu or out.dtype is not dtype or out.requires_grad
          or tuple(shape if type(shape) in (tuple, torch.Size) else (shape,)) != out.shape
          or not out.is_contiguous() or out.is_neg()):  # fmt: skip
        return None
    else:
        written(out)
    _fill((out,), (None,), seed & (2**64 - 1), 1, out.numel(), step, stream, DTYPE_CODE[dtype],
          _NORMAL if normal else _UNIFORM)
    return out


def _sizes(shape):
    if isinstance(shape, (int, torch.SymInt)):
        return (shape,)
    if not isinstance(shape, Sequence) or not all(isinstance(s, (int, torch.SymInt)) for s in shape):
        raise TypeError(f"shape must be an int or a sequence of ints, got {type(shape).__name__} {shape}")
    if all(isinstance(s, int) for s in shape):  # not sizes that torch.compile keeps symbolic
        if any(s < 0 for s in shape):
            raise ValueError(f"shape must have no negative size, got {tuple(shape)}")
        if math.prod(shape) >= 2**60:
            raise ValueError(f"shape {tuple(shape)} has {math.prod(shape)} elements, more than any memory")
    return tuple(shape)


def _checked(normal, shape, seed, step, stream, device, dtype, out):
    if (fast := _fast(normal, shape, seed, step, stream, device, dtype, out)) is not None:
        return fast
    shape = _sizes(shape)
    if out is not None:
        check_tensor("out", out)
        device = device or out.device
        dtype = dtype or out.dtype
    if isinstance(seed, torch.Tensor) and device is None:
        device = seed.device
    device = torch.device(device or "cpu")
    dtype = dtype or _DEFAULT
    if dtype not in DTYPE_CODE:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPE_CODE))}, got {dtype}")
    if isinstance(seed, torch.Tensor) and seed.device != device:
        raise ValueError(f"seed is on {seed.device}, the output on {device}; both must be on one device")
    step = check_int("step", step, 0, 2**32)
    stream = check_int("stream", stream, 0, 2**32)
    seeds, seed = split_seed(seed, device, shape[0] if shape else None)
    return _op(seeds, shape, seed, step, stream, normal, dtype, device, out=out)


def philox_normal(shape, seed=None, step=0, stream=STREAM_NORMAL, *, device=None, dtype=None, out=None):
    r"""Standard normal numbers, reproducible to the bit on every device.

    Element ``e`` (row-major) is number ``e mod 4`` of Philox4x32-10 block ``e div 4`` under the key ``seed`` and the
    counter ``(block low, block high, step, stream)``, by Box-Muller: see ``docs/random-numbers.md``. The values depend
    on nothing else: not on strides, threads, instruction set, device or batch split. ``|z| <= 6.77``.

    Args:
        shape: sizes of the output (an int or a sequence of ints).
        seed: ``None`` draws a 64-bit seed from torch's default generator; an int in ``[-2**63, 2**64)`` counts over the
            whole output; an int64 tensor ``[shape[0]]`` seeds every sample (row) on its own, so a sample does not
            depend on the batch it is in; an int64 tensor ``[]`` is an int that stays on its device.
        step: counter word 2, in ``[0, 2**32)``: the time step of a sampler.
        stream: counter word 3, in ``[0, 2**32)``. 0 to 255 are reserved for this library's ops; 256 and up are yours.
        device: of the output (default: that of ``out`` or of a ``seed`` tensor, else CPU).
        dtype: float32 (default), float64 (the float32 values, widened), bfloat16, float16 (rounded).
        out: a contiguous tensor to write into.

    Errors: ``TypeError`` for a dtype without numbers, ``ValueError`` for negative sizes and words out of range.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box and Muller, 1958.

    >>> z = philox_normal((2, 3), seed=0)
    """
    return _checked(True, shape, seed, step, stream, device, dtype, out)


def philox_uniform(shape, seed=None, step=0, stream=STREAM_UNIFORM, *, device=None, dtype=None, out=None):
    r"""Uniform numbers on ``[0, 1)``, reproducible to the bit on every device: ``(word >> 8) * 2**-24``.

    Arguments, counters and errors as in :func:`philox_normal`. The half dtypes are rounded to nearest, so there the
    value 1 can occur.

    >>> u = philox_uniform((2, 3), seed=0)
    """
    return _checked(False, shape, seed, step, stream, device, dtype, out)
