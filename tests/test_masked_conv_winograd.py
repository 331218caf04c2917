"""float32 on the CPU, taps that are neighbours in a row: sums of pairs of pixels (csrc/masked_conv/winograd.h)."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from cases import data
from gmkernels import ops
from test_masked_conv import GATE, near, problem

F32 = torch.float32
ROWS = ["1", "11", "111", "1111", "11111", "1111111", "1011", "1101", "11011", "1110111", "10101"]


def mask_of(rows):
    """Odd sizes, the rows' taps from the left on; rows of zeros below."""
    width = max(map(len, rows)) | 1
    mask = torch.zeros(len(rows) | 1, width, dtype=torch.bool)
    for y, row in enumerate(rows):
        mask[y, :len(row)] = torch.tensor([tap == "1" for tap in row])
    return mask


def plain(x, weight, mask, bias=None, dilation=1):
    weight = torch.where(mask, weight, 0)
    padding = [k // 2 * d for k, d in zip(mask.shape, torch.Size(dilation) if dilation != 1 else (1, 1), strict=True)]
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation)


def check(x, weight, bias, mask, dilation=1):
    """Output and gradients against float64; a masked tap's gradient is exactly zero."""
    out = ops.masked_conv2d(x, weight, bias, mask, dilation=dilation)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = plain(wide[0], wide[1], mask, wide[2], dilation)
    near(out, want)
    grad = data(*out.shape, dtype=out.dtype, seed=5)
    got = torch.autograd.grad(out, (x, weight, bias), grad)
    for g, w in zip(got, torch.autograd.grad(want, wide, grad.double()), strict=True):
        near(g, w)
    assert not got[1][:, :, ~mask].any()


@pytest.mark.parametrize("rows", [*([row] for row in ROWS), ["111", "11"], ["11111", "111", "11"], ["101", "111"]],
                         ids=str)
def test_every_row_of_taps(isa, rows):
    mask = mask_of(rows)
    for nhwc, width in itertools.product((False, True), (9, 10)):
        check(*problem(2, 17, 5, 8, width, tuple(mask.shape), nhwc=nhwc, grad=True), mask)
    check(*problem(2, 17, 5, 8, 9, tuple(mask.shape), dtype=torch.float16, grad=True), mask)


@pytest.mark.parametrize("c_in", [7, 8, 9, 15, 16, 31, 33])
def test_every_number_of_channels(isa, c_in):
    mask = mask_of(["11111", "111"])
    for c_out in (1, 15, 16, 17, 33, 49, 65):
        check(*problem(1, c_in, c_out, 8, 9, tuple(mask.shape), grad=True), mask)


@pytest.mark.parametrize("size", [(64, 1), (1, 64), (1, 63), (2, 257), (1, 301), (3, 512), (1, 515), (33, 3), (130, 7)],
                         ids=str)
def test_every_cut_into_bands(isa, size):
    mask = mask_of(["111", "11"])
    for nhwc in (False, True):
        check(*problem(2, 9, 5, *size, tuple(mask.shape), nhwc=nhwc, grad=True), mask)


@pytest.mark.parametrize("dilation", [(2, 1), (1, 2), (7, 1)], ids=str)
def test_dilation(isa, dilation):
    mask = mask_of(["111", "11"])
    check(*problem(2, 9, 5, 8, 9, tuple(mask.shape), grad=True), mask, dilation)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_gate_cond_and_residual(isa, format):
    x, weight, bias = problem(2, 17, 70, 9, 11, 3)
    residual, grad = (data(2, 35, 9, 11, dtype=F32, seed=s).contiguous(memory_format=format) for s in (8, 9))
    x, cond_map = (t.contiguous(memory_format=format) for t in (x, data(2, 70, 9, 11, dtype=F32, seed=7)))
    for cond in (data(2, 70, dtype=F32, seed=6), cond_map):
        for recompute in (False, True):
            inputs = [t.detach().requires_grad_() for t in (x, weight, bias, cond, residual)]
            out = ops.masked_conv2d(*inputs[:3], gate=GATE, cond=inputs[3], residual=inputs[4], recompute=recompute)
            wide = [t.detach().double().requires_grad_() for t in inputs]
            z = plain(wide[0], wide[1], mask_of(["111", "11", "000"]), wide[2])
            a, b = (z + (wide[3] if cond.dim() == 4 else wide[3][:, :, None, None])).chunk(2, 1)
            want = torch.tanh(a) * torch.sigmoid(b) + wide[4]
            near(out, want)
            got = torch.autograd.grad(out, inputs, grad)
            for g, w in zip(got, torch.autograd.grad(want, wide, grad.double()), strict=True):
                near(g, w)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("width", [8, 9])
def test_a_pixel_reaches_what_sees_it_and_no_bit_of_the_rest(isa, bad, width):
    mask = mask_of(["11111", "111"])
    x, weight, bias = problem(1, 9, 18, 8, width, tuple(mask.shape))
    clean = ops.masked_conv2d(x, weight, bias, mask)
    for nhwc, pixel in itertools.product((False, True), range(8 * width)):
        image = x.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format).clone()
        image[0, pixel % 9, pixel // width, pixel % width] = bad
        hit = torch.zeros(1, 1, 8, width)
        hit[0, 0, pixel // width, pixel % width] = 1
        sees = plain(hit, torch.ones(1, 1, *mask.shape), mask)[0, 0] > 0
        out = ops.masked_conv2d(image, weight, bias, mask)[0]
        assert torch.equal(out[:, ~sees], clean[0][:, ~sees])
        if bad == 1e30:
            assert (out[:, sees] != clean[0][:, sees]).all()
        else:
            assert not out[:, sees].isfinite().any()


@pytest.mark.parametrize("order, kernel", [("raster", 3), ("raster", 5), ("horizontal", (1, 5))], ids=str)
@pytest.mark.parametrize("mask_type", "AB")
def test_the_order_of_data_channels_to_the_bit(isa, order, kernel, mask_type):
    """What a zero in the weight forbids may not come back as rounding, nor in the gradient."""
    x, weight, bias = problem(1, 9, 18, 8, 9, kernel)
    run = dict(mask_type=mask_type, mask_order=order, data_channels=3)
    clean = ops.masked_conv2d(x, weight, bias, **run)
    grad = data(*clean.shape, dtype=F32, seed=4)
    for colour in range(3):  # channels of this colour and those behind it, at one pixel
        changed = x.clone()
        changed[0, 3 * colour:, 4, 4] += 1e4
        out = ops.masked_conv2d(changed, weight, bias, **run)
        free = 6 * (colour if mask_type == "B" else colour + 1)
        assert torch.equal(out[0, :free, 4, 4], clean[0, :free, 4, 4])
        assert torch.equal(out[0, :, 4, :4], clean[0, :, 4, :4])
        inputs = x.clone().requires_grad_()
        ops.masked_conv2d(inputs, weight, bias, **run)[0, :free, 4, 4].backward(grad[0, :free, 4, 4])
        assert not inputs.grad[0, 3 * colour:, 4, 4].any()
        two = x.clone().requires_grad_()  # and with a neighbour's gradient in the same pair
        later = ops.masked_conv2d(two, weight, bias, **run)[0]
        (later[:free, 4, 4] @ grad[0, :free, 4, 4] + later[:, 4, 3] @ grad[0, :, 4, 3]).backward()
        assert not two.grad[0, 3 * colour:, 4, 4].any()


def test_bits_do_not_depend_on_threads_batch_or_bands(isa):
    for size in ((3, 33, 70, 23, 29), (5, 64, 128, 32, 32), (2, 9, 17, 3, 515)):
        x, weight, bias = problem(*size, 3, grad=True)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = ops.masked_conv2d(x, weight, bias)
            results.append((out.detach(), *torch.autograd.grad(out, (x, weight, bias), out.detach())))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        for i in range(size[0]):
            assert torch.equal(ops.masked_conv2d(x[i:i + 1], weight, bias), results[0][0][i:i + 1])


@pytest.mark.parametrize("c_in, width, kernel, dtype, direct", [
    (8, 16, 3, F32, False), (7, 16, 3, F32, True), (8, 16, 3, torch.float64, True), (8, 7, 3, F32, True),
    (60, 256, 15, F32, False), (600, 256, 15, F32, True),  # 15 rows of 23 planes for 256 columns: 106 MB
], ids=str)
def test_the_route_that_is_taken(isa, c_in, width, kernel, dtype, direct):
    """Pairs begin at even columns, so an image moved by one column is summed in another way; a direct sum is not."""
    x, weight, bias = problem(1, c_in, 16, 8, width, kernel, dtype=dtype)
    moved, still = (ops.masked_conv2d(t, weight, bias) for t in (x.roll(1, 3), x))
    inside = slice(kernel // 2 + 1, width - kernel // 2)
    assert torch.equal(moved[..., inside], still.roll(1, 3)[..., inside]) is direct


@pytest.mark.parametrize("kernel", [3, 5])
def test_rounding(isa, kernel):
    """Of each sum: a part of the sum of its own absolute values; a plain sum has a third to a half of this."""
    x, weight, _ = problem(2, 128, 64, 32, 31, kernel)
    got = ops.masked_conv2d(x, weight).double()
    mask = torch.zeros(kernel, kernel, dtype=torch.bool)
    mask.view(-1)[:kernel * kernel // 2 + 1] = True
    error = got - plain(x.double(), weight.double(), mask)
    values = plain(x.double().abs(), weight.double().abs(), mask)
    assert (error.abs() <= 16 * 2.0**-24 * values).all()
    assert error.square().mean().sqrt() < 8e-7 * got.std()
