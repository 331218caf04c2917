"""Weights in the order in which a kernel reads them, kept between calls where the caller promises what that needs."""

import contextlib
import contextvars
import weakref

_kept = contextvars.ContextVar("gmkernels_kept_weights", default=None)


@contextlib.contextmanager
def keep_packed_weights():
    """Inside, weights are packed for the kernels once and not at every call: for sampling and other inference.

    Of :func:`gmkernels.ops.masked_conv2d` on the CPU (and the modules made of it) and of
    :func:`gmkernels.ops.pixelcnn_sample`. A weight is packed again when its version counter says that it was written
    to, so optimizers, ``copy_``, ``load_state_dict`` and ``ema_update_`` are noticed. What torch does not count is not:
    **inside, do not write to a weight through** ``.data``, numpy or another process. Outside, every call packs, and
    all writes count.

    What is kept, for each size of images that a weight meets, goes with the weight, and at the end of the block. It
    belongs to the thread that entered the block; blocks within blocks share it. Inference tensors have no version
    counter, and are packed at every call; so is what autocast makes of a weight.

    >>> model = gmkernels.nn.MaskedConv2d(8, 8, 3).eval()
    >>> with torch.no_grad(), gmkernels.keep_packed_weights():
    ...     ys = [model(torch.randn(1, 8, 16, 16)) for _ in range(3)]
    """
    if _kept.get() is not None:
        yield
        return
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def keeping():
    return _kept.get() is not None


class Packed:
    """The packed form of some tensors: `buffer`, None until the caller has made it."""

    buffer = stamp = owners = None


def packed(key, tensors):
    """The `Packed` of these tensors (None stands for an absent one): what is kept of them, or a new one where one has
    changed. Where nothing is kept, always a new one."""
    kept = _kept.get()
    if kept is None or any(t is not None and t.is_inference() for t in tensors):
        return Packed()
    tensors = [t for t in tensors if t is not None]
    owners = [t._base if t._is_view() else t for t in tensors]  # a view is a new object each time
    key = (key, *map(id, owners))
    stamp = [(t._version, t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]
    found = kept.get(key)
    if found is None or found.stamp != stamp:
        found = kept[key] = Packed()
        found.stamp, found.owners = stamp, [weakref.ref(t, lambda _: kept.pop(key, None)) for t in owners]
    return found
