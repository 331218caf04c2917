"""The gradient for the weight where there are more than 2^31 pixels, or pairs of a tap and an input channel, and images
that are as large: the last block of each launch, in the emulator. The launch is called without the op, which would give
a block too many pixels, and allocate what huge.empty only reserves."""

import pytest
import torch

import cases
from gmkernels.ops import masked_conv as module
from test_masked_conv_cuda import check_sum
from test_masked_conv_huge import indices

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
DOUBLE, BF16 = torch.float64, torch.bfloat16


@pytest.mark.parametrize("b, h, w", [(1, 2**16, 2**15 + 129), (2**31 + 2**23 + 1, 1, 1)], ids=["one image", "many"])
def test_pixels_simt(b, h, w):
    """In as many groups as a grid can have."""
    groups, pixels = 65535, b * h * w
    x, grad = (huge.periodic((b, 1, h, w), DOUBLE, seed) for seed in (1, 2))
    weight, bias, workspace = (torch.empty(n, dtype=DOUBLE) for n in (1, 1, 2 * groups))
    with backend.running(blocks=[-1]):
        module._weight((weight, bias, workspace), (grad, x), [b, 1, 1, h, w], [0], [1, 1, 1, 1], groups, [False] * 2,
                       module.DTYPE_CODE[DOUBLE])
        assert backend.written(workspace).tolist() == [2 * groups - 2, 2 * groups - 1]
    first = pixels * (groups - 1) // groups
    assert first >= 2**31
    x, grad = (t.view(-1)[first:] for t in (x, grad))
    check_sum(workspace[-2], (x * grad).sum(), (x * grad).abs().sum())
    check_sum(workspace[-1], grad.sum(), grad.abs().sum())


def test_pairs_of_a_tap_and_a_channel_simt():
    c_in = 2**30 + 2**23
    rows = 2 * c_in + 1
    x, grad = huge.periodic((1, c_in, 1, 1), BF16, seed=1), cases.data(1, 1, 1, 1, dtype=BF16, seed=2)
    weight, bias = huge.empty((1, c_in, 1, 3), BF16), torch.empty(1, dtype=BF16)
    workspace = huge.empty((1, rows, 1), torch.float32)
    with backend.running(blocks=[-1]):
        module._weight((weight, bias, workspace), (grad, x), [1, c_in, 1, 1, 1], [0, 1], [1, 3, 1, 1], 1, [False] * 2,
                       module.DTYPE_CODE[BF16])
        at = backend.written(workspace)
    assert at[0] >= 2**31 and at[-1] == rows - 1
    got, g = workspace.view(-1)[at].double(), grad.double().item()
    assert torch.equal(got[:-1], x.view(-1)[at[:-1] - c_in].double() * g) and got[-1] == g


def test_images_of_more_than_two_to_the_31_pixels_simt():
    """Forward: two images, and a dilation by which the last row sees the first."""
    h, w = 2**16, 2**15 + 129
    x, weight = huge.periodic((2, 1, h, w), BF16, seed=1), cases.data(1, 1, 3, 1, dtype=BF16, seed=2)
    out = huge.empty((2, 1, h, w), BF16)
    with backend.running(blocks=[0, 1, -1]):  # 0 and 1: all of the kernel that packs the weights
        module._convolve(out, x, weight, None, [0, 1], (h - 1, 1))
        at = backend.written(out)
    i, _, y, column = indices(out, at, False)
    last = y == h - 1
    assert at[-1] == out.numel() - 1 and last.any()
    i, y, column, at = (t[last] for t in (i, y, column, at))
    first_row, own = (x[i, 0, r, column].double() for r in (torch.zeros_like(y), y))
    want = first_row * weight[0, 0, 0, 0].double() + own * weight[0, 0, 1, 0].double()
    cases.close(out.view(-1)[at], want, rtol=1e-2, atol=1e-2)
