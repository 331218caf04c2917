"""More than 2^31 rows of the backward of diag, in the emulator: the last block of each launch. The launch is called
without the op, which would allocate what huge.empty only reserves."""

import pytest
import torch

import cases
from gmkernels.ops import gmm as gmm_module

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
FLOAT, N = torch.float32, 2**31 + 2**23
SCALE, MEAN = 1.5, 0.25


def inputs():
    """grad, log_prob, x, log_weights, means, scales: one component, one feature."""
    rows = huge.periodic((N,), FLOAT, seed=5), huge.periodic((N,), FLOAT, seed=6), huge.periodic((N, 1), FLOAT)
    return *rows, torch.zeros(1), torch.full((1, 1), MEAN), torch.full((1, 1), SCALE)


def weights(grad, log_prob, x, at):
    """Of rows, times grad; and y."""
    y = (x[at, 0].double() - MEAN) * SCALE
    lp = torch.tensor(SCALE).double().log() - 0.5 * y.square() - 0.91893853320467274
    return grad[at].double() * (lp - log_prob[at].double()).exp(), y


def test_grad_x_simt():
    args, nothing, out = inputs(), torch.empty(0), huge.empty((N, 1), FLOAT)
    with backend.running(blocks=[-1]):
        gmm_module._backward_launch((out, nothing, nothing, nothing), *args, "diag", True, False)
        at = backend.written(out)
    at = torch.cat([at[::997], at[-100:]])
    assert at[-1] >= 2**31
    w, y = weights(*args[:3], at)
    cases.close(out[at, 0], -w * y * SCALE, rtol=1e-4, atol=1e-4)


def test_statistics_simt(monkeypatch):
    """As many slabs as blocks: the last block can sum its own."""
    kept, slabs = [], 132 * 16
    monkeypatch.setattr(gmm_module, "_MOST_SLABS", slabs)
    monkeypatch.setattr(gmm_module, "_SLAB_BYTES", 24 * slabs)
    monkeypatch.setattr(gmm_module, "_scratch", lambda x, size: kept.append(huge.empty((size,), torch.uint8)) or kept[0])
    args, nothing = inputs(), torch.empty(0)
    outs = nothing, torch.empty(1), torch.empty(1, 1), torch.empty(1, 1)
    with backend.running(blocks=[-1]):
        gmm_module._backward_launch(outs, *args, "diag", False, True)
    sums = kept[0].view(torch.float64).view(slabs, 3)
    length = -(-N // slabs // 64) * 64
    rows = torch.arange((slabs - 1) * length, N)
    assert rows[0] >= 2**31
    w, y = weights(*args[:3], rows)
    cases.close(sums[-1], torch.stack([w.sum(), (w * y).sum(), (w * y * y).sum()]), rtol=1e-4, atol=1e-3)
