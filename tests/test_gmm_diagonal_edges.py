"""Edges of the kernels for diag and spherical in float32: sizes of blocks, groups of components, launches."""

import pytest
import torch

import cases
from gmkernels import ops
from gmkernels.ops import gmm as gmm_module
from test_gmm import F32, check, mixture, run
from test_gmm_edges import threads_of


def backward(args, need_x):
    """gmm_log_prob_backward of zeros: one of its two halves."""
    zeros = torch.zeros(args[0].shape[:-1])
    return torch.ops.gmkernels.gmm_log_prob_backward(zeros, zeros, *args, "diag", need_x, not need_x)


@pytest.mark.parametrize("n, d, forward, grad_x", [(1, 1, 32, 32), (64, 1, 32, 32), (65, 1, 64, 64), (128, 1, 64, 64),
                                                   (129, 1, 128, 128), (129, 16, 128, 128), (129, 17, 128, 64),
                                                   (129, 32, 128, 64), (129, 33, 64, 32), (129, 64, 64, 32),
                                                   (129, 65, 32, 32), (1, 65, 32, 32)])
def test_threads_of_a_block(device, n, d, forward, grad_x):
    """A thread has two rows. Tiles of 64 features fit into the 64 KiB of an sm_75, of 128 into the 99 of an sm_86."""
    with cases.few_blocks(device, 1):
        args = mixture(n, d, 1, "diag", F32)
        assert threads_of(lambda: ops.gmm_log_prob(*args, "diag")) == forward
        assert threads_of(lambda: backward(args, need_x=True)) == grad_x


@pytest.mark.parametrize("k", [7, 15])
@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_one_component_less_than_a_group(device, covariance_type, k):
    """In two mixtures: the sums of the first are not those of the second."""
    check(mixture(3, 2, k, covariance_type, F32, device.torch, batch=(2,)), covariance_type)


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_only_the_third_of_a_group_has_weight(device, covariance_type):
    """Under the others every row is at distance 0."""
    x, lw, means, p = mixture(2, 5, 3, covariance_type, F32, device.torch)
    p[:2] = 0
    ones = torch.ones(2, device=device.torch)
    lp, grads = run([x, lw, means, p], covariance_type, ones)
    want, wanted = run([x, lw[2:], means[2:], p[2:]], covariance_type, ones)
    assert torch.equal(lp, want) and torch.equal(grads[0], wanted[0])
    assert all((g[:2] == 0).all() and torch.equal(g[2:], w) for g, w in zip(grads[1:], wanted[1:], strict=True))


@pytest.mark.parametrize("what", ["log_prob", "grad_x", "statistics"])
def test_2_32_jobs_emulator(what, monkeypatch):
    """The launch alone: 32 bits of their number are 0."""
    backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    many, empty = 2**32, backend.huge.empty
    monkeypatch.setattr(gmm_module, "_scratch", lambda x, size: empty((size,), torch.uint8) if size else None)
    mixtures = torch.zeros(1, 1).expand(many, 1, 1), torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1)
    rows, nothing = backend.huge.periodic((many, 1), F32), torch.empty(0)
    with backend.running(blocks=[132 * 16]):  # one past the last
        if what == "log_prob":
            out = empty((many, 1), F32)
            ops.gmm_log_prob(*mixtures, "diag", out=out)
        elif what == "grad_x":
            out = empty((many, 1, 1), F32)
            gmm_module._backward_launch((out, nothing, nothing, nothing), rows, rows, *mixtures, "diag", True, False)
        else:
            out = empty((many, 1), F32)
            outs = nothing, out, empty((many, 1, 1), F32), empty((many, 1, 1), F32)
            gmm_module._backward_launch(outs, rows, rows, *mixtures, "diag", False, True)
        assert len(backend.written(out)) == 0
