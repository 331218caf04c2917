"""ops.gmm_log_prob: values, gradients, routes, special values, memory, errors."""

import math
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import cases
from gmkernels import _call, ops, reference
from gmkernels.ops import gmm as gmm_module

F32, F64, INF, NAN = torch.float32, torch.float64, math.inf, math.nan
TYPES = reference.gmm.COVARIANCE_TYPES
NAMES = ("x", "log_weights", "means", "precisions_cholesky")
SHAPES = [(1, 1, 1), (3, 2, 5), (17, 16, 3), (70, 17, 4), (5, 3, 66), (40, 70, 2), (130, 5, 33)]  # n, d, k
SIMT_SHAPES = [(1, 1, 1), (5, 3, 4), (66, 9, 2), (3, 2, 65)]


def mixture(n, d, k, covariance_type="full", dtype=F64, device="cpu", batch=(), grad=False, spread=1.5, offset=0.0):
    """(x, log_weights, means, precisions_cholesky) whose components overlap; below the diagonal lies rubbish."""
    if covariance_type in ("full", "tied"):
        shape = (k, d, d) if covariance_type == "full" else (d, d)
        p = 0.3 / max(d, 1) ** 0.5 * cases.data(*batch, *shape, seed=4) + torch.eye(d, dtype=F64)
        p = p + 7 * torch.ones(d, d, dtype=F64).tril(-1)
    else:
        shape = (k, d) if covariance_type == "diag" else (k,)
        p = 0.6 + cases.data(*batch, *shape, seed=4).abs()
    x = offset + spread * cases.data(*batch, n, d, seed=1)
    means = offset + spread * cases.data(*batch, k, d, seed=3)
    made = x, cases.data(*batch, k, seed=2), means, p
    return [t.to(device=device, dtype=dtype).requires_grad_(grad) for t in made]


def run(args, covariance_type, grad):
    """log_prob and the gradients of sum(log_prob * grad) for detached leaves."""
    leaves = [t.detach().requires_grad_() for t in args]
    lp = ops.gmm_log_prob(*leaves, covariance_type)
    return lp.detach(), torch.autograd.grad(lp, leaves, grad)


def oracle(args, covariance_type, grad):
    leaves = [t.detach().cpu().double().requires_grad_() for t in args]
    lp = reference.gmm.gmm_log_prob(*leaves, covariance_type)
    return lp.detach(), torch.autograd.grad(lp, leaves, grad.cpu().double())


def check(args, covariance_type, grad=None, rtol=None):
    """Values and gradients against float64, relative to the largest of each."""
    if grad is None:
        leads = (t.shape[: t.dim() - m] for t, m in zip(args, trailing(covariance_type), strict=True))
        lead = torch.broadcast_shapes(*leads)
        grad = cases.data(*lead, args[0].shape[-2], seed=9).to(args[0])
    lp, grads = run(args, covariance_type, grad)
    want, wanted = oracle(args, covariance_type, grad)
    exact = args[0].dtype is F64
    cases.close(lp, want, rtol=1e-12 if exact else 2e-6, atol=1e-12 if exact else 2e-5)
    for name, got, w in zip(NAMES, grads, wanted, strict=True):
        scale = w.abs().max().item() if w.numel() else 1.0
        bound = (rtol or (1e-11 if exact else 4e-5)) * max(scale, 1e-2)
        torch.testing.assert_close(got.cpu().double(), w, rtol=0, atol=bound, msg=lambda m, name=name: f"{name}: {m}")
    return lp, grads


def trailing(covariance_type):
    return 2, 1, 2, {"full": 3, "tied": 2, "diag": 2, "spherical": 1}[covariance_type]


# values and gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_reference(device, covariance_type, dtype):
    for n, d, k in SIMT_SHAPES if device.simt else SHAPES:
        check(mixture(n, d, k, covariance_type, dtype, device.torch), covariance_type)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_more_features_than_shared_memory_holds(device, covariance_type):
    check(mixture(67, 50, 2, covariance_type, F64, device.torch), covariance_type)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_every_instruction_set(isa, covariance_type):
    for dtype in cases.FLOATS:
        for n, d, k in [(131, 17, 5), (300, 16, 33), (5, 33, 2), (40, 7, 3)]:
            check(mixture(n, d, k, covariance_type, dtype), covariance_type)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_sizes(isa, covariance_type):
    for size in cases.SIZES:
        for n, d, k in [(size, 3, 2), (4, size, 2), (4, 3, size)]:
            check(mixture(n, d, k, covariance_type, F32), covariance_type, rtol=2e-4)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_many_rows_and_components(covariance_type):
    """Several row groups, several flushes, several chunks of components and of mixtures."""
    check(mixture(20_001, 3, 2, covariance_type, F32), covariance_type, rtol=1e-4)
    check(mixture(70, 64, 40, covariance_type, F32), covariance_type, rtol=1e-4)
    check(mixture(3, 2, 3, covariance_type, F64, batch=(301,)), covariance_type)


def test_by_hand():
    def tensor(*values):
        return torch.tensor(values, dtype=F64)

    lp = ops.gmm_log_prob(tensor([0.0], [2.0]), tensor(0.0), tensor([0.0]), tensor(2.0), "spherical")
    normal = math.log(2) - 0.5 * math.log(2 * math.pi)
    cases.close(lp, torch.tensor([normal, normal - 8.0], dtype=F64))
    p = tensor([[1.0, 2.0], [99.0, 0.5]])  # 99 is below the diagonal
    lp = ops.gmm_log_prob(tensor([1.0, 3.0]), tensor(0.5), tensor([0.0, 0.0]), p)
    cases.close(lp, torch.tensor([0.5 + math.log(0.5) - math.log(2 * math.pi) - 0.5 * (1 + 3.5**2)], dtype=F64))


def test_below_the_diagonal_nothing_counts(device):
    for covariance_type in ("full", "tied"):
        args = mixture(9, 5, 3, covariance_type, F32, device.torch)
        lp, grads = run(args, covariance_type, torch.ones(9, device=device.torch))
        assert torch.equal(grads[3].tril(-1), torch.zeros_like(grads[3]))
        args[3] = torch.where(torch.ones_like(args[3]).tril(-1) == 1, NAN, args[3])
        again, grads_again = run(args, covariance_type, torch.ones(9, device=device.torch))
        assert torch.equal(lp, again) and all(map(torch.equal, grads, grads_again))


def test_a_negative_diagonal_is_a_matrix_like_any_other(device):
    for covariance_type in TYPES:
        args = mixture(9, 3, 2, covariance_type, F64, device.torch)
        args[3] = -args[3]
        want, _ = run([*args[:3], -args[3]], covariance_type, torch.ones(9, dtype=F64, device=device.torch))
        lp, _ = check(args, covariance_type)
        cases.close(lp, want)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_scikit_learn(covariance_type):
    datasets, mixtures = pytest.importorskip("sklearn.datasets"), pytest.importorskip("sklearn.mixture")
    for x in (datasets.load_iris().data, datasets.load_digits().data[:, 20:36]):
        x = x + 1e-3 * cases.data(*x.shape).numpy()
        model = mixtures.GaussianMixture(4, covariance_type=covariance_type, random_state=0, reg_covar=1e-3).fit(x)
        args = x, model.weights_, model.means_, model.precisions_cholesky_
        args = [torch.from_numpy(a) for a in args]
        args[1] = args[1].log()
        want = torch.from_numpy(model.score_samples(x))
        cases.close(ops.gmm_log_prob(*args, covariance_type), want, rtol=1e-10)
        cases.close(ops.gmm_log_prob(*(t.float() for t in args), covariance_type), want, rtol=3e-5, atol=1e-4)


def test_mixture_same_family():
    x, logits, means, scales = mixture(50, 4, 3, "diag")
    D = torch.distributions
    normal = D.Independent(D.Normal(means, 1 / scales), 1)
    want = D.MixtureSameFamily(D.Categorical(logits=logits), normal).log_prob(x)
    cases.close(ops.gmm_log_prob(x, logits.log_softmax(-1), means, scales, "diag"), want)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_leading_dimensions_broadcast(device, covariance_type):
    x, w, m, p = mixture(5, 3, 4, covariance_type, F64, device.torch, batch=(2, 3))
    for args in [(x, w, m, p), (x[0, 0], w, m, p), (x, w[0, 0], m[0, 0], p[0, 0]), (x[:, :1], w[0], m, p[0, 0]),
                 (x[:1, :1].expand(2, 3, -1, -1), w, m[:, :1], p)]:
        lp, _ = check(list(args), covariance_type)
        assert lp.shape == (2, 3, 5)
        for i, j in ((0, 2), (1, 1)):
            pairs = zip(args, trailing(covariance_type), strict=True)
            alone = [t.expand(2, 3, *t.shape[t.dim() - n :])[i, j] for t, n in pairs]
            assert torch.equal(ops.gmm_log_prob(*alone, covariance_type), lp[i, j])


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_float32_far_from_the_origin_and_tight(isa, covariance_type, offset):
    """Offset 1000 sigma; then clusters 1000 sigma apart, where a quadratic form in x would keep no digit."""
    args = mixture(500, 6, 5, covariance_type, F32, offset=offset)
    check(args, covariance_type)
    x, w, m, p = mixture(500, 6, 5, covariance_type, F64)
    m = 1000 * m
    x = m[torch.arange(500) % 5] + 0.8 * x
    check([t.float() for t in (x + offset, w, m + offset, p)], covariance_type)


# CUDA: tensor cores and plain arithmetic ------------------------------------------------------------------------------


@pytest.fixture(params=["tensor cores", "plain"])
def path(request, device, monkeypatch):
    """Full and tied float32 on a GPU, at any d: one of the two paths. On the CPU there is one."""
    if device.name == "cpu":
        pytest.skip("the CPU has one path")
    monkeypatch.setattr(gmm_module, "_MATRIX_FEATURES", (1, 128) if request.param == "tensor cores" else (1, 0))
    return request.param


MATRIX_SHAPES = [(1, 1, 1), (33, 15, 2), (130, 16, 3), (16, 17, 5), (34, 31, 2), (20, 32, 3), (65, 33, 2), (17, 64, 2),
                 (40, 65, 2), (127, 16, 1)]  # n, d, k


DIAGONAL_SHAPES = [(257, 1, 1), (9, 4, 17), (70, 5, 16), (129, 8, 9), (65, 33, 5), (33, 64, 3), (34, 65, 2)]


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_tiles_of_rows_and_components(device, covariance_type, monkeypatch):
    monkeypatch.setattr(gmm_module, "_SLAB_ROWS", 40)
    for n, d, k in DIAGONAL_SHAPES if device.simt else [*DIAGONAL_SHAPES, (300, 128, 3), (300, 129, 3)]:
        rtol = 4e-4 if d > 100 else None  # densities down to e^-900: float32 knows exp(component - lp) to 1e-4
        check(mixture(n, d, k, covariance_type, F32, device.torch), covariance_type, rtol=rtol)


@pytest.mark.parametrize("covariance_type", ["full", "tied"])
def test_tensor_cores_and_plain(device, path, covariance_type):
    for n, d, k in MATRIX_SHAPES:
        check(mixture(n, d, k, covariance_type, F32, device.torch), covariance_type)


@pytest.mark.slow
def test_tensor_cores_to_their_last_size(device, path):
    for d in (119, 120, 128, 129):
        check(mixture(20, d, 1, "full", F32, device.torch), "full")


def test_tensor_cores_are_used(device, monkeypatch):
    """From d = 8 to 128, float32, full and tied: only there is anything prepared."""
    for covariance_type in TYPES:
        for d in (7, 8, 128, 129):
            x = torch.empty(1, d, dtype=F32)
            size = gmm_module._prepared_bytes(x, 1, 1, 1, d, covariance_type)
            assert (size > 0) == (covariance_type in ("full", "tied") and d in (8, 128))
            assert gmm_module._prepared_bytes(x.double(), 1, 1, 1, d, covariance_type) == 0
    if device.simt:
        from simt import backend

        work = []
        for first in (16, 17):
            monkeypatch.setattr(gmm_module, "_MATRIX_FEATURES", (first, 128))
            backend.module().counters()
            ops.gmm_log_prob(*mixture(9, 16, 1, "full", F32), "full")
            work.append(backend.module().counters()[0])
        assert work == [2 * 32 + 96, 64]  # threads: preparing takes 128, nine rows 32; the plain path 64


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_more_to_do_than_blocks(device, covariance_type, dtype):
    """Every block goes around several times, with tiles that others may still be reading."""
    with cases.few_blocks(device):
        for n, d, k in ((300, 3, 3), (127, 16, 5)):
            check(mixture(n, d, k, covariance_type, dtype, batch=(2,)), covariance_type)


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_nothing_but_components_without_weight(device, covariance_type):
    args = mixture(9, 5, 20, covariance_type, F32, device.torch)
    args[1][:17] = -INF  # the first tile of components, and some of the next
    args[2][3], args[3][4] = NAN, NAN  # whatever they hold
    args[0][4, 2] = INF
    ones = torch.ones(9, device=device.torch)
    want, wanted = run([args[0], *(t[17:] for t in args[1:])], covariance_type, ones)
    lp, grads = run(args, covariance_type, ones)
    cases.close(lp, want, rtol=1e-6)
    cases.close(grads[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert lp[4] == -INF and (grads[0][4] == 0).all() and all((g[:17] == 0).all() for g in grads[1:])
    args[1][:] = -INF
    lp, grads = run(args, covariance_type, ones)
    assert (lp == -INF).all() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_a_gpu_without_tensor_cores(device, covariance_type):
    with cases.old_gpu(device):
        for n, d, k in ((5, 8, 3), (66, 17, 2), (9, 65, 2)):
            check(mixture(n, d, k, covariance_type, F32), covariance_type)


@pytest.mark.parametrize("covariance_type", ["full", "tied"])
def test_tensor_cores_parameters_that_are_nan(device, path, covariance_type):
    """Anywhere in what a component with weight is made of: all rows are NaN."""
    d, n = 40, 3
    for which, place in [(2, (1, 0)), (2, (1, 9)), (2, (1, 36)), (2, (1, d - 1)),
                         (3, (0, 1)), (3, (1, 20)), (3, (0, d - 1)), (3, (30, 34)), (3, (35, d - 1))]:
        args = mixture(n, d, 2, covariance_type, F32, device.torch)
        args[which][(1, *place) if which == 3 and covariance_type == "full" else place] = NAN
        assert ops.gmm_log_prob(*args, covariance_type).isnan().all(), (which, place)
    args = mixture(n, d, 2, covariance_type, F32, device.torch)
    args[1][1], args[2][1] = -INF, NAN  # without weight
    want = ops.gmm_log_prob(args[0], args[1][:1], args[2][:1], args[3][:1] if covariance_type == "full" else args[3],
                            covariance_type)
    assert torch.equal(ops.gmm_log_prob(*args, covariance_type), want)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("covariance_type", ["full", "tied"])
def test_tensor_cores_far_from_the_origin_and_tight(device, path, covariance_type, offset):
    """As on the CPU: data 1000 sigma from the origin, and clusters 1000 sigma apart."""
    check(mixture(40, 18, 3, covariance_type, F32, device.torch, offset=offset), covariance_type)
    x, w, m, p = mixture(40, 18, 3, covariance_type, F64, device.torch)
    m = 1000 * m
    x = m[torch.arange(40, device=device.torch) % 3] + 0.8 * x
    check([t.float() for t in (x + offset, w, m + offset, p)], covariance_type)


def test_tensor_cores_batches_and_addresses(device, path):
    """A mixture of a batch has the bits that it has alone; so has a tensor that starts at an odd address."""
    x, w, m, p = mixture(37, 16, 2, "full", F32, device.torch, batch=(3,))
    grad = cases.data(3, 37, seed=9, dtype=F32).to(device.torch)
    for args in [(x, w, m, p), (x[1], w, m, p), (x, w[1], m[1], p[1])]:
        lp, _ = check(list(args), "full", grad)
        alone = [t.expand(whole.shape)[1] for t, whole in zip(args, (x, w, m, p), strict=True)]
        assert torch.equal(ops.gmm_log_prob(*alone), lp[1])
    alone = x[1], w[1], m[1], p[1]
    want = run(alone, "full", grad[1])
    odd = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in alone]
    got = run(odd, "full", grad[1])
    assert torch.equal(got[0], want[0]) and all(map(torch.equal, got[1], want[1]))


def test_tensor_cores_many_rows(device, path, monkeypatch):
    """Several tiles, several sums in float64 per slab, several slabs, one of them empty."""
    check(mixture(1100, 5, 1, "full", F32, device.torch), "full")
    monkeypatch.setattr(gmm_module, "_SLAB_ROWS", 40)
    check(mixture(210, 16, 2, "full", F32, device.torch), "full")


def test_tensor_cores_products_that_are_no_number(device, path):
    """inf - inf among huge numbers: such a component has no density there, and the others keep theirs."""
    if path == "plain":
        pytest.skip("NaN on the plain path: no promise")
    x, lw, m, p = mixture(20, 16, 3, "full", F32, device.torch)
    ones = torch.ones(20, device=device.torch)
    want, wanted = run([x, lw[:2], m[:2], p[:2]], "full", ones)
    m[2, ::2], m[2, 1::2] = 3e38, -3e38
    p[2] = p[2].abs().triu() * 9 + torch.eye(16, device=p.device)
    lp, grads = run([x, lw, m, p], "full", ones)
    assert torch.equal(lp, want) and torch.equal(grads[0], wanted[0])
    for g, w in zip(grads[1:], wanted[1:], strict=True):
        assert torch.equal(g[:2], w) and (g[2] == 0).all()


@pytest.mark.parametrize("d", [3, 16, 17])
@pytest.mark.parametrize("covariance_type", ["full", "tied"])
def test_tensor_cores_special_values(device, path, covariance_type, d):
    args = mixture(21, d, 4, covariance_type, F32, device.torch)
    grad = cases.data(21, seed=9, dtype=F32).to(device.torch)
    lower = torch.ones_like(args[3]).tril(-1) == 1
    clean, clean_grads = run(args, covariance_type, grad)
    args[3] = torch.where(lower, NAN, args[3])
    again, grads = run(args, covariance_type, grad)
    assert torch.equal(again, clean) and all(map(torch.equal, grads, clean_grads))

    args[1][1], args[2][1] = -INF, NAN  # a component without weight, whatever it holds
    if covariance_type == "full":
        args[3][1], args[3][2] = INF, NAN
        args[3][2, d - 1, d - 1] = 0  # one with a zero on the diagonal
    left = [0, 3] if covariance_type == "full" else [0, 2, 3]
    lp, grads = run(args, covariance_type, grad)
    kept = [args[0], args[1][left], args[2][left], args[3][left] if covariance_type == "full" else args[3]]
    want, wanted = run(kept, covariance_type, grad)
    assert torch.equal(lp, want) and torch.equal(grads[0], wanted[0])
    for i in (1, 2, 3):
        one = i == 3 and covariance_type == "tied"
        assert torch.equal(grads[i] if one else grads[i][left], wanted[i])
        assert one or (grads[i][1] == 0).all()

    x = args[0].clone()  # rows with infinities, of numbers whose square overflows
    x[14, d - 1], x[15, 0], x[16] = INF, -INF, 3e38
    x[17, 0], x[17, d - 1] = INF, -INF
    lp, grads = run([x, *kept[1:]], covariance_type, grad)
    assert torch.equal(lp[:14], want[:14]) and (lp[14:18] == -INF).all()
    assert torch.equal(grads[0][:14], wanted[0][:14]) and (grads[0][14:18] == 0).all()
    rows = [*range(14), 18, 19, 20]
    without = run([x[rows], *kept[1:]], covariance_type, grad[rows])[1]
    for g, w in zip(grads[1:], without[1:], strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=4e-5 * float(w.abs().max()))

    x[15, 1], x[18, d - 1] = NAN, NAN
    lp, grads = run([x, *kept[1:]], covariance_type, grad)
    assert torch.equal(lp[:14], want[:14]) and lp[[15, 18]].isnan().all() and (lp[[14, 16, 17]] == -INF).all()
    assert torch.equal(grads[0][:14], wanted[0][:14]) and grads[0][[15, 18]].isnan().all()
    assert grads[1].isnan().all() and grads[2].isnan().all() and grads[3].triu().isnan().any()
    assert torch.equal(grads[3].tril(-1), torch.zeros_like(grads[3]))

    kept[1] = torch.full_like(kept[1], -INF)
    lp, grads = run([x, *kept[1:]], covariance_type, grad)
    assert (lp == -INF).all() and all((g == 0).all() for g in grads)


# derivatives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance_type", TYPES)
def test_gradcheck(device, covariance_type):
    n, d, k = (2, 2, 2) if device.simt else (5, 3, 3)
    args = mixture(n, d, k, covariance_type, F64, device.torch, batch=(2,), grad=True)
    args[2] = args[2].detach()[0].requires_grad_()  # one of them broadcast
    f = lambda *a: ops.gmm_log_prob(*a, covariance_type)  # noqa: E731
    assert gradcheck(f, args, fast_mode=device.simt)
    assert gradgradcheck(f, args, fast_mode=True)


def test_only_the_gradients_asked_for(kernel_calls):
    args = mixture(40, 3, 2, "full", F32)
    _, every = run(args, "full", torch.ones(40))
    for needed in ((0,), (1,), (2,), (3,), (0, 3)):
        leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(args)]
        got = torch.autograd.grad(ops.gmm_log_prob(*leaves).sum(), [leaves[i] for i in needed])
        assert all(torch.equal(g, every[i]) for g, i in zip(got, needed, strict=True))
    assert kernel_calls.count("gmm_log_prob_backward") == 6


@pytest.mark.parametrize("covariance_type", TYPES)
def test_opcheck(covariance_type):
    args = mixture(4, 3, 2, covariance_type, F64, grad=True)
    torch.library.opcheck(torch.ops.gmkernels.gmm_log_prob.default, (*args, covariance_type))
    lp = ops.gmm_log_prob(*args, covariance_type).detach()
    for needs in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(torch.ops.gmkernels.gmm_log_prob_backward.default,
                              (torch.ones(4, dtype=F64), lp, *args, covariance_type, *needs),
                              test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    f = torch.compile(lambda *a: ops.gmm_log_prob(*a, "diag").exp().sum(), fullgraph=True, dynamic=dynamic)
    for n in (9, 12):
        args = mixture(n, 3, 2, "diag", F32, batch=(2,), grad=True)
        got = torch.autograd.grad(f(*args), args)
        want = torch.autograd.grad(ops.gmm_log_prob(*args, "diag").exp().sum(), args)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_func(covariance_type):
    args = mixture(6, 3, 2, covariance_type)
    f = lambda *a: ops.gmm_log_prob(*a, covariance_type).sum()  # noqa: E731
    want = oracle(args, covariance_type, torch.ones(6))[1]
    for g, w in zip(torch.func.grad(f, argnums=(0, 1, 2, 3))(*args), want, strict=True):
        cases.close(g, w)
    tangents = tuple(torch.ones_like(t) for t in args)
    _, push = torch.func.jvp(f, tuple(args), tangents)
    cases.close(push, sum((w.sum() for w in want), torch.zeros((), dtype=F64)))
    batched = mixture(6, 3, 2, covariance_type, batch=(4,))
    got = torch.func.vmap(lambda *a: ops.gmm_log_prob(*a, covariance_type))(*batched)
    cases.close(got, ops.gmm_log_prob(*batched, covariance_type))
    per_sample = torch.func.vmap(torch.func.grad(f))(*batched)
    cases.close(per_sample, torch.func.grad(f)(*batched))
    hessian = torch.func.hessian(lambda m: f(args[0], args[1], m, args[3]))(args[2])
    twice = torch.autograd.functional.hessian(lambda m: f(args[0], args[1], m, args[3]), args[2])
    cases.close(hessian, twice)


def test_autocast_and_half(monkeypatch):
    args = mixture(9, 3, 2, "full", F32)
    want = ops.gmm_log_prob(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.gmm_log_prob(*args), want)
        half = ops.gmm_log_prob(*(t.bfloat16() for t in args))
    assert half.dtype is F32 and torch.equal(half, ops.gmm_log_prob(*(t.bfloat16().float() for t in args)))
    monkeypatch.setattr(_call, "_warned", set())
    with pytest.warns(UserWarning, match="no torch.bfloat16 kernel"):
        assert ops.gmm_log_prob(*(t.bfloat16() for t in args)).dtype is torch.bfloat16


# special values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_nan_and_infinite_rows(device, covariance_type, dtype):
    args = mixture(9, 3, 2, covariance_type, dtype, device.torch)
    grad = torch.ones(9, dtype=dtype, device=device.torch)
    clean, clean_grads = run(args, covariance_type, grad)
    bad = [args[0].clone(), *args[1:]]
    bad[0][4, 1] = -INF
    bad[0][6, 0], bad[0][6, 2] = INF, -INF
    lp, grads = run(bad, covariance_type, grad)
    rows = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(lp[rows], clean[rows]) and (lp[[4, 6]] == -INF).all()
    assert torch.equal(grads[0][rows], clean_grads[0][rows]) and (grads[0][[4, 6]] == 0).all()
    without = run([args[0][rows], *args[1:]], covariance_type, grad[rows])[1]
    for g, w in zip(grads[1:], without[1:], strict=True):
        cases.close(g, w, rtol=1e-4)
    bad[0][2, 2], bad[0][6, 1] = NAN, NAN
    lp, grads = run(bad, covariance_type, grad)
    rows.remove(2)
    assert torch.equal(lp[rows], clean[rows]) and lp[[2, 6]].isnan().all() and lp[4] == -INF
    assert torch.equal(grads[0][rows], clean_grads[0][rows]) and grads[0][[2, 6]].isnan().all()
    assert grads[1].isnan().all() and grads[2].isnan().all()
    upper = grads[3].triu() if covariance_type in ("full", "tied") else grads[3]
    assert upper.isnan().any()


@pytest.mark.parametrize("bad", [INF, -INF])
def test_infinities_that_cancel(device, bad):
    """inf - inf in the product with the precisions: still a row without density, not a NaN."""
    precision = torch.tensor([[[1.0, -1.0], [0.0, 1.0]]], dtype=F64, device=device.torch)
    x, zero = torch.full((1, 2), bad, dtype=F64, device=device.torch), torch.zeros(1, 2, dtype=F64, device=device.torch)
    assert ops.gmm_log_prob(x, zero[0, :1], zero, precision, "full").tolist() == [-INF]


@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_components_without_weight(device, covariance_type, n):
    args = mixture(n, 3, 3, covariance_type, F64, device.torch)
    args[1][1] = -INF
    args[2][1] = INF if n > 3 else NAN  # whatever it holds
    if covariance_type != "tied":
        args[3][1] = NAN
    lp, grads = run(args, covariance_type, torch.ones(n, dtype=F64, device=device.torch))
    kept = [args[0], args[1][[0, 2]], args[2][[0, 2]], args[3] if covariance_type == "tied" else args[3][[0, 2]]]
    want, wanted = run(kept, covariance_type, torch.ones(n, dtype=F64, device=device.torch))
    cases.close(lp, want)
    cases.close(grads[0], wanted[0])
    for i, (g, w) in enumerate(zip(grads[1:], wanted[1:], strict=True)):
        if i == 2 and covariance_type == "tied":
            cases.close(g, w)
        else:
            cases.close(g[[0, 2]], w)
            assert torch.equal(g[1], torch.zeros_like(g[1]))
    args[1][:] = -INF
    args[2][1] = 0
    args[0][0] = NAN  # means nothing without a component
    if covariance_type != "tied":
        args[3][1] = 1
    lp, grads = run(args, covariance_type, torch.ones(n, dtype=F64, device=device.torch))
    assert (lp == -INF).all() and all((g == 0).all() for g in grads)


def test_singular_components_are_left_out(device):
    for covariance_type in ("full", "diag", "spherical"):
        for n in (3, 40):
            args = mixture(n, 3, 2, covariance_type, F64, device.torch)
            args[3][1] = 0
            check(args, covariance_type)
            if covariance_type != "spherical":
                clean = run(args, covariance_type, torch.ones(n, dtype=F64, device=device.torch))
                args[3][1, 0] = NAN  # one zero on the diagonal is enough
                got = run(args, covariance_type, torch.ones(n, dtype=F64, device=device.torch))
                cases.close(got[0], clean[0])
                for g, w in zip(got[1], clean[1], strict=True):
                    cases.close(g, w)


def test_empty(device):
    for covariance_type in TYPES:
        for dtype in cases.FLOATS:
            for n, d, k in [(0, 3, 2), (4, 0, 3), (0, 0, 0), (4, 3, 0)]:
                args = mixture(n, d, k, covariance_type, dtype, device.torch)
                lp, grads = run(args, covariance_type, torch.ones(n, dtype=dtype, device=device.torch))
                assert lp.shape == (n,) and all(g.shape == t.shape for g, t in zip(grads, args, strict=True))
                if k == 0:
                    assert (lp == -INF).all() and all((g == 0).all() for g in grads)
                elif d == 0:
                    cases.close(lp, args[1].logsumexp(0).expand(n))
                    cases.close(grads[1], n * args[1].softmax(0))
                else:
                    assert all((g == 0).all() for g in grads)
            args = mixture(4, 3, 2, covariance_type, dtype, device.torch, batch=(0,))
            assert ops.gmm_log_prob(*args, covariance_type).shape == (0, 4)


def test_far_rows_and_denormals(isa):
    for covariance_type in TYPES:
        x, w, m, p = mixture(40, 4, 3, covariance_type, F32)
        x[3], x[5, 0] = 1e-40, 1e4
        grad = torch.ones(40)
        grad[11] = 1e-40
        check((x, w, m, p), covariance_type, grad, rtol=1e-3)
        x[7] = 3e38  # the square overflows: no density, no gradient, no NaN
        lp, grads = run((x, w, m, p), covariance_type, grad)
        assert lp[7] == -INF and (grads[0][7] == 0).all() and all(g.isfinite().all() for g in grads)


# memory, threads, arguments ------------------------------------------------------------------------------------------


def test_strided_expanded_and_offset_inputs(device):
    made = mixture(6, 4, 3, "full", F64, device.torch)
    want = run(made, "full", torch.ones(6, dtype=F64, device=device.torch))
    for view in (
        lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
        lambda t: torch.cat([t, t])[: len(t)].flip(0).flip(0),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
        lambda t: t[None, None].expand(1, 1, *t.shape),
    ):
        ones = torch.ones(*view(made[1]).shape[:-1], 6, dtype=F64, device=device.torch)
        got = run([view(t) for t in made], "full", ones)
        for g, w in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
            assert torch.equal(g.reshape(w.shape), w)
    lp = ops.gmm_log_prob(*(t.requires_grad_() for t in made))
    (g,) = torch.autograd.grad(lp, made[0], torch.ones((), dtype=F64, device=device.torch).expand(6))
    assert torch.equal(g, want[1][0])


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 40), d=st.integers(0, 20), k=st.integers(1, 36), covariance_type=st.sampled_from(TYPES),
       dtype=st.sampled_from(cases.FLOATS), batch=st.sampled_from([(), (1,), (2,), (2, 3)]), step=st.integers(1, 3))
def test_any_shape_and_stride(n, d, k, covariance_type, dtype, batch, step):
    args = [t.repeat_interleave(step, 0)[::step] if t.dim() else t
            for t in mixture(n, d, k, covariance_type, dtype, batch=batch)]
    check(args, covariance_type, rtol=1e-10 if dtype is F64 else 4e-4)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_same_bits_on_any_thread_count(isa, covariance_type):
    results = []
    args = mixture(9001, 5, 7, covariance_type, F32)
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        lp, grads = run(args, covariance_type, cases.data(9001, dtype=F32))
        results.append((lp, *grads))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_out():
    args = mixture(9, 3, 2, "diag", F32)
    out = torch.empty(9)
    assert ops.gmm_log_prob(*args, "diag", out=out) is out and torch.equal(out, ops.gmm_log_prob(*args, "diag"))
    with pytest.raises(ValueError, match=re.escape("out must be torch.float32 (9,), got torch.float32 (8,)")):
        ops.gmm_log_prob(*args, "diag", out=torch.empty(8))
    with pytest.raises(RuntimeError, match="does not support automatic differentiation"):
        ops.gmm_log_prob(args[0].requires_grad_(), *args[1:], "diag", out=out)
    with pytest.raises(ValueError, match="out must not share memory with x"):
        ops.gmm_log_prob(args[0].detach(), *args[1:], "diag", out=args[0].detach().flatten()[:9])


_PEAK = """
import resource, sys, torch
from gmkernels import ops
torch.set_num_threads(2)
n, d, k, covariance_type = 1_000_000, 16, 64, sys.argv[1]
if covariance_type == "full":
    n, k = 100_000, 32
g = torch.Generator().manual_seed(0)
make = lambda *shape: torch.randn(shape, generator=g)
def mixture(n):
    p = torch.rand(k, d, generator=g) + 0.5
    p = p.diag_embed() if covariance_type == "full" else p
    return [t.requires_grad_() for t in (make(n, d), make(k), make(k, d), p)]
def run(args):
    lp = ops.gmm_log_prob(*args, covariance_type)
    return lp, torch.autograd.grad(lp, args, torch.ones_like(lp))
run(mixture(100))
args, ones = mixture(n), torch.ones(n)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lp, grads = run(args)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outputs = 4 * (2 * lp.numel() + sum(t.numel() for t in grads))
print((after - before) * 1024 - outputs)
"""


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_nothing_of_size_n_times_k(covariance_type):
    """Peak memory beyond results and gradients, at 100k x 16, k=32 (full) and 1M x 16, k=64 (diag)."""
    done = subprocess.run([sys.executable, "-c", _PEAK, covariance_type], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 << 20


def test_bad_arguments():
    x, w, m, p = mixture(5, 3, 2, "full", F32)
    bad = [
        (([1.0], w, m, p), {}, TypeError, "x must be a torch.Tensor, got list"),
        ((x, w, m, None), {}, TypeError, "precisions_cholesky must be a torch.Tensor, got NoneType"),
        ((x.long(), w, m, p), {}, TypeError, "x must be a floating-point tensor, got torch.int64"),
        ((x, w.double(), m, p), {}, TypeError, "log_weights must be torch.float32 as x, got torch.float64"),
        ((x[0], w, m, p), {}, ValueError, "x must be [..., n, d], got (3,)"),
        ((x, w, m[:, :2], p), {}, ValueError, "means must be [..., k, d] with d=3 as in x, got (2, 2)"),
        ((x, w[:1], m, p), {}, ValueError, "log_weights must be [..., k] with k=2 as in means, got (1,)"),
        ((x, w, m, p[:, :2]), {}, ValueError, "precisions_cholesky must be [..., k, d, d] for "
         "covariance_type='full' with k=2, d=3 as in means, got (2, 2, 3)"),
        ((x, w, m, p), {"covariance_type": "diag"}, ValueError, "must be [..., k, d] for covariance_type='diag'"),
        ((x, w, m, p), {"covariance_type": "round"}, ValueError,
         "covariance_type must be one of 'full', 'tied', 'diag', 'spherical', got 'round'"),
        ((x.expand(2, 5, 3), w.expand(3, 2), m, p), {}, ValueError, "must broadcast, got (2,), (3,), (), ()"),
        ((x, w, m.to("meta"), p), {}, (ValueError, RuntimeError), "device"),
    ]
    for args, options, kind, message in bad:
        with pytest.raises(kind, match=re.escape(message)):
            ops.gmm_log_prob(*args, **options)
