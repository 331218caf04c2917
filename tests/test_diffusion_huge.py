"""diffusion_step past 2^31: its last block, in the emulator. An index that loses its high bits is out of bounds, or
finds other numbers."""

import pytest
import torch

import cases
from gmkernels import ops, reference

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
COEFFICIENTS = (0.9, -0.3, 0.7, 0.2, 0.1, -0.4, 0.6, 0.5)


def step(shape, dtype, **options):
    """out, x0, and the flat indices of some elements of the last block, of a step on tensors of `shape`."""
    out, x0 = huge.empty(shape, dtype), huge.empty(shape, dtype)
    x, m = huge.periodic(shape, dtype, seed=1), huge.periodic(shape, dtype, seed=2)
    coefficients = options.pop("coefficients", None)
    coefficients = torch.tensor(COEFFICIENTS) if coefficients is None else coefficients
    with backend.running(blocks=[-1]):
        ops.diffusion_step(x, m, coefficients, clip=1.0, out=out, x0_out=x0, **options)
        at = backend.written(out)
        assert torch.equal(at, backend.written(x0))
    return x, m, coefficients, out, x0, torch.cat([at[::997], at[-400:]])


def compare(x, m, coefficients, out, x0, at, noise, uncond=None, history=(None,) * 3, guidance_scale=1.0):
    """`noise`: that of the elements `at`; coefficients: one row, or a row for each element."""
    assert at[-1] >= 2**31
    x, m, uncond, *history, out, x0 = (None if t is None else t.flatten()[at]
                                       for t in (x, m, uncond, *history, out, x0))
    rows = coefficients if coefficients.dim() == 1 else coefficients[at]
    double = [None if t is None else t.double() for t in (x, m, rows, uncond, *history, None, noise)]
    want = reference.diffusion.diffusion_step(*double, None, guidance_scale, -1.0, 1.0)
    for got, w in zip((out, x0), want, strict=True):
        cases.close(got, w, rtol=2e-3 if x.dtype.itemsize == 2 else 1e-5, atol=2e-3 if x.dtype.itemsize == 2 else 2e-5)


@pytest.mark.parametrize("dtype, extra", [(torch.float16, 2**23), (torch.float32, 2**23 + 3)])
def test_all_streams_simt(dtype, extra):
    shape = (2**31 + extra,)
    uncond, *history, z = (huge.periodic(shape, dtype, seed=3 + i) for i in range(5))
    streams = {"uncond": uncond, "guidance_scale": 2.0, "history": history}
    *got, at = step(shape, dtype, noise=z, **streams)
    compare(*got, at, z[at], **streams)


def test_one_sample_with_drawn_noise_simt():
    *got, at = step((2**31 + 2**23,), torch.float16, noise=True, seed=5, step=3)
    words = reference.random.philox_words(at // 4, 3, 2, torch.tensor(5))
    compare(*got, at, reference.random._numbers(words, True).gather(-1, (at % 4)[:, None])[:, 0])


def test_more_than_2_31_samples_simt():
    """Each with its own coefficients and seed: the general path."""
    samples = 2**31 + 2**23
    coefficients, seeds = huge.periodic((samples, 8), torch.float32, seed=7), huge.periodic((samples,), torch.int64)
    *got, at = step((samples, 1), torch.float16, coefficients=coefficients, noise=True, seed=seeds)
    words = reference.random.philox_words(torch.zeros_like(at), 0, 2, seeds[at])
    compare(*got, at, reference.random._numbers(words, True)[:, 0])


def test_two_samples_of_more_than_2_31_simt():
    """Each with its own coefficients; elements that have 2^31 others behind them are written too."""
    size, coefficients = 2**31 + 2**20, torch.tensor([COEFFICIENTS, COEFFICIENTS[::-1]])
    x, m, _, out, x0, at = step((2, size), torch.float16, coefficients=coefficients)
    assert at[0] < 2**23 and (at >= size).any()
    rows = coefficients[at // size].double()
    x, m, out, x0 = (t.flatten()[at] for t in (x, m, out, x0))
    want = reference.diffusion.diffusion_step(x.double(), m.double(), rows, low=-1.0, high=1.0)
    for got, w in zip((out, x0), want, strict=True):
        cases.close(got, w, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_more_than_2_32_blocks_of_noise_simt():
    """Of one sample: a counter of more than one word."""
    shape = (2**34 + 2**23,)
    x, out = huge.periodic(shape, torch.float16), huge.empty(shape, torch.float16)
    with backend.running(blocks=[-1]):
        ops.diffusion_step(x, x, torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 1]), noise=True, seed=5, step=3, out=out)
        at = backend.written(out)
    at = torch.cat([at[::997], at[-400:]])
    assert at[-1] >= 2**34
    words = reference.random.philox_words(at // 4, 3, 2, torch.tensor(5))
    cases.close(out[at], reference.random._numbers(words, True).gather(-1, (at % 4)[:, None])[:, 0], atol=1e-3)
