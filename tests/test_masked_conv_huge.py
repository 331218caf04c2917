"""masked_conv2d and its gradients past 2^31: the last block of each launch, in the emulator. An index that loses its
high bits is out of bounds, or finds other numbers."""

import pytest
import torch

import cases
from gmkernels import ops

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
FLOAT = torch.float32
PACKING = [*range(64), -1]  # all blocks of the kernel that packs the weights
needs_room = pytest.mark.skipif(not huge.torch_can_allocate(10 << 30), reason="no 10 GB of address space")


def images(b, c, h, w, nhwc, seed):
    """[b, c, h, w]"""
    t = huge.periodic((b, h, w, c) if nhwc else (b, c, h, w), FLOAT, seed)
    return t.permute(0, 3, 1, 2) if nhwc else t


def indices(t, at, nhwc):
    """Image, channel, row and column of flat indices of the memory of t."""
    b, c, h, w = t.shape
    if nhwc:
        return at // (h * w * c), at % c, at // (w * c) % h, at // c % w
    return at // (c * h * w), at // (h * w) % c, at // w % h, at % w


def left_tap(x, weight, bias, i, o, y, column):
    """out[i, o, y, column] of a kernel of one row and one live tap: the pixel left of the centre."""
    pixels = x[i, :, y, (column - 1).clamp_min(0)].double()
    z = (pixels * weight[o, :, 0, 0].double()).sum(-1)
    return torch.where(column > 0, z, 0.0) + (0.0 if bias is None else bias[o].double())


def some(at):
    return torch.cat([at[::997], at[-400:]])


@needs_room
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("c_in, c_out", [(2, 4096), pytest.param(64, 3, marks=pytest.mark.slow)], ids=["out", "x"])
def test_forward_simt(c_in, c_out, nhwc):
    h = w = 64
    b = 2**31 // (max(c_in, c_out) * h * w) + 2**19 // max(c_in, c_out)
    x = images(b, c_in, h, w, nhwc, seed=1)
    weight, bias = cases.data(c_out, c_in, 1, 3, dtype=FLOAT, seed=2), cases.data(c_out, dtype=FLOAT, seed=3)
    with backend.running(blocks=PACKING):
        out = ops.masked_conv2d(x, weight, bias, mask_type="A")
        at = some(backend.written(out))
    i, o, y, column = indices(out, at, nhwc)
    assert int(i[-1]) * max(c_in, c_out) * h * w >= 2**31
    cases.close(out[i, o, y, column], left_tap(x, weight, bias, i, o, y, column), rtol=1e-4, atol=1e-4)


def test_images_of_more_than_2_31_elements_simt():
    c_in, c_out, h, w = 2, 2**12, 726, 726
    x, out = images(2, c_in, h, w, False, seed=1), huge.empty((2, c_out, h, w), FLOAT)
    weight, bias = cases.data(c_out, c_in, 1, 3, dtype=FLOAT, seed=2), cases.data(c_out, dtype=FLOAT, seed=3)
    with backend.running(blocks=PACKING):
        ops.masked_conv2d(x, weight, bias, mask_type="A", out=out)
        at = some(backend.written(out))
    i, o, y, column = indices(out, at, False)
    assert c_out * h * w >= 2**31 and i[-1] == 1
    cases.close(out[i, o, y, column], left_tap(x, weight, bias, i, o, y, column), rtol=1e-4, atol=1e-4)


@needs_room
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_gradient_for_x_simt(nhwc):
    h, w, c_in, c_out = 64, 64, 4096, 2
    b = 2**31 // (c_in * h * w) + 2**19 // c_in
    grad, weight = images(b, c_out, h, w, nhwc, seed=1), cases.data(c_out, c_in, 1, 3, dtype=FLOAT, seed=2)
    with backend.running(blocks=PACKING):
        dx = torch.ops.gmkernels.masked_conv2d_backward_input(grad, weight, [0], [1, 1])
        at = some(backend.written(dx))
    i, c, y, column = indices(dx, at, nhwc)
    assert at[-1] >= 2**31
    pixels = grad[i, :, y, (column + 1).clamp_max(w - 1)].double()
    want = torch.where(column < w - 1, (pixels * weight[:, c, 0, 0].double().t()).sum(-1), 0.0)
    cases.close(dx[i, c, y, column], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("c_in, c_out", [(65573, 1), (1, 65573)], ids=["x", "grad"])  # the last tile is not empty
def test_gradient_for_weight_simt(c_in, c_out, nhwc):
    h = w = 32
    b = 2**31 // (max(c_in, c_out) * h * w) + 1
    x, grad = images(b, c_in, h, w, nhwc, seed=1), images(b, c_out, h, w, nhwc, seed=2)
    with backend.running(blocks=[-1]):
        torch.ops.gmkernels.masked_conv2d_backward_weight(grad, x, 1, 3, [0], [1, 1])


@needs_room
def test_weights_simt():
    """The gradient for more than 2^31 weights, from one image of one pixel."""
    c_in, c_out = 2**30 + 2**23, 2  # fewer than 2^31 channels: csrc/masked_conv/conv_tile.cuh
    x, grad = images(1, c_in, 1, 1, False, seed=1), cases.data(1, c_out, 1, 1, dtype=FLOAT, seed=1)
    with backend.running(blocks=[-1]):
        dw, _ = torch.ops.gmkernels.masked_conv2d_backward_weight(grad, x, 1, 1, [0], [1, 1])
        at = some(backend.written(dw))
    assert at[-1] >= 2**31
    got = dw.flatten()[at]  # 0: of products that another block would have made
    assert bool(((got == 0) | (got == (grad.flatten()[at // c_in] * x.flatten()[at % c_in]))).all())
