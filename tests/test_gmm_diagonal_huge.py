"""Statistics of more than 2^31 rows of diag, in the emulator: the last block of each launch."""

import pytest
import torch

import cases
from gmkernels.ops import gmm as gmm_module

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
FLOAT = torch.float32


def test_statistics_simt(monkeypatch):
    """As many slabs as blocks: the last block sums the last slab. Its sums stay in the scratch."""
    n, slabs, mean, scale = 2**31 + 2**23, 132 * 16, 0.25, 1.5
    scratch = huge.empty((24 * slabs,), torch.uint8)
    monkeypatch.setattr(gmm_module, "_MOST_SLABS", slabs)
    monkeypatch.setattr(gmm_module, "_SLAB_BYTES", 24 * slabs)
    monkeypatch.setattr(gmm_module, "_scratch", lambda x, size: scratch[:size])
    grad, log_prob, x = (huge.periodic(shape, FLOAT, seed=i) for i, shape in enumerate([(n,), (n,), (n, 1)]))
    parameters = torch.zeros(1), torch.full((1, 1), mean), torch.full((1, 1), scale)
    outs = torch.empty(0), torch.empty(1), torch.empty(1, 1), torch.empty(1, 1)
    with backend.running(blocks=[-1]):
        gmm_module._backward_launch(outs, grad, log_prob, x, *parameters, "diag", False, True)
    sums = scratch.view(torch.float64).view(slabs, 3)[-1]
    slab_rows = -(-n // slabs // 64) * 64
    at = torch.arange((slabs - 1) * slab_rows, n)
    assert at[0] >= 2**31
    y = (x[at, 0].double() - mean) * scale
    lp = torch.tensor(scale).double().log() - 0.5 * y.square() - 0.91893853320467274
    w = grad[at].double() * (lp - log_prob[at].double()).exp()
    want = torch.stack([w.sum(), (w * y).sum(), (w * y * y).sum()])
    terms = torch.stack([w.abs().sum(), (w * y).abs().sum(), (w * y * y).abs().sum()])
    cases.close(sums / terms, want / terms, rtol=0, atol=1e-6)
