"""Rounding to the half types, and back: every kind of number, through ops.diffusion_step."""

import pytest
import torch

import cases
from gmkernels import ops

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def same_bits(got, want):
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))


def edges(dtype):
    """float32 numbers at, just below and just above what separates two results of rounding."""
    info = torch.finfo(dtype)
    step = 13 if dtype is torch.float16 else 16  # bits that rounding drops
    exponents = range(127 - 27, 127 + 17) if dtype is torch.float16 else (0, 1, 2, 126, 127, 128, 253, 254)
    tails = [0, 1, 2, (1 << step) - 1, *((1 << step - 1) + d for d in (-1, 0, 1))]
    mantissas = [m << step | t for m in (0, 1, 2, (1 << 23 - step) - 1) for t in tails]
    bits = [e << 23 | m for e in exponents for m in mantissas]
    bits += [0x7F7FFFFF, 0x00000001, 0x007FFFFF, 0x477FEFFF, 0x477FF000, 0x477FF001, 0x38800000, 0x387FFFFF]
    bits += [1 << b for b in range(13, 31)]
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    return torch.cat([x, -x, torch.tensor([torch.inf, -torch.inf, info.max, info.tiny, info.smallest_normal])])


@HALF
def test_rounding(device, dtype):
    """x0 = value * 1 + 0, out = 1 * x0: one row of coefficients for each value."""
    values = edges(dtype)
    values = values[values != 0]
    c = torch.zeros(len(values), 8)
    c[:, 0], c[:, 2] = values, 1.0
    one = torch.ones(len(values), 1, dtype=dtype, device=device.torch)
    out, x0 = ops.diffusion_step(one, one, c.to(device.torch), return_x0=True)
    for got in (out, x0):
        same_bits(got.cpu().flatten(), values.to(dtype))


@HALF
def test_nan(device, dtype):
    """NaN stays NaN, whatever its bits, with the sign it had; the same bits as on the CPU."""
    bits = [0x7FC00000, 0x7F800001, 0x7F802000, 0x7F810000, 0x7FBFFFFF, 0x7FFFFFFF, 0x7FA00000, 0x7F801FFF, 0x7F80FFFF]
    values = torch.tensor([*bits, *(b - 2**31 for b in bits)], dtype=torch.int32).view(torch.float32)
    c = torch.zeros(len(values), 8)
    c[:, 0], c[:, 2] = values, 1.0
    one = torch.ones(len(values), 1, dtype=dtype, device=device.torch)
    got = ops.diffusion_step(one, one, c.to(device.torch)).cpu()
    assert got.isnan().all()
    with cases.cpu_kernels():
        same_bits(got, ops.diffusion_step(one.cpu(), one.cpu(), c))


@HALF
def test_rounding_in_runs(isa, dtype):
    """As `test_rounding`, of elements that share their coefficients: x + x0 m, the bits of a float32 in two halves."""
    values = edges(dtype)
    values = values[values.isfinite() & (values.abs() > 1e-3) & (values.abs() < 1e4)]
    x = values.to(dtype)
    m = (values - x.float()).to(dtype)
    c = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    for roll in (0, 1):  # each value at an even and at an odd place
        x, m = x.roll(roll), m.roll(roll)
        out, x0 = ops.diffusion_step(x, m, c, return_x0=True)
        for got in (out, x0):
            same_bits(got, (x.float() + m.float()).to(dtype))


@HALF
def test_nan_in_runs(isa, dtype):
    bits = [0x7FFF, 0x7FC0, 0x7F81, 0x7E01, -1, -64, -0x7F, 0x7F80, 0x7C00, -0x80, -0x400]
    x = torch.tensor(bits, dtype=torch.int16).repeat(64).view(dtype)  # 704 elements: at every place of a word
    out = ops.diffusion_step(x, x, torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0]))
    assert torch.equal(out.isnan(), x.isnan()) and torch.equal(out[~x.isnan()], x[~x.isnan()])
    full = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # would round to -0 and 0
    for nan in full:
        c = torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0])
        c[0] = nan
        assert ops.diffusion_step(x, x, c).isnan().all()
    drawn = ops.diffusion_step(x[:512], x[:512], torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 1.0]), noise=True, seed=0)
    assert torch.equal(drawn.isnan(), x[:512].isnan())


@HALF
def test_every_number_comes_back(device, dtype):
    """A half is a float32, and that float32 is the half again."""
    bits = torch.arange(-(2**15), 2**15, 1 if not device.simt else 61).to(torch.int16)
    more = torch.tensor([a << 10 | b for a in range(32) for b in (0, 1, 511, 512, 1023)])
    bits = torch.cat([bits, more.to(torch.int16)])
    x = bits.view(dtype)
    x = x[~x.isnan()].to(device.torch)
    c = torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0], device=device.torch)
    same_bits(ops.diffusion_step(x, x.neg(), c).cpu(), torch.where(x == 0, x.abs(), x).cpu())


def test_infinity_stays_infinity_when_scaled(device):
    """Not the 65536 that its bits would be of a larger exponent."""
    x = torch.tensor([torch.inf, -torch.inf, 1.0], device=device.torch).half()
    c = torch.tensor([0.25, 0.25, 1.0, 0.25, 0.0, 0.0, 0.0, 0.0], device=device.torch)
    out = ops.diffusion_step(x, x, c)
    assert torch.equal(out, 0.75 * x)
