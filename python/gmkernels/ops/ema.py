"""The exponential moving average of a model's weights."""

import bisect
import itertools

import torch
from torch.compiler import is_compiling

from .. import _C, reference
from .._call import _PLAIN, DTYPE_CODE, NAMESPACE, Kernel, _library, _observed, plain_eager, written

_update = Kernel("ema_update")
_PAIRS = {(d, d) for d in DTYPE_CODE} | {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}


def _stream(device):
    return torch.cuda.current_stream(device).cuda_stream


def _is_one_block(t):
    formats = ((torch.contiguous_format, t.dim()), (torch.channels_last, 4), (torch.channels_last_3d, 5))
    return any(t.dim() == dims and t.is_contiguous(memory_format=format) for format, dims in formats)


def _joins(e, v):
    """Is this pair one for the kernel?"""
    if (type(e) not in _PLAIN or type(v) not in _PLAIN or e.layout is not torch.strided or v.layout is not torch.strided
            or (e.dtype, v.dtype) not in _PAIRS or e.is_neg() or v.is_neg() or e.device != v.device
            or (e.is_cuda and _update.cuda is None) or not (e.is_cuda or e.is_cpu)):  # fmt: skip
        return False
    return e.stride() == v.stride() and _is_one_block(e) or e.is_contiguous() and v.is_contiguous()


def _range(t):
    return t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()


def _check_memory(pairs):
    """pairs: (index, ema, value) of one device. A kernel takes them in no order: what it writes may be met once."""
    ranges = sorted((*_range(e), i) for i, e, _ in pairs)
    for (_, end, i), (begin, _, j) in zip(ranges, ranges[1:], strict=False):
        if begin < end:
            raise ValueError(f"ema[{min(i, j)}] and ema[{max(i, j)}] share memory: each tensor may be given once")
    for i, e, v in pairs:
        begin, end = _range(v)
        if _range(e) == (begin, end):
            continue
        at = max(bisect.bisect_left(ranges, (begin,)) - 1, 0)
        for low, high, j in itertools.islice(ranges, at, None):
            if low >= end:
                break
            if high > begin:
                raise ValueError(f"values[{i}] and ema[{j}] share memory: a value may only be its own average, whole")


def _general(ema, values, decay):
    """All the rest: CUDA, channels_last, mixed lists; what no kernel knows is done by torch."""
    groups, others = {}, []
    for i, (e, v) in enumerate(zip(ema, values, strict=True)):
        if not _joins(e, v):
            others.append((e, v))
        elif e.numel():
            groups.setdefault(e.device, []).append((i, e, v))
    for pairs in groups.values():
        _check_memory(pairs)
    for pairs in groups.values():
        _, es, vs = zip(*pairs, strict=True)
        codes = ([DTYPE_CODE[t.dtype] for t in ts] for ts in (es, vs))
        _update(es, (*es, *vs), [e.numel() for e in es], *codes, decay)
        written(*es)
    if others:
        reference.ema.ema_update_(*zip(*others, strict=True), decay)


def _registered(ema, values, decay):
    if Kernel.backend is not None or not _C.ema_update_plain(tuple(ema), tuple(values), decay, _stream):
        _general(ema, values, decay)


_library.define("ema_update_(Tensor(a!)[] ema, Tensor[] values, float decay) -> ()")
_library.impl("ema_update_", _registered, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::ema_update_", lambda ema, values, decay: None, lib=_library)


def ema_update_(ema, values, decay):
    r"""Move averages of weights towards the weights, in place: all tensors in one pass over memory.

    .. math::
        \text{ema}_i \leftarrow \text{decay} \cdot \text{ema}_i + (1 - \text{decay}) \cdot \text{values}_i

    Computed as ``torch.lerp`` does, ``ema + (1 - decay) (value - ema)`` for a decay above one half, so that the average
    of equal numbers stays that number. With decay 0 the values are copied and with decay 1 nothing changes, whatever
    the tensors hold; else where either is infinite or NaN the result is infinite or NaN. No gradient is recorded;
    parameters are taken as they are.

    Args:
        ema: an iterable of tensors. float32 averages of bfloat16 or float16 values are kept in float32: an average that
            is itself of a half type does not move any more once a step is less than half its last bit.
        values: an iterable of as many tensors, each of the shape and device of its average. Floating dtypes may differ;
            integers (a count of batches) are copied.
        decay: a number in [0, 1].

    One pass for tensors on the CPU or on one GPU that are contiguous (or channels_last, both) with averages of the
    values' dtype, or float32 averages of half types; torch does the others one by one. Arithmetic is float32, float64
    for float64 averages; every result is the same on any number of threads.

    Errors: ``TypeError`` for what is not a tensor or a number; ``ValueError`` for lists of different lengths, shapes or
    devices that differ, a decay out of range, and tensors that share memory with an average of another place in the
    list (tied weights: give each tensor once).

    Source: Polyak and Juditsky, 1992; Song and Ermon, NeurIPS 2020 (averages of a score model's weights).

    >>> model, ema = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    >>> ema_update_(ema.parameters(), model.parameters(), decay=0.999)
    """
    if type(decay) is not float:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)):
            raise TypeError(f"decay must be a float, got {type(decay).__name__}")
        decay = float(decay)
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
    ema, values = tuple(ema), tuple(values)
    if decay != 1 and plain_eager() and _C.ema_update_plain(ema, values, decay, _stream):
        written(*ema)
        return
    if len(ema) != len(values):
        raise ValueError(f"values must hold as many tensors as ema, {len(ema)}, got {len(values)}")
    for i, (e, v) in enumerate(zip(ema, values, strict=True)):
        for name, t in (("ema", e), ("values", v)):
            if not isinstance(t, torch.Tensor):
                raise TypeError(f"{name}[{i}] must be a torch.Tensor, got {type(t).__name__}")
        if e.shape != v.shape:
            raise ValueError(f"values[{i}] must have the shape of ema[{i}], {tuple(e.shape)}, got {tuple(v.shape)}")
        if e.device != v.device:
            raise ValueError(f"values[{i}] must be on the device of ema[{i}], {e.device}, got {v.device}")
    if decay == 1 or not ema:
        return
    with torch.no_grad():
        (torch.ops.gmkernels.ema_update_ if is_compiling() or _observed() else _general)(ema, values, decay)
