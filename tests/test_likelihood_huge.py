"""The likelihood heads past 2^31, in the emulator: the last block, which an index that loses its high bits would send
elsewhere. The launches are called without the ops, which would allocate what huge.empty only reserves."""

import pytest
import torch

import cases
from gmkernels import reference
from gmkernels.ops import likelihood

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
F32 = torch.float32
RANGE = (-1.0, 1.0, 256)
_ref = reference.likelihood


@pytest.mark.parametrize("last", [False, True])
def test_nll_simt(last):
    """One image of more than 2^31 elements: 3 channels of params, 1 of x."""
    pixels = 2**31 // 3 + 2**21 + 5
    shape = (1, pixels, 3) if last else (1, 3, pixels)
    params, gradient = huge.periodic(shape, F32, seed=1), huge.empty(shape, F32)
    params, gradient = (t.movedim(-1, 1) if last else t for t in (params, gradient))
    x, nll = huge.periodic((1, 1, pixels), F32, seed=2), huge.empty((1, pixels), F32)
    with backend.running(blocks=[-1]):
        likelihood._nll((nll, gradient), (params, x), *likelihood._scalars(params, 1, 1, *RANGE, "openai"), 0.5)
        at = backend.written(nll)
    at = torch.cat([at[::97], at[-200:]])
    assert 3 * at[-1] >= 2**31
    p, v = params[0][:, at][None], x[0][:, at][None]
    want = _ref.discretized_logistic_mixture_nll(p.double(), v.double(), 1, "openai", *RANGE, "none", 1)
    assert want[0].isnan().any() and want[0].isfinite().any()  # x outside [-1, 1], and inside
    cases.close(nll[0, at], want[0][0], rtol=1e-5, atol=1e-5)
    cases.close(gradient[0][:, at], want[1][0] * 0.5, rtol=1e-4, atol=1e-4)


def test_images_simt():
    """More than 2^31 elements in images of one pixel and component."""
    b = 2**31 // 10 + 2**21
    params, gradient = huge.periodic((b, 10, 1), F32, seed=1), huge.empty((b, 10, 1), F32)
    x, nll = huge.periodic((b, 3, 1), F32, seed=2), huge.empty((b, 1), F32)
    with backend.running(blocks=[-1]):
        scalars = (b, 1, 1, 3, -1.0, 1.0, 256.0, 0, False, 0)
        likelihood._nll((nll, gradient), (params, x), *scalars, 1.0)
        at = backend.written(nll)[-300:]
    assert 10 * at[-1] >= 2**31
    want = _ref.discretized_logistic_mixture_nll(params[at].double(), x[at].double(), 1, "openai", *RANGE, "none", 1)
    assert want[0].isfinite().any()
    cases.close(nll[at], want[0], rtol=1e-5, atol=1e-5)
    cases.close(gradient[at], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [False, True])
def test_sample_simt(last):
    pixels = 2**31 // 3 + 2**21 + 5
    shape = (1, pixels, 3) if last else (1, 3, pixels)
    params, out = huge.periodic(shape, F32, seed=1), huge.empty((1, 1, pixels), F32)
    params = params.movedim(-1, 1) if last else params
    with backend.running(blocks=[-1]):
        likelihood._sample_launch(out, params, None, 1, "openai", *RANGE, 1, 5, 1.0)
        at = backend.written(out)
    at = torch.cat([at[::97], at[-200:]])
    assert 3 * at[-1] >= 2**31
    words = reference.random.philox_words(at, 0, 7, torch.tensor(5)).double()
    u = (words[:, 1] + 0.5) * 2.0**-32
    mean, scale = params[0, 1, at].double(), params[0, 2, at].double().clamp(min=-7).exp()
    value = mean + scale * (u.log() - torch.log1p(-u))
    level = ((value + 1) * 127.5).round().clamp(0, 255)
    cases.close(out[0, 0, at], level / 127.5 - 1, rtol=1e-6, atol=1e-6)
