"""Fits of many mixtures past 2^31, in the emulator: the last of them. The launches are called without the op, which
would allocate what huge.empty only reserves."""

import pytest
import torch

import cases
from gmkernels import _call

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
pytestmark = pytest.mark.slow
FLOAT, DOUBLE = torch.float32, torch.float64
BLOCKS, DIAG = 2112, 2


def last_of(b, n, k, d, ins, strides):
    """The last mixture's parameters; its start alone."""
    outs = [huge.empty((b, *s), FLOAT) for s in ((k,), (k,), (k, d), (k, d), (k, d))]
    outs += [huge.empty((b, k), torch.uint8), huge.empty((b, k), torch.int64), huge.empty((b,), DOUBLE)]
    outs += [huge.empty((b,), torch.int64), huge.empty((b,), torch.bool)]
    numbers = n * (d + k + 2) + 2 + k + 2 * k * d + k * (d + 3) + 2 * d * (d + 1) + 2 * (k * (d + 4) + 2 * k * d)
    workspace = huge.empty((BLOCKS * numbers,), DOUBLE)
    with backend.running(blocks=[-1]):
        _call.Kernel.backend("gmm_fit", (*outs, workspace), ins,
                             (strides, b, n, k, d, 0, 0, 1, 1, 0, 1, 1e-3, 1e-6, 0, DIAG, BLOCKS, numbers))
        at = backend.written(outs[2])
    assert at[-k * d] == (b - 1) * k * d and at[-1] == b * k * d - 1
    assert workspace.numel() > 2**31
    return [t[-1] for t in outs]


def test_given_mixtures_simt():
    b, k, d = 2 * BLOCKS, 512, 1024
    x, log_weights = torch.full((1, d), 0.5), torch.zeros(k)
    means, p = huge.periodic((b, k, d), FLOAT), huge.periodic((b, k, d), FLOAT, seed=1)
    assert means.numel() > 2**31
    got = last_of(b, 1, k, d, (x, None, None, None, log_weights, means, p), (0, 0, 0, 0, k * d, k * d))
    cases.close(got[0], torch.full((k,), 1 / k), rtol=1e-6)
    cases.close(got[2], means[-1].double(), rtol=1e-5, atol=1e-6)
    cases.close(got[3], p[-1].double() ** -2, rtol=1e-5)
    assert torch.equal(got[4], p[-1])


def test_rows_simt():
    b, n, d = BLOCKS, 1025, 1024
    x = huge.periodic((b, n, d), FLOAT)
    assert x.numel() > 2**31
    got = last_of(b, n, 1, d, (x, None, None, torch.ones(n, 1), None, None, None), (n * d, 0, 0, 0, 0, 0))
    own = x[-1].double()
    cases.close(got[2][0], own.mean(0), rtol=1e-5, atol=1e-6)
    cases.close(got[3][0], own.var(0, correction=0) + 1e-6, rtol=1e-5)
