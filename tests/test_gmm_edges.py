"""Edges of the GMM kernels that the tests by shape do not meet: whole blocks, odd places of NaN and infinity, empty
batches, and which kernel, of what size, is launched."""

import pytest
import torch

import cases
from gmkernels import ops, reference
from gmkernels.ops.gmm_inference import _sample_launch
from test_gmm import F32, F64, INF, NAN, check, mixture, run


def threads_of(f):
    """How many threads the emulator runs in f()."""
    from simt import backend

    backend.module().counters()
    f()
    return backend.module().counters()[0]


# gmm_log_prob --------------------------------------------------------------------------------------------------------


def test_whole_blocks_of_rows_in_global_memory(device):
    """No row is left over, and x does not fit into shared memory: nothing behind it is read."""
    check(mixture(64, 50, 1, "diag", F64, device.torch), "diag")


def test_features_beyond_all_shared_memory(device):
    """64 rows of 1000 features are 250 KiB: they stay where they are."""
    check(mixture(1, 1000, 1, "diag", F32, device.torch), "diag", rtol=4e-4)


@pytest.mark.parametrize("n", [128, 129])
def test_one_row_more_than_a_block(device, n):
    args = mixture(n, 9, 1, "full", F32, device.torch)
    lp = ops.gmm_log_prob(*args, "full")
    cases.close(lp, ops.gmm_log_prob(*(t.double() for t in args), "full"), rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_nan_and_infinity_in_one_row(device, dtype, covariance_type):
    """A NaN wins wherever it is; an infinity alone is no density, even where P makes a NaN of it."""
    x, lw, means, p = mixture(4, 3, 2, covariance_type, dtype, device.torch)
    if covariance_type == "full":
        p[:, 0, 1] = 0
    x[0, 0], x[0, 2] = INF, NAN
    x[1, 0], x[1, 2] = NAN, -INF
    x[2, 0] = INF
    lp = ops.gmm_log_prob(x, lw, means, p, covariance_type)
    assert lp[:2].isnan().all() and lp[2] == -INF and lp[3].isfinite()


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_nan_in_every_feature_alone(device, dtype, covariance_type):
    x, lw, means, p = mixture(10, 9, 2, covariance_type, dtype, device.torch)
    x[range(9), range(9)] = NAN
    lp = ops.gmm_log_prob(x, lw, means, p, covariance_type)
    assert lp[:9].isnan().all() and lp[9].isfinite()


@pytest.mark.parametrize("d, k", [(8, 17), (24, 11)])
def test_one_step_more_than_whole_chunks(device, d, k):
    """The prepared parameters come eight steps at a time: 17 and 33 of them."""
    args = mixture(3, d, k, "full", F32, device.torch)
    lp = ops.gmm_log_prob(*args, "full")
    cases.close(lp, ops.gmm_log_prob(*(t.double() for t in args), "full"), rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("d", [3, 9])
@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_infinite_rows_where_parameters_are_nan(device, covariance_type, d):
    x, lw, means, p = mixture(2, d, 2, covariance_type, F32, device.torch)
    x[0, 1], means[1, 0] = INF, NAN
    lp = ops.gmm_log_prob(x, lw, means, p, covariance_type)
    assert lp[0] == -INF and lp[1].isnan()


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_left_out_whatever_the_other_scales_are(device, covariance_type):
    """Without weight, or with one scale of 0, in every lane of a warp."""
    x, lw, means, p = mixture(3, 40, 3, covariance_type, F32, device.torch)
    lw[0], p[0] = -INF, NAN
    if covariance_type == "diag":
        p[1, 7], p[1, 8], p[1, 39] = 0, NAN, NAN
    else:
        p[1] = 0
    ones = torch.ones(3, device=device.torch)
    lp, grads = run([x, lw, means, p], covariance_type, ones)
    want, wanted = run([x, lw[2:], means[2:], p[2:]], covariance_type, ones)
    assert torch.equal(lp, want) and torch.equal(grads[0], wanted[0])
    assert all((g[:2] == 0).all() for g in grads[1:])


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
def test_unit_precisions(device, covariance_type):
    x, lw, means, p = mixture(3, 9, 2, covariance_type, F32, device.torch)
    p = torch.eye(9, device=p.device).expand(p.shape) if covariance_type in ("full", "tied") else torch.ones_like(p)
    check([x, lw, means, p], covariance_type)


def test_x_at_an_odd_address(device):
    """Rows of 16 bytes that begin 4 bytes after a multiple of 16: one at each remainder of 15, too."""
    x, lw, means, p = mixture(1, 4, 1, "diag", F32, device.torch, batch=(15,))
    odd = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    check([odd, lw, means, p], "diag")


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_weights_of_exactly_one(device, covariance_type):
    """Every row, under each of four equal components: grad_x is four times that of one."""
    x, lw, means, p = (t.expand(4, *t.shape[1:]) if i else t
                       for i, t in enumerate(mixture(64, 5, 1, covariance_type, F32, device.torch)))
    one = lw[:1], means[:1], p[:1]
    log_prob = ops.gmm_log_prob(x, *one, covariance_type)
    backward, ones = torch.ops.gmkernels.gmm_log_prob_backward, torch.ones(64, device=device.torch)
    want = backward(ones, log_prob, x, *one, covariance_type, True, False)[0]
    cases.close(backward(ones, log_prob, x, lw, means, p, covariance_type, True, False)[0], 4 * want.double())


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_one_block_for_all_rows(device, covariance_type):
    """Its warps go on to the next rows together."""
    with cases.few_blocks(device, 1):
        check(mixture(260, 9, 2, covariance_type, F32), covariance_type)


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag"])
def test_no_mixtures(device, covariance_type):
    for n in (0, 2):
        args = mixture(n, 9, 2, covariance_type, F32, device.torch, batch=(0,))
        assert ops.gmm_log_prob(*args, covariance_type).shape == (0, n)


def test_sizes_of_blocks(device):
    """How many threads run tells the kernel, and how many rows a block holds."""
    if not device.simt:
        pytest.skip("the emulator counts threads")
    x = mixture(9, 16, 1, "diag", F32)
    assert threads_of(lambda: ops.gmm_log_prob(*x, "diag")) == 32  # the plain path: 64
    # With as many rows of grad_x, 128 rows of 64 features are 68 KiB: an sm_75 has 64.
    x = mixture(129, 64, 1, "diag", F32)
    assert threads_of(lambda: ops.gmm_score(*x, "diag")) == 2 * 64 + 3 * 32
    # 65 rows of 72 features are two blocks: 128 rows of 128 features, with parameters, need more than 99 KiB.
    x = mixture(65, 72, 1, "full", F32)
    assert threads_of(lambda: ops.gmm_log_prob(*x, "full")) == 128 + 2 * 128


@pytest.mark.parametrize("op", ["gmm_log_prob", "gmm_sample"])
def test_2_32_jobs_emulator(op):
    """The launch alone: 32 bits of their number are 0."""
    backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    many, nothing = 2**32, torch.empty(0, 0)
    out = backend.huge.empty((many, 1), F32)
    with backend.running(blocks=[132 * 16]):  # one past the last
        if op == "gmm_log_prob":
            ops.gmm_log_prob(torch.empty(many, 1, 0), nothing[0:0].flatten(), nothing, nothing, "tied", out=out)
        else:
            component = backend.huge.empty((many,), torch.int64)
            _sample_launch((out, component), torch.zeros(1, 1), torch.ones(1), torch.ones(1).double(), None, many, 7,
                           "spherical")
        assert len(backend.written(out)) == 0


# gmm_sample ----------------------------------------------------------------------------------------------------------


def test_samples_of_two_mixtures_with_a_seed_each(device):
    _, *parameters = mixture(1, 3, 4, "diag", F32, device.torch, batch=(2,))
    seeds = torch.tensor([7, 8], device=device.torch)
    x, c = ops.gmm_sample(6, *parameters, "diag", seed=seeds)
    for i in range(2):
        alone = ops.gmm_sample(6, *(t[i] for t in parameters), "diag", seed=7 + i)
        assert torch.equal(x[i], alone[0]) and torch.equal(c[i], alone[1])


def test_a_component_begins_where_the_cdf_before_it_ends(device):
    """The first whose cdf exceeds (word + 0.5) / 2^32: not one that equals it."""
    word = reference.random.philox_words(torch.tensor([0]), 0, 3, torch.tensor(7))[0, 0]
    u = (word.double() + 0.5) * 2.0**-32
    for first, want in ((u, 1), (torch.nextafter(u, u + 1), 0), (torch.nextafter(u, u - 1), 1)):
        cdf = torch.tensor([first, 1.0], dtype=F64, device=device.torch)
        x, c = torch.empty(1, 1, device=device.torch), torch.empty(1, dtype=torch.int64, device=device.torch)
        means, p = torch.tensor([[-50.0], [50.0]], device=device.torch), torch.ones(1, 1, device=device.torch)
        _sample_launch((x, c), means, p, cdf, None, 1, 7, "tied")
        assert c.item() == want and (x.item() > 0) == want
