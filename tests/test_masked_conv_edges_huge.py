"""masked_conv2d where there are more than 2^32 pixels, or more than 2^31 packed weights: some blocks of each launch, in
the emulator. The launch is called without the op, which would allocate what huge.empty only reserves."""

import pytest
import torch

import cases
from gmkernels.ops import masked_conv as module
from test_masked_conv_huge import indices

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
BF16 = torch.bfloat16
IMAGES = {"rows of 4": (2**16 + 64, 256, 256), "odd": (2**16 + 128, 257, 255)}  # images of the batch, h, w
images = pytest.mark.parametrize("image", IMAGES)


def left_tap(shape, c_out, gate, grad=None):
    """Of one input channel, with one live tap, the pixel left of the centre: output, where it was written, and z."""
    b, h, w = shape
    x, weight = huge.periodic((b, 1, h, w), BF16, seed=1), cases.data(c_out, 1, 1, 3, dtype=BF16, seed=2)
    bias = cases.data(c_out, dtype=BF16, seed=3)
    out = huge.empty((b, c_out, h, w), BF16)
    with backend.running(blocks=[0, 1, -1]):  # 0 and 1: all of the kernel that packs the weights
        module._convolve(out, x, weight, bias, [0], (1, 1), gate, grad=grad)
        at = backend.written(out)
    i, o, y, column = indices(out, at, False)
    assert b * h * w > 2**32 and at[-1] == out.numel() - 1
    seen = torch.where(column > 0, x[i, 0, y, (column - 1).clamp_min(0)].double(), 0.0)
    z = [seen * weight[k, 0, 0, 0].double() + bias[k].double() for k in range(c_out)]
    return out[i, o, y, column], (i, o, y, column), z


@images
def test_pixels_simt(image):
    got, _, (z,) = left_tap(IMAGES[image], 1, None)
    cases.close(got, z, rtol=1e-2, atol=1e-2)


@images
def test_pixels_of_the_gate_gradient_simt(image):
    b, h, w = IMAGES[image]
    grad = huge.periodic((b, 1, h, w), BF16, seed=4)
    got, (i, o, y, column), z = left_tap(IMAGES[image], 2, "tanh_sigmoid", grad)
    t, s = torch.tanh(z[0]), torch.sigmoid(z[1])
    want = grad[i, 0, y, column].double() * torch.where(o == 0, s * (1 - t * t), t * s * (1 - s))
    cases.close(got, want, rtol=1e-2, atol=1e-2)


def test_packed_weights_simt():
    """32 numbers for a channel: one of them is its weight, the others are zeros. The last block strides over all."""
    channels = 2**26 + 2**12
    x, weight = torch.ones(1, 1, 1, 1, dtype=BF16), huge.periodic((channels, 1, 1, 1), BF16, seed=1)
    size = module._packed_size(1, channels, [0], module._PLAIN, BF16)
    out, workspace = huge.empty((1, channels, 1, 1), BF16), huge.empty((size,), BF16)
    with backend.running(blocks=[-1]):
        module._forward((out, None, workspace), (x, weight, *[None] * 4), [1, 1, channels, 1, 1], [0],
                        [1, 1, 1, 1], False, [False] * 5, module._PLAIN, False, False, module.DTYPE_CODE[BF16], size,
                        False)
        at = backend.written(workspace)
    at = torch.cat([at[:256], at[-256:]])
    assert at[-1] >= 2**31
    values, column = workspace[at], at // 32
    assert not values[at % 32 > 0].any()
    first = at % 32 == 0
    group = weight.view(-1, 32)[column[first] // 32]  # in some order of its own
    assert (values[first, None] == group).any(-1).all()
