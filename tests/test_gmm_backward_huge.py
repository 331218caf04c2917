"""The backward of gmm_log_prob past 2^31, on the plain path in the emulator. The launch is called without the op, which
would allocate what huge.empty only reserves."""

import pytest
import torch

import cases
from gmkernels.ops import gmm as gmm_module

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
FLOAT = torch.float32
NOBODY = 10**6  # a block that no launch has


def launch(outs, grad, log_prob, args, covariance_type, block, monkeypatch, slabs=1):
    """What it has written of each of `outs`: grad_x, or the other three, or all four; and the scratch."""
    need_x, need_parameters, made = len(outs) != 3, len(outs) > 1, []
    all_outs = ([] if need_x else [torch.empty(0)]) + outs + ([] if need_parameters else [torch.empty(0)] * 3)

    def scratch(x, size):
        made.append(huge.empty((size,), torch.uint8) if size else None)
        return made[0]

    one = gmm_module._sums_bytes
    monkeypatch.setattr(gmm_module, "_MATRIX_FEATURES", (1, 0))
    monkeypatch.setattr(gmm_module, "_sums_bytes", lambda b, n, k, d, c: slabs * one(b, 1, k, d, c))
    monkeypatch.setattr(gmm_module, "_scratch", scratch)
    with backend.running(blocks=[block]):
        gmm_module._backward_launch(all_outs, grad, log_prob, *args, covariance_type, need_x, need_parameters)
        return [backend.written(t) if t.numel() else None for t in outs], made[0]


def test_rows_simt(monkeypatch):
    n, slabs = 2**31 + 2**20, 2112
    grad, log_prob = huge.periodic((n,), FLOAT), huge.periodic((n,), FLOAT, seed=1)
    args = torch.empty(n, 0), torch.zeros(1), torch.empty(1, 0), torch.empty(0, 0)
    outs = [torch.empty(1), torch.empty(1, 0), torch.empty(0, 0)]
    sums = launch(outs, grad, log_prob, args, "tied", -1, monkeypatch, slabs)[1]
    per = (-(-n // slabs) + 63) // 64 * 64
    first = per * (slabs - 1)  # of the last slab: the last block's
    want = (grad[first:].double() * (-log_prob[first:].double()).exp()).sum()
    cases.close(sums.view(torch.float64)[-1], want, rtol=1e-5)


def test_rows_of_x_simt(monkeypatch):
    n = 2**31 + 2**20
    x, grad, log_prob = (huge.periodic(s, FLOAT, seed=i) for i, s in enumerate(((n, 1), (n,), (n,))))
    parameters = torch.zeros(1), torch.ones(1, 1), torch.ones(1, 1)
    out = huge.empty((n, 1), FLOAT)
    at = launch([out], grad, log_prob, (x, *parameters), "tied", -1, monkeypatch)[0][0]
    at = torch.cat([at[::997], at[-100:]])
    assert at[-1] >= 2**31
    t = x[at, 0].double() - 1
    want = -t * grad[at].double() * (-0.5 * t**2 - 0.91893853320467274 - log_prob[at].double()).exp()
    cases.close(out[at, 0], want, rtol=1e-4, atol=1e-5)


def test_parameters_simt(monkeypatch):
    """2^31 sums, and as many gradients of the parameters: 0, for no component has any weight."""
    d, k = 512, 2**22 + 2**16
    x, one, log_weights = cases.data(1, d, dtype=FLOAT), torch.ones(1), torch.full((k,), -torch.inf)
    means, p = huge.periodic((k, d), FLOAT), huge.periodic((k, d), FLOAT, seed=1)
    outs = [huge.empty((k,), FLOAT), huge.empty((k, d), FLOAT), huge.empty((k, d), FLOAT)]
    written, sums = launch(outs, one, one, (x, log_weights, means, p), "diag", -1, monkeypatch)
    before = 0
    for out, at in zip(outs, written, strict=True):
        assert len(at) > 100 and ((at + before) // 64 % 2112 == 2111).all() and (out.flatten()[at] == 0).all()
        before += out.numel()
    assert before + at[-1] - out.numel() >= 2**31
    at = backend.written(sums.view(torch.float64))  # by the last block of the launch that adds the slabs, too
    assert (at // 64 % 2112 == 2111).sum() >= sums.numel() // 8 // 2112 - 64


@pytest.mark.parametrize("d", [2**23, 2**24])
def test_features_simt(d, monkeypatch):
    """64 rows of 2^31 and 2^32 bytes: no block takes shared memory for them. The launch alone."""
    x, one = huge.periodic((1, d), FLOAT), torch.ones(1)
    outs = [huge.empty((1, d), FLOAT), torch.empty(1), huge.empty((1, d), FLOAT), huge.empty((1, d), FLOAT)]
    launch(outs, one, one, (x, one, x, x), "diag", NOBODY, monkeypatch)


def test_statistics_of_a_component_simt(monkeypatch):
    """More than 2^31. The launch alone."""
    d = 2**16
    x, one, p = huge.periodic((1, d), FLOAT), torch.ones(1), huge.periodic((d, d), FLOAT)
    outs = [torch.empty(1), huge.empty((1, d), FLOAT), huge.empty((d, d), FLOAT)]
    launch(outs, one, one, (x, one, x, p), "tied", NOBODY, monkeypatch)


def test_rows_on_tensor_cores_simt():
    """The launch alone: the last block of it takes minutes."""
    n, d = 2**31 + 1, 8
    x, grad = huge.periodic((n, d), FLOAT), huge.periodic((n,), FLOAT)
    out, nothing = huge.empty((n, d), FLOAT), torch.empty(0)
    args = grad, grad, x, torch.zeros(1), torch.zeros(1, d), torch.eye(d), "tied", True, False
    with backend.running(blocks=[NOBODY]):
        gmm_module._backward_launch([out, nothing, nothing, nothing], *args)
        assert len(backend.written(out)) == 0
