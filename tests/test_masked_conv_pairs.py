"""bfloat16 on the CPU: where it has vdpbf16ps (isa "avx512" of such a CPU), products of pairs of channels or pixels.

On every other instruction set, and on an older CPU, the same tests run on the float32 kernels.
"""

import itertools
import math

import pytest
import torch

import cases
from gmkernels import ops
from test_masked_conv import GATE, SHAPES, compare, expected, mask_of, near, problem, rounded_once, run_shape

BF16 = torch.bfloat16


def both_formats(t):
    return [t, t.to(memory_format=torch.channels_last)]


@pytest.mark.parametrize("c_in", [1, 2, 3, 5, 31, 32, 33, 65])
@pytest.mark.parametrize("kernel", [(1, 5), (3, 3), (5, 3)], ids=str)
def test_odd_and_even_runs(isa, c_in, kernel):
    """A run is the channels of adjacent taps: its last value may have no partner."""
    for nhwc, width in itertools.product((False, True), (6, 7)):
        for mask_type, dilation in (("A", 1), ("B", (1, 2))):
            x, weight, bias = problem(2, c_in, 18, 4, width, kernel, dtype=BF16, nhwc=nhwc, grad=True)
            compare(x, weight, bias, mask_type=mask_type, dilation=dilation)
            out = ops.masked_conv2d(x, weight, bias, mask_type, dilation=dilation)
            rounded_once(out, x, weight, bias, mask_type, None, dilation)


@pytest.mark.parametrize("c_out", [1, 2, 15, 16, 17, 31, 33, 47, 49, 63, 64, 65, 127, 129])
def test_every_panel_width(isa, c_out):
    for nhwc in (False, True):
        run_shape((1, 3, c_out, 4, 5, 3, "B", None, 1), "cpu", BF16, nhwc)
        run_shape((1, 3, 2 * c_out, 4, 5, 3, "B", GATE, 1), "cpu", BF16, nhwc)


@pytest.mark.parametrize("pixels", [*range(1, 8), 31, 32, 33, 63, 65, 255, 257, 300])
def test_every_row_length(isa, pixels):
    for nhwc in (False, True):
        run_shape((1, 2, 5, 1, pixels, 3, "B", None, 1), "cpu", BF16, nhwc)
        run_shape((1, 5, 2, pixels, 1, 3, "B", None, 1), "cpu", BF16, nhwc)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(isa, shape):
    for nhwc in (False, True):
        run_shape(shape, "cpu", BF16, nhwc)


@pytest.mark.parametrize("size", [(2, 64, 128, 32, 32), (3, 33, 70, 23, 29), (1, 31, 48, 11, 37)], ids=str)
@pytest.mark.parametrize("gate", [None, GATE])
def test_many_bands(isa, size, gate):
    for nhwc in (False, True):
        x, weight, bias = problem(*size, 3, dtype=BF16, nhwc=nhwc, grad=True)
        compare(x, weight, bias, gate=gate)
        rounded_once(ops.masked_conv2d(x, weight, bias, gate=gate), x, weight, bias, "B", gate)


def test_cond_and_residual_in_another_format(isa):
    x, weight, bias = problem(2, 5, 36, 5, 7, 3, dtype=BF16)
    cond, residual = (cases.data(2, c, 5, 7, dtype=BF16, seed=s) for c, s in ((36, 7), (18, 8)))
    want = expected(x, weight) + bias.double().view(-1, 1, 1) + cond.double()
    a, b = want.chunk(2, 1)
    want = torch.tanh(a) * torch.sigmoid(b) + residual.double()
    for image, c, r in itertools.product(both_formats(x), both_formats(cond), both_formats(residual)):
        near(ops.masked_conv2d(image, weight, bias, gate=GATE, cond=c, residual=r), want)


def test_cond_and_residual_without_a_gate(isa):
    x, weight, bias = problem(2, 5, 37, 5, 7, 3, dtype=BF16)
    residual = cases.data(2, 37, 5, 7, dtype=BF16, seed=8)
    for cond in (cases.data(2, 37, dtype=BF16, seed=7), cases.data(2, 37, 5, 7, dtype=BF16, seed=7)):
        want = expected(x, weight, bias) + (cond if cond.dim() == 4 else cond[:, :, None, None]).double()
        for image in both_formats(x):
            near(ops.masked_conv2d(image, weight, bias, cond=cond), want)
            near(ops.masked_conv2d(image, weight, bias, cond=cond, residual=residual), want + residual.double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("c_in", [3, 4])
@pytest.mark.parametrize("mask_type", "AB")
def test_every_bad_pixel_reaches_what_sees_it(isa, bad, c_in, mask_type):
    """The partner that a last value lacks is zero times zero, whatever lies beyond it in memory."""
    x, weight, bias = problem(1, c_in, 18, 4, 5, 3, dtype=BF16)
    for nhwc, pixel, channel in itertools.product((False, True), range(20), (0, c_in - 1)):
        image = x.clone().float()
        image[0, channel, pixel // 5, pixel % 5] = bad
        image = image.to(BF16, memory_format=torch.channels_last if nhwc else torch.contiguous_format)
        hit = torch.zeros(1, 1, 4, 5)
        hit[0, 0, pixel // 5, pixel % 5] = 1
        ones = mask_of(weight, mask_type).float()[None, None]
        sees = torch.nn.functional.conv2d(hit, ones, padding=1)[0, 0] > 0
        out = ops.masked_conv2d(image, weight, bias, mask_type)
        assert torch.equal(~out[0].isfinite(), sees.expand(18, 4, 5))
        assert torch.equal(out[0][:, ~sees], ops.masked_conv2d(x, weight, bias, mask_type)[0][:, ~sees])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("width", [5, 6])
def test_a_bad_pixel_in_the_weight_gradient(isa, bad, width):
    """Type B, one row: the centre sees every pixel, the tap left of it all but the last. No tap sees beyond the row."""
    x, weight, bias = problem(1, 3, 4, 3, width, (1, 3), dtype=BF16, grad=True)
    out = ops.masked_conv2d(x, weight, bias)
    grad = torch.ones_like(out)
    clean = torch.autograd.grad(out, (weight, bias), grad)
    for last, nhwc in itertools.product((0, 1, 2), (False, True)):
        image = x.detach().clone()
        image[0, 1, last, width - 1] = bad
        image = image.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
        got = torch.autograd.grad(ops.masked_conv2d(image, weight, bias), (weight, bias), grad)
        wrong = torch.zeros(4, 3, 1, 3, dtype=torch.bool)
        wrong[:, 1, 0, 1] = True
        assert torch.equal(~got[0].isfinite(), wrong)
        assert torch.equal(got[0][~wrong], clean[0][~wrong]) and torch.equal(got[1], clean[1])


def test_subnormal_numbers_may_count_as_zero(isa):
    """And nothing worse: the smallest normal numbers and their sums are exact."""
    weight = torch.ones(2, 3, 1, 3, dtype=BF16)
    for value, exact in ((1e-40, False), (2.0**-126, True), (3e-39, False)):
        x = torch.full((1, 3, 2, 5), value, dtype=BF16)
        out = ops.masked_conv2d(x, weight)
        want = expected(x, weight).to(BF16)
        assert torch.equal(out, want) or (not exact and torch.equal(out, torch.zeros_like(out)))


@pytest.mark.parametrize("gate", [None, GATE])
@pytest.mark.parametrize("size", [(3, 17, 70, 23, 29), (1, 128, 130, 16, 16)], ids=str)
def test_same_bits_on_any_number_of_threads(gate, size, isa):
    for nhwc in (False, True):
        x, weight, bias = problem(*size, 3, dtype=BF16, nhwc=nhwc, grad=True)
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out = ops.masked_conv2d(x, weight, bias, gate=gate)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), (x, weight, bias))))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_formats_agree(isa):
    """The same sums in the same order: contiguous and channels_last give the same bits."""
    x, weight, bias = problem(2, 33, 66, 9, 37, 3, dtype=BF16)
    for gate in (None, GATE):
        a, b = (ops.masked_conv2d(t, weight, bias, gate=gate) for t in both_formats(x))
        assert torch.equal(a, b)
