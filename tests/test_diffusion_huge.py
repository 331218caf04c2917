"""diffusion_step past 2^31: its last block, in the emulator. An index that loses its high bits is out of bounds, or finds
other numbers."""

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


def compare(x, m, coefficients, out, x0, at, noise=None, **streams):
    """`streams` as in ops.diffusion_step; one row of coefficients, or one for each of `at`."""
    assert at[-1] >= 2**31
    at_ = (lambda t: None if t is None else t.flatten()[at].double())
    want = reference.diffusion.diffusion_step(
        at_(x), at_(m), coefficients.double(), at_(streams.get("uncond")), *map(at_, streams.get("history", [None] * 3)),
        at_(streams.get("variance")), noise, None, streams.get("guidance_scale", 1.0), -1.0, 1.0, False, 0, 0)
    for got, w in zip((out, x0), want, strict=True):
        cases.close(got.flatten()[at], w, atol=2e-3 if x.dtype.itemsize == 2 else 2e-5)


@pytest.mark.parametrize("dtype, extra", [(torch.float16, 2**23), (torch.float32, 2**23 + 3)])
def test_all_streams_simt(dtype, extra):
    shape = (2**31 + extra,)
    names = ["uncond", "h1", "h2", "h3", "z"]
    uncond, *history, z = (huge.periodic(shape, dtype, seed=3 + i) for i in range(len(names)))
    got = step(shape, dtype, uncond=uncond, guidance_scale=2.0, history=history, noise=z)
    compare(*got, noise=z[got[-1]].double(), uncond=uncond, history=history, guidance_scale=2.0)


def test_one_sample_with_drawn_noise_simt():
    got = step((2**31 + 2**23,), torch.float16, noise=True, seed=5, step=3)
    at = got[-1]
    words = reference.random.philox_words(at // 4, 3, 2, torch.tensor(5))
    compare(*got, noise=reference.random._numbers(words, True).gather(-1, (at % 4)[:, None])[:, 0])


def test_more_than_2_31_samples_simt():
    """Each with its own coefficients and seed: the general path."""
    samples = 2**31 + 2**23
    coefficients, seeds = huge.periodic((samples, 8), torch.float32, seed=7), huge.periodic((samples,), torch.int64)
    x, m, _, out, x0, at = step((samples, 1), torch.float16, coefficients=coefficients, noise=True, seed=seeds)
    words = reference.random.philox_words(torch.zeros_like(at), 0, 2, seeds[at])
    noise = reference.random._numbers(words, True)[:, :1]
    want = reference.diffusion.diffusion_step(x[at].double(), m[at].double(), coefficients[at].double(), None, None, None,
                                              None, None, noise, None, 1.0, -1.0, 1.0, False, 0, 0)
    assert at[-1] >= 2**31
    for got, w in zip((out, x0), want, strict=True):
        cases.close(got[at], w, rtol=2e-3, atol=2e-3)
