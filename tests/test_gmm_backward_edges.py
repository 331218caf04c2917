"""Edges of the backward of gmm_log_prob that the tests by shape do not meet: whole blocks and slabs, rows at the mean,
infinite gradients, gradients asked for alone, and which kernel, of what size, is launched."""

import pytest
import torch

import cases
from gmkernels import ops
from gmkernels.ops import gmm as gmm_module
from test_gmm import F32, F64, INF, NAN, TYPES, check, mixture, oracle, run
from test_gmm_edges import threads_of


def slabs_of(monkeypatch, n, slabs):
    """n rows in so many slabs."""
    monkeypatch.setattr(gmm_module, "_SLAB_ROWS", -(-n // slabs))


@pytest.mark.parametrize("covariance_type", ["tied", "diag"])
def test_a_whole_block_of_rows(device, covariance_type):
    """Nothing behind it is read."""
    check(mixture(64, 3, 1, covariance_type, F64, device.torch), covariance_type)


@pytest.mark.parametrize("d", [2, 9])
@pytest.mark.parametrize("slabs", [2, 3])
@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_one_row_more_than_whole_slabs(device, covariance_type, slabs, d, monkeypatch):
    """129 rows in two slabs of 65, which are 128, or in three of 43, which are 64: the last row counts once."""
    slabs_of(monkeypatch, 129, slabs)
    for dtype in cases.FLOATS:
        x, lw, means, p = mixture(129, d, 1, covariance_type, dtype, device.torch)
        grad = torch.ones(129, dtype=dtype, device=device.torch)
        grad[128] = 100
        _, grads = check([x, lw, means, p], covariance_type, grad)
        cases.close(grads[1], torch.full((1,), 228.0), rtol=1e-5)


def test_infinite_gradients(device):
    """They are infinite for x, too, where the sum has one sign."""
    x, lw, means, p = mixture(3, 16, 1, "full", F64, device.torch)
    lw[:], p = 0, torch.ones_like(p)
    x = means + 1
    grad = torch.tensor([INF, 1.0, -INF], dtype=F64, device=device.torch)
    _, grads = run([x.expand(3, 16), lw, means, p], "full", grad)
    assert (grads[0][0] == -INF).all() and grads[0][1].isfinite().all() and (grads[0][2] == INF).all()


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_a_row_at_the_mean(device, covariance_type, dtype):
    """Its sums are 1, and 0: grad_P is 1 / P."""
    for d in (2, 9):
        x, lw, means, p = mixture(1, d, 1, covariance_type, dtype, device.torch)
        check([means.clone(), lw, means, p], covariance_type, torch.ones(1, dtype=dtype, device=device.torch))


@pytest.mark.parametrize("d", [2, 9])
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_a_tied_matrix_with_a_zero_on_the_diagonal(device, dtype, d):
    """All components are left out, whatever else it holds."""
    args = mixture(5, d, 2, "tied", dtype, device.torch)
    args[3][0, 0], args[3][1, 1] = 0, NAN
    lp, grads = run(args, "tied", torch.ones(5, dtype=dtype, device=device.torch))
    assert (lp == -INF).all() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_gradients_asked_for_alone(device, covariance_type, dtype):
    """Of x, or of the parameters: the others have no memory."""
    args = mixture(3, 9, 2, covariance_type, dtype, device.torch)
    _, every = run(args, covariance_type, torch.ones(3, dtype=dtype, device=device.torch))
    for needed in ((0,), (1, 2, 3)):
        leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(args)]
        got = torch.autograd.grad(ops.gmm_log_prob(*leaves, covariance_type).sum(), [leaves[i] for i in needed])
        for g, i in zip(got, needed, strict=True):
            assert torch.equal(g, every[i])


@pytest.mark.parametrize("covariance_type", TYPES)
def test_no_mixtures(device, covariance_type):
    for n in (0, 2):
        args = mixture(n, 9, 2, covariance_type, F32, device.torch, batch=(0,))
        _, grads = run(args, covariance_type, torch.ones(0, n, device=device.torch))
        assert all(g.shape == t.shape for g, t in zip(grads, args, strict=True))


def test_features_beyond_all_shared_memory(device):
    """64 rows of 460 float64 are 230 KiB: they stay where they are."""
    check(mixture(1, 460, 1, "diag", F64, device.torch), "diag")


def test_kernels_and_slabs(device, monkeypatch):
    """How many threads run tells the kernel, and the number of slabs."""
    if not device.simt:
        pytest.skip("the emulator counts threads")

    def threads(n, d, covariance_type, need_x):
        x, lw, means, p = mixture(n, d, 1, covariance_type, F32)
        grad = lp = torch.zeros(n)
        f = torch.ops.gmkernels.gmm_log_prob_backward
        return threads_of(lambda: f(grad, lp, x, lw, means, p, covariance_type, need_x, not need_x))

    assert threads(3, 9, "diag", True) == 32 and threads(3, 200, "diag", True) == 64
    for d, covariance_type, block in ((9, "diag", 128), (200, "diag", 64), (9, "full", 128)):
        one = threads(129, d, covariance_type, False)
        slabs_of(monkeypatch, 129, 3)
        assert threads(129, d, covariance_type, False) == one + 2 * block
        monkeypatch.undo()


def test_2_32_jobs_emulator(monkeypatch):
    """The launch alone: 32 bits of their number are 0."""
    backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    huge, b = backend.huge, 2**32
    monkeypatch.setattr(gmm_module, "_scratch", lambda x, size: huge.empty((size,), torch.uint8))
    grad, log_prob = huge.periodic((b, 1), F32), huge.periodic((b, 1), F32)
    outs = torch.empty(b, 1, 0), huge.empty((b, 1), F32), torch.empty(b, 1, 0), torch.empty(b, 0, 0)
    args = torch.empty(b, 1, 0), torch.zeros(1), torch.empty(1, 0), torch.empty(0, 0)
    with backend.running(blocks=[132 * 16]):  # one past the last
        gmm_module._backward_launch(outs, grad, log_prob, *args, "tied", True, True)
        assert len(backend.written(outs[1])) == 0


# tensor cores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [8, 17])
def test_one_block_for_all_mixtures(device, d):
    """It goes on to the next when everybody is done."""
    with cases.few_blocks(device, 1):
        check(mixture(20, d, 2, "full", F32, batch=(3,)), "full")


def test_features_that_are_four_more_than_whole_tiles(device):
    """Nothing behind the last row is read."""
    check(mixture(5, 12, 1, "full", F32, device.torch), "full")


@pytest.mark.parametrize("covariance_type", ["full", "tied"])
def test_every_other_row_has_a_gradient(device, covariance_type):
    args = mixture(24, 9, 1, covariance_type, F32, device.torch)
    for grad in ([1.0, 0.0], [0.0, 1.0]):
        check(args, covariance_type, torch.tensor(grad * 12, device=device.torch))


def test_responsibilities_below_1e_30(device):
    """They count as 0, whatever the gradient is: on tensor cores, and on the CPU."""
    x, lw, means, p = mixture(1, 9, 1, "full", F32, device.torch)
    lw = torch.tensor([1.0, 1.5e-30, 0.7e-30], dtype=F64).log().float().to(device.torch)
    same = [t.expand(3, *t.shape[1:]) for t in (means, p)]
    _, grads = run([x, lw, *same], "full", torch.full((1,), 1e30, device=device.torch))
    cases.close(grads[1], torch.tensor([1e30, 1.5, 0.0]), rtol=1e-4)
    assert (grads[2][2] == 0).all() and (grads[2][1] != 0).all()


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_nan_rows_and_a_component_without_weight(device, covariance_type, dtype):
    """Its gradients are 0."""
    x, lw, means, p = mixture(3, 9, 2, covariance_type, dtype, device.torch)
    x[1, 4], lw[0] = NAN, -INF
    lp, grads = run([x, lw, means, p], covariance_type, torch.ones(3, dtype=dtype, device=device.torch))
    assert lp.isnan().tolist() == [False, True, False]
    assert all((g[0] == 0).all() and g[1].isnan().any() for g in grads[1:])


def test_infinite_rows_of_many_features(device):
    """What is done about them concerns no other row."""
    x, lw, means, p = mixture(4, 44, 1, "full", F32, device.torch)
    grad = torch.ones(4, device=device.torch)
    want, wanted = run([x[1:], lw, means, p], "full", grad[1:])
    x[0, 2] = INF
    lp, grads = run([x, lw, means, p], "full", grad)
    assert lp[0] == -INF and torch.equal(lp[1:], want)
    assert (grads[0][0] == 0).all() and torch.equal(grads[0][1:], wanted[0])
    for g, w in zip(grads[1:], wanted[1:], strict=True):
        cases.close(g, w, rtol=1e-5, atol=1e-4)


def test_sums_over_rows_in_float64(device):
    """Small gradients between two large ones, each in another flush, that cancel."""
    if device.name == "cpu" or cases.rehearsal:
        pytest.skip("the CPU adds other groups of rows in float32")
    n = 1025
    x, lw, means, p = mixture(1, 8, 1, "full", F32, device.torch)
    x = (means + 1).expand(n, 8)
    grad = torch.zeros(n, device=device.torch)
    grad[0], grad[640:644], grad[n - 1] = 2.0**30, 1.0, -(2.0**30)
    lp = ops.gmm_log_prob(x, lw, means, p)
    grads = torch.ops.gmkernels.gmm_log_prob_backward(grad, lp, x, lw, means, p, "full", False, True)
    few = grad[640:644]
    want = torch.ops.gmkernels.gmm_log_prob_backward(few, lp[:4], x[:4], lw, means, p, "full", False, True)
    for g, w in zip(grads[1:], want[1:], strict=True):
        cases.close(g, w, rtol=1e-4, atol=1e-4)


def test_parameters_of_more_than_120_features(device):
    """A block has 48 rows then: three warps of four have any."""
    x, lw, means, p = mixture(1, 121, 1, "full", F32, device.torch)
    with cases.cpu_kernels():
        lp = ops.gmm_log_prob(x.cpu(), lw.cpu(), means.cpu(), p.cpu()).to(device.torch)
    grads = torch.ops.gmkernels.gmm_log_prob_backward(torch.ones_like(lp), lp, x, lw, means, p, "full", False, True)
    want = oracle([x, lw, means, p], "full", torch.ones_like(lp))[1]
    for g, w in zip(grads[1:], want[1:], strict=True):
        cases.close(g, w, rtol=1e-3, atol=1e-3 * w.abs().max().item())


def test_numbers_of_24_bits(device):
    """Where the lower part of a number has few bits, no bit of it is lost: the score of N(0, I) is -x."""
    x = torch.tensor([1 + 2**-10 - 2**-23, 1 + 2**-10 + 2**-22, -3 + 2**-22, 1 - 2**-24, 5, -1.5 - 2**-10, 7, 2**-30])
    x = torch.stack([x, x.flip(0)]).to(device.torch)
    eye = torch.eye(8, device=x.device)
    assert torch.equal(ops.gmm_score(x, eye.new_zeros(1), eye.new_zeros(1, 8), eye, "tied"), -x)


def test_x_of_matrices_at_an_odd_address(device):
    """Rows of 32 bytes that begin 4 bytes after a multiple of 16: one at each remainder of 15, too."""
    x, lw, means, p = mixture(1, 8, 1, "tied", F32, device.torch, batch=(15,))
    odd = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    check([odd, lw, means, p], "tied")


def test_one_step_more_than_whole_chunks(device):
    """Three components of three steps: the last one comes alone."""
    check(mixture(3, 17, 3, "full", F32, device.torch), "full")


def test_seven_tiles_of_features(device):
    """Chunks of 8 of the 14 steps of a component: the largest is the fourth, over the end of the second component."""
    check(mixture(2, 56, 3, "full", F32, device.torch), "full")


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_left_out_because_of_the_first_feature(device, covariance_type, dtype):
    """Its zero on the diagonal counts, not the NaN that follow."""
    x, lw, means, p = mixture(3, 3, 2, covariance_type, dtype, device.torch)
    p[0] = NAN
    p[(0, 0, 0)[: p.dim()]] = 0
    ones = torch.ones(3, dtype=dtype, device=device.torch)
    lp, grads = run([x, lw, means, p], covariance_type, ones)
    want, wanted = run([x, lw[1:], means[1:], p[1:]], covariance_type, ones)
    assert torch.equal(lp, want) and torch.equal(grads[0], wanted[0])
    assert all((g[0] == 0).all() for g in grads[1:])
