"""ops.gmm_fit: the kernel against its reference and scikit-learn, starts, threads, repairs, odd values, errors."""

import dataclasses
import functools
import math
import re
import warnings

import numpy as np
import pytest
import torch

import cases
from gmkernels import _C, ops, reference
from test_gmm import TYPES

F32, F64, INF, NAN = torch.float32, torch.float64, math.inf, math.nan
FIELDS = [f.name for f in dataclasses.fields(ops.GmmFit) if f.name != "covariance_type"]
PARAMETERS = FIELDS[:5]


def rows_of(*batch, n=60, d=3, k=2, dtype=F64, apart=2.0, seed=0):
    """Overlapping clusters, [*batch, n, d]."""
    centres = apart * cases.data(*batch, k, d, seed=seed + 1)
    label = torch.arange(n) % k
    return (centres[..., label, :] + cases.data(*batch, n, d, seed=seed)).to(dtype)


def weights_of(*shape, dtype=F64):
    return (0.1 + cases.data(*shape, seed=11).abs()).to(dtype)


def run_reference(x, k, covariance_type="full", sample_weight=None, responsibilities=None, start=(None, None, None),
                  rounds=20, max_iter=100, tol=1e-3, reg_covar=1e-6, n_init=1, seed=0):
    made = reference.gmm_fit.gmm_fit(x, sample_weight, None, responsibilities, *start, k, covariance_type, max_iter,
                                     rounds, 2 + int(math.log(k)), n_init, seed, tol, reg_covar)
    return dict(zip(FIELDS, made, strict=True))


def check(fit, want, rtol):
    for name in FIELDS:
        got = getattr(fit, name).cpu()
        assert got.shape == want[name].shape and got.dtype is want[name].dtype, name
        if name in PARAMETERS or name == "log_likelihood":
            scale = max([abs(v) for v in want[name].double().flatten().tolist() if math.isfinite(v)], default=1.0)
            torch.testing.assert_close(got, want[name], rtol=0, atol=rtol * max(scale, 1.0), equal_nan=True,
                                       msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert torch.equal(got, want[name]), name


def same_bits(a, b):
    return all(torch.equal(getattr(a, name).contiguous().view(-1).view(torch.uint8),
                           getattr(b, name).contiguous().view(-1).view(torch.uint8)) for name in FIELDS)


# values --------------------------------------------------------------------------------------------------------------


# n, d, k: both layouts of the sums (k below and above the lanes), remainders of blocks, features that are not kept
SHAPES = [(1, 1, 1), (60, 3, 2), (127, 2, 3), (129, 5, 2), (200, 4, 13), (65, 9, 4), (260, 13, 2)]


@functools.cache
def expected(shape, covariance_type, dtype):
    """Arguments, and the reference's fit of them."""
    n, d, k = shape
    x = rows_of(2, n=n, d=d, k=k, dtype=dtype)
    w = weights_of(n, dtype=dtype) if n % 2 else None
    # a component with fewer rows than features is as sure as its ridge allows
    options = {"max_iter": 4, "reg_covar": 1e-2, "sample_weight": w}
    return x, options, run_reference(x, k, covariance_type, seed=3, **options)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_reference(isa, covariance_type):
    for shape in SHAPES:
        for dtype in cases.FLOATS:
            x, options, want = expected(shape, covariance_type, dtype)
            check(ops.gmm_fit(x, shape[2], covariance_type, seed=3, **options), want, 1e-9 if dtype is F64 else 1e-5)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_on_every_device(device, covariance_type):
    x = rows_of(3, dtype=F32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = x.to(device.torch)
        fit = ops.gmm_fit(there, 2, covariance_type, seed=1, n_init=2)
    assert fit.means.device == there.device and fit.converged.all()
    check(fit, run_reference(x, 2, covariance_type, seed=1, n_init=2), 1e-5)


def scikit_learn(x, covariance_type, start, **options):
    """scikit-learn's own fit from a given mixture."""
    from sklearn.mixture import GaussianMixture

    factors = start.precisions_cholesky
    if covariance_type in ("full", "tied"):
        factors = factors @ factors.mT
    else:
        factors = factors**2
    model = GaussianMixture(len(start.weights), covariance_type=covariance_type, weights_init=start.weights.numpy(),
                            means_init=start.means.numpy(), precisions_init=factors.numpy(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(x.numpy())


@pytest.mark.parametrize("covariance_type", TYPES)
def test_scikit_learn_from_the_same_mixture(isa, covariance_type):
    x = rows_of(4, n=200, d=4, k=3)
    start = ops.gmm_fit(x, 3, covariance_type, max_iter=0, seed=0)
    assert (start.n_iter == 0).all() and (start.log_likelihood == -INF).all() and not start.converged.any()
    fit = ops.gmm_fit(x, 3, covariance_type, init=start)
    assert fit.converged.all()
    for b in range(4):
        one = ops.GmmParameters(*(getattr(start, name)[b] for name in PARAMETERS), start.status[b], covariance_type)
        model = scikit_learn(x[b], covariance_type, one)
        assert fit.n_iter[b] == model.n_iter_ and model.converged_
        pairs = ((fit.weights, model.weights_), (fit.means, model.means_), (fit.covariances, model.covariances_),
                 (fit.precisions_cholesky, model.precisions_cholesky_), (fit.log_likelihood, model.lower_bound_))
        for got, want in pairs:
            np.testing.assert_allclose(got[b].numpy(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_scikit_learn_from_the_same_responsibilities(covariance_type):
    """Its k-means labels as our start: scikit-learn's default path, to the end."""
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    x = rows_of(n=150, d=3, k=3, seed=5)
    labels = KMeans(3, n_init=1, random_state=np.random.RandomState(0)).fit(x.numpy()).labels_
    model = GaussianMixture(3, covariance_type=covariance_type, random_state=0).fit(x.numpy())
    r = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 3).double()
    fit = ops.gmm_fit(x, 3, covariance_type, responsibilities=r)
    assert fit.n_iter == model.n_iter_ and bool(fit.converged) == model.converged_
    np.testing.assert_allclose(fit.means.numpy(), model.means_, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(fit.covariances.numpy(), model.covariances_, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(fit.log_likelihood.item(), model.lower_bound_, rtol=1e-12)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_results_are_a_mixture(covariance_type):
    """What comes back goes into the other ops, and is a fixed point of theirs."""
    x = rows_of(2, n=90)
    fit = ops.gmm_fit(x, 2, covariance_type, tol=1e-13, max_iter=2000, seed=0)
    lp = ops.gmm_log_prob(x, fit.log_weights, fit.means, fit.precisions_cholesky, covariance_type)
    cases.close(lp.mean(-1), fit.log_likelihood, rtol=1e-9)
    stat = ops.gmm_em_statistics(x, fit.log_weights, fit.means, fit.precisions_cholesky, covariance_type)
    again = ops.gmm_m_step(stat)
    for name in PARAMETERS:
        cases.close(getattr(again, name), getattr(fit, name), rtol=1e-4, atol=1e-4)
    cases.close(fit.weights.sum(-1), torch.ones(2, dtype=F64))


def test_a_falling_likelihood_does_not_stop():
    """From the unregularised optimum, reg_covar pulls the likelihood down: a change, whatever its sign."""
    x = rows_of(n=80)
    best = ops.gmm_fit(x, 2, seed=0, tol=1e-6)
    fit = ops.gmm_fit(x, 2, init=best, reg_covar=0.5)
    assert fit.log_likelihood < best.log_likelihood - 1e-2 and fit.n_iter > 2 and fit.converged


def test_float32_far_from_the_origin():
    """Everything is about the mean of the rows: the float32 fit is that of the same numbers in float64."""
    x = rows_of(2, n=100, dtype=F32) + 4096
    single, double = (ops.gmm_fit(t, 2, seed=0) for t in (x, x.double()))
    assert torch.equal(single.n_iter, double.n_iter) and torch.equal(single.log_likelihood, double.log_likelihood)
    assert torch.equal(single.covariances, double.covariances.float())
    near = ops.gmm_fit(x.double() - 4096, 2, seed=0)
    cases.close(double.means, near.means + 4096, rtol=1e-9)
    cases.close(double.covariances, near.covariances, rtol=1e-9)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_weights_are_repetitions(covariance_type):
    x = rows_of(n=50)
    counts = 1 + torch.arange(50) % 3
    counts[7] = 0
    dirty = x.clone()
    dirty[7] = NAN
    means = x[:2]
    a = ops.gmm_fit(dirty, 2, covariance_type, sample_weight=counts.double(), init=means)
    b = ops.gmm_fit(x.repeat_interleave(counts, 0), 2, covariance_type, init=means)
    assert a.n_iter == b.n_iter
    for name in (*PARAMETERS, "log_likelihood"):
        cases.close(getattr(a, name), getattr(b, name), rtol=1e-9)
    # also in the picks: a row of weight 0 is never one
    c = ops.gmm_fit(dirty.expand(20, 50, 3), 3, covariance_type, sample_weight=counts.double(), seed=0)
    assert c.means.isfinite().all()


# starts --------------------------------------------------------------------------------------------------------------


def test_means_begin_with_the_nearest():
    x = torch.tensor([[0.0], [1.0], [9.0], [10.0], [12.0]], dtype=F64)
    fit = ops.gmm_fit(x, 2, "diag", init=torch.tensor([[0.0], [11.0]], dtype=F64), max_iter=0, reg_covar=0.0)
    assert fit.weights.tolist() == [0.4, 0.6] and fit.status.tolist() == [0, 0]
    cases.close(fit.means, torch.tensor([[0.5], [31 / 3]], dtype=F64))
    cases.close(fit.covariances, torch.tensor([[0.25], [14 / 9]], dtype=F64))


def test_lloyd_rounds_follow_the_picks():
    x = rows_of(30, n=100, k=4, apart=4.0)
    few, many = (ops.gmm_fit(x, 4, "spherical", init=init, max_iter=0, seed=0) for init in ("k-means++", "kmeans"))
    assert not torch.equal(few.means, many.means)

    def inertia(fit):
        return (x[:, :, None] - fit.means[:, None]).square().sum(-1).amin(-1).sum()

    assert inertia(many) < inertia(few)


def test_picks_have_the_frequencies_of_k_means_plus_plus():
    """One candidate by weight for the first pick; then squared distances times weights, the better of two kept."""
    x = torch.tensor([[0.0], [1.0], [3.5], [8.0]], dtype=F64)  # no ties
    w = torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=F64)
    b = 20_000
    fit = ops.gmm_fit(x.expand(b, 4, 1), 2, "diag", sample_weight=w, init="k-means++", max_iter=0, seed=5)
    square = (x - x.T) ** 2
    count, draws = torch.zeros(4, 4), 2 + int(math.log(2))
    for first in range(4):
        p = w * square[first]
        p = p / p.sum()
        potential = (w * torch.minimum(square, square[first])).sum(1)
        for i in range(4):
            for j in range(4):  # two candidates, the first of equal ones
                best = i if potential[i] <= potential[j] else j
                count[first, best] += w[first] / w.sum() * p[i] * p[j]
    assert draws == 2
    # which pairs of rows: from the labels, told apart by weight and mean of the first component
    want = {}
    for first in range(4):
        for second in range(4):
            if count[first, second] == 0:
                continue
            near = (square[first] <= square[second])
            key = round(float((w * near).sum() / 5), 6), round(float((w * near * x[:, 0]).sum() / (w * near).sum()), 6)
            want[key] = want.get(key, 0) + float(count[first, second])
    got = {}
    for weight, mean in zip(fit.weights[:, 0].tolist(), fit.means[:, 0, 0].tolist(), strict=True):
        key = round(weight, 6), round(mean, 6)
        got[key] = got.get(key, 0) + 1
    assert got.keys() <= want.keys()
    chi = sum((got.get(key, 0) - b * p) ** 2 / (b * p) for key, p in want.items())
    assert chi < len(want) + 6 * math.sqrt(2 * len(want))


def test_seeds():
    x = rows_of(n=40, k=3, apart=1.0).expand(6, 40, 3)
    one = ops.gmm_fit(x, 3, seed=7, max_iter=2)
    assert same_bits(one, ops.gmm_fit(x, 3, seed=7, max_iter=2))
    assert not same_bits(one, ops.gmm_fit(x, 3, seed=8, max_iter=2))
    assert len({tuple(m.flatten().tolist()) for m in one.means}) > 1  # an int counts over the batch
    seeds = torch.tensor([3, 7, 3, 9, 2**62, -5])
    own = ops.gmm_fit(x, 3, seed=seeds, max_iter=2)
    assert torch.equal(own.means[0], own.means[2])
    part = ops.gmm_fit(x[3:], 3, seed=seeds[3:], max_iter=2)
    assert torch.equal(part.means, own.means[3:])
    assert torch.equal(ops.gmm_fit(x[:1], 3, seed=7, max_iter=2).means, one.means[:1])
    assert torch.equal(ops.gmm_fit(x, 3, seed=torch.tensor(7), max_iter=2).means, one.means)
    torch.manual_seed(0)
    a = ops.gmm_fit(x, 3, max_iter=2)
    torch.manual_seed(0)
    assert same_bits(a, ops.gmm_fit(x, 3, max_iter=2)) and not same_bits(a, ops.gmm_fit(x, 3, max_iter=2))


def test_the_best_of_several_starts():
    x = rows_of(30, n=60, k=5, apart=3.0)
    runs = [ops.gmm_fit(x, 5, "diag", n_init=r, seed=0) for r in (1, 2, 6)]
    assert (runs[1].log_likelihood >= runs[0].log_likelihood).all()
    assert (runs[2].log_likelihood >= runs[1].log_likelihood).all()
    assert (runs[2].log_likelihood > runs[0].log_likelihood + 0.01).any()
    lp = ops.gmm_log_prob(x, runs[2].log_weights, runs[2].means, runs[2].precisions_cholesky, "diag").mean(-1)
    cases.close(lp, runs[2].log_likelihood, rtol=0, atol=2e-3)  # one M-step, below tol, later


# batches, threads, layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance_type", TYPES)
def test_leading_dimensions_broadcast(covariance_type):
    x = rows_of(2, 3, n=40)
    w = weights_of(3, 40)
    start = ops.gmm_fit(x[:, :1], 2, covariance_type, seed=0, max_iter=1)
    fit = ops.gmm_fit(x, 2, covariance_type, sample_weight=w, init=start)
    assert fit.means.shape == (2, 3, 2, 3) and fit.n_iter.shape == (2, 3)
    one_start = ops.GmmParameters(*(getattr(start, name)[1, 0] for name in PARAMETERS), None, covariance_type)
    one = ops.gmm_fit(x[1, 2], 2, covariance_type, sample_weight=w[2], init=one_start)
    for name in FIELDS:
        assert torch.equal(getattr(one, name), getattr(fit, name)[1, 2]), name
    # one data set, many weights: a bootstrap
    shared = ops.gmm_fit(x[0, 0], 2, covariance_type, sample_weight=w, init=x[0, 0, :2])
    assert shared.weights.shape == (3, 2)
    alone = ops.gmm_fit(x[0, 0], 2, covariance_type, sample_weight=w[1], init=x[0, 0, :2])
    assert torch.equal(alone.means, shared.means[1])
    # many responsibilities
    r = weights_of(4, 40, 2)
    assert ops.gmm_fit(x[0, 0], 2, covariance_type, responsibilities=r).means.shape == (4, 2, 3)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_same_bits_on_any_number_of_threads(isa, covariance_type):
    for k in (3, 9):
        results = []
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            results.append(ops.gmm_fit(rows_of(40, n=70, k=k, dtype=F32), k, covariance_type, seed=0, max_iter=8))
        assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_instruction_sets_agree():
    """To rounding; picks and labels, which no rounding may decide, exactly."""
    x = torch.round(2 * rows_of(50, n=70, k=3))  # full of equal distances
    results = []
    for name in _C.isas():
        _C.set_isa(name)
        results.append((ops.gmm_fit(x, 3, seed=0, max_iter=0), ops.gmm_fit(x, 3, seed=0, max_iter=5)))
    for start, fit in results[1:]:
        assert torch.equal(start.weights, results[0][0].weights)
        for name in PARAMETERS[:4]:
            cases.close(getattr(fit, name), getattr(results[0][1], name), rtol=1e-7, atol=1e-7)


def test_strided_rows():
    x = rows_of(3, n=50)
    want = ops.gmm_fit(x, 2, init=x[:, :2])
    wide = torch.zeros(3, 100, 6, dtype=F64)
    wide[:, ::2, ::2] = x
    for view in (wide[:, ::2, ::2], x.permute(2, 0, 1).contiguous().permute(1, 2, 0), x.flip(1).flip(1)):
        assert same_bits(ops.gmm_fit(view, 2, init=x[:, :2]), want)
    expanded = x[:1].expand(5, 50, 3)
    assert torch.equal(ops.gmm_fit(expanded, 2, init=x[0, :2]).means[4], want.means[0])


def test_empty_batch():
    for shape in ((0,), (2, 0)):
        fit = ops.gmm_fit(torch.zeros(*shape, 5, 3), 2, seed=0)
        assert fit.means.shape == (*shape, 2, 3) and fit.converged.shape == shape
        for name, t in run_reference(torch.zeros(*shape, 5, 3), 2).items():
            assert t.shape == getattr(fit, name).shape and t.dtype is getattr(fit, name).dtype, name


# repairs and odd values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("covariance_type", TYPES)
def test_constant_columns_and_duplicate_rows(covariance_type, dtype):
    x = rows_of(n=60, dtype=dtype)
    constant = x.clone()
    constant[:, 1] = 2.0
    for rows in (constant, x[torch.arange(60) % 2], x[:1].expand(60, 3)):
        for reg_covar in (1e-6, 0.0):
            fit = ops.gmm_fit(rows, 3, covariance_type, reg_covar=reg_covar, seed=0)
            assert all(getattr(fit, name).isfinite().all() for name in (*PARAMETERS, "log_likelihood"))
            assert (fit.status < 3).all()
            lp = ops.gmm_log_prob(rows, fit.log_weights, fit.means, fit.precisions_cholesky, covariance_type)
            assert lp.isfinite().all()
        if covariance_type == "full":  # without a ridge of its own every component needs one
            assert (fit.recovered > 0).any()


@pytest.mark.parametrize("covariance_type", TYPES)
def test_dead_components_are_recovered_and_counted(covariance_type):
    x = torch.cat([cases.data(100, 2), 30 + cases.data(100, 2, seed=1)])
    far = torch.tensor([[0.0, 0.0], [30.0, 30.0], [1e6, 0.0]], dtype=F64)
    fit = ops.gmm_fit(x, 3, covariance_type, init=far, max_iter=50)
    assert fit.recovered.tolist() == [0, 0, 1] and fit.status.tolist() == [0, 0, 0]
    assert (fit.weights > 1e-3).all() and (fit.means < 40).all()
    start = ops.gmm_fit(x, 3, covariance_type, init=far, max_iter=0)
    assert start.status.tolist() == [0, 0, 1] and start.recovered.tolist() == [0, 0, 1]


def test_numbers_that_overflow_are_reported():
    x = rows_of(4, n=30)
    x[1] *= 1e200
    x[2, 3] = 1e308
    fit = ops.gmm_fit(x, 2, seed=0, n_init=3)
    assert fit.status.tolist() == [[0, 0], [3, 3], [3, 3], [0, 0]]
    assert fit.converged.tolist() == [True, False, False, True]
    for name in (*PARAMETERS, "log_likelihood"):
        t = getattr(fit, name)
        assert t[1:3].isnan().all() and t[[0, 3]].isfinite().all()
    want = run_reference(x, 2)
    assert torch.equal(want["status"], fit.status) and torch.equal(want["converged"], fit.converged)
    assert want["covariances"][1:3].isnan().all() and want["log_likelihood"][1:3].isnan().all()


def test_as_many_components_as_rows():
    fit = ops.gmm_fit(rows_of(n=5), 5, "diag", seed=0)
    assert sorted(round(w, 6) for w in fit.weights.tolist()) == [0.2] * 5
    cases.close(fit.covariances, torch.full((5, 3), 1e-6, dtype=F64), rtol=1e-6)


# routes and errors ---------------------------------------------------------------------------------------------------


def test_half_types_run_the_reference():
    x = rows_of(n=30, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="gmm_fit: no torch.bfloat16 kernel"):
        fit = ops.gmm_fit(x, 2, seed=0)
    cases.close(fit.means, ops.gmm_fit(x.double(), 2, seed=0).means, rtol=1e-2, atol=1e-2)


def test_opcheck_and_compile():
    x = rows_of(2, n=20, dtype=F32)
    args = x, None, None, None, None, x[:, :2], None, 2, "full", 3, 0, 2, 1, 0, 1e-3, 1e-6
    torch.library.opcheck(torch.ops.gmkernels.gmm_fit.default, args, test_utils=("test_schema", "test_faketensor"))

    def fit(x):
        made = ops.gmm_fit(x, 2, "diag", init=x[:, :2], max_iter=4)
        return made.means, made.n_iter

    torch._dynamo.reset()
    for got, want in zip(torch.compile(fit, fullgraph=True)(x), fit(x), strict=True):
        assert torch.equal(got, want)


def test_no_gradient_is_said():
    fit = ops.gmm_fit(rows_of(n=20).requires_grad_(), 2, seed=0)
    with pytest.raises(NotImplementedError, match="gmm_fit has no backward"):
        fit.means.sum().backward()


def test_bad_arguments():
    x = rows_of(2, n=5, dtype=F32)
    nan, inf = x.clone(), x.clone()
    nan[1, 2, 0], inf[0, 0, 0] = NAN, INF
    start = ops.gmm_fit(x, 2, seed=0, max_iter=1)
    one = torch.ones(5)
    bad = [
        (([1.0], 2), {}, TypeError, "x must be a torch.Tensor, got list"),
        ((x.long(), 2), {}, TypeError, "x must be a floating-point tensor, got torch.int64"),
        ((x[0, 0], 2), {}, ValueError, "x must be [..., n, d], got (3,)"),
        ((x, 0), {}, ValueError, "k must be in [1, 2147483648), got 0"),
        ((x, 2.0), {}, TypeError, "k must be an integer, got float"),
        ((x[..., :0], 2), {}, ValueError, "x must have at least one feature, got (2, 5, 0)"),
        ((x, 6), {}, ValueError, "x must have at least k=6 rows, got n=5"),
        ((x[:, :0], 1), {}, ValueError, "x must have at least k=1 rows, got n=0"),
        ((nan, 2), {}, ValueError, "x must be finite, got NaN or infinity"),
        ((inf, 2), {}, ValueError, "x must be finite, got NaN or infinity"),
        ((nan, 2), {"sample_weight": one}, ValueError, "x must be finite, got NaN or infinity"),
        ((x, 2, "round"), {}, ValueError, "covariance_type must be one of"),
        ((x, 2), {"sample_weight": [1.0] * 5}, TypeError, "sample_weight must be a torch.Tensor, got list"),
        ((x, 2), {"sample_weight": one[:4]}, ValueError,
         "sample_weight must be [..., n] with n=5 as in x, got (4,)"),
        ((x, 2), {"sample_weight": one.double()}, TypeError,
         "sample_weight must be torch.float32 as x, got torch.float64"),
        ((x, 2), {"sample_weight": one.expand(3, 5)}, ValueError,
         "the leading dimensions of sample_weight must broadcast with (2,) of the others, got (3,)"),
        ((x, 2), {"sample_weight": -one}, ValueError, "sample_weight must be finite and not negative"),
        ((x, 2), {"sample_weight": one * NAN}, ValueError, "sample_weight must be finite and not negative"),
        ((x, 2), {"sample_weight": 0 * one}, ValueError,
         "every mixture needs at least k=2 rows of positive sample_weight, one has 0"),
        ((x, 2), {"max_iter": -1}, ValueError, "max_iter must be in [0, 2147483648), got -1"),
        ((x, 2), {"n_init": 0}, ValueError, "n_init must be in [1, 2147483648), got 0"),
        ((x, 2), {"tol": -1.0}, ValueError, "tol must be finite and not negative, got -1.0"),
        ((x, 2), {"tol": NAN}, ValueError, "tol must be finite and not negative, got nan"),
        ((x, 2), {"reg_covar": -1e-6}, ValueError, "reg_covar must be finite and not negative, got -1e-06"),
        ((x, 2), {"init": "random"}, ValueError, "init must be one of 'kmeans', 'k-means++', got 'random'"),
        ((x, 2), {"init": 3}, TypeError, "init must be a str, a torch.Tensor or GmmParameters, got int"),
        ((x, 2), {"init": x[:, :3]}, ValueError, "init must be [..., k, d] with k=2, d=3, got (2, 3, 3)"),
        ((x, 2), {"init": x[0, 0]}, ValueError, "init must be [..., k, d] with k=2, d=3, got (3,)"),
        ((x, 2), {"init": nan[:, 2:4]}, ValueError, "init must be finite"),
        ((x, 2), {"init": x[:, :2].double()}, TypeError, "init must be torch.float32 as x, got torch.float64"),
        ((x, 2, "diag"), {"init": start}, ValueError,
         "init must be a mixture of covariance_type='diag', got 'full'"),
        ((x, 3), {"init": start}, ValueError, "log_weights of init must be [..., k] with k=3, got (2, 2)"),
        ((x, 2), {"init": dataclasses.replace(start, means=start.means * NAN)}, ValueError,
         "means of init must be finite"),
        ((x, 2), {"init": dataclasses.replace(start, log_weights=torch.full((2,), -INF))}, ValueError,
         "log_weights of init must be below infinity, and not all -inf"),
        ((x, 2), {"init": start, "n_init": 2}, ValueError, "n_init must be 1 where the start is given, got 2"),
        ((x, 2), {"init": start, "responsibilities": torch.ones(5, 2)}, ValueError,
         "init and responsibilities are two starts"),
        ((x, 2), {"responsibilities": torch.ones(5, 3)}, ValueError,
         "responsibilities must be [..., n, k] with n=5, k=2, got (5, 3)"),
        ((x, 2), {"responsibilities": -torch.ones(5, 2)}, ValueError, "responsibilities must be finite and not"),
        ((x, 2), {"responsibilities": np.ones((5, 2))}, TypeError, "responsibilities must be a torch.Tensor, got ndar"),
        ((x, 2), {"seed": torch.tensor([1, 2, 3])}, ValueError, "seed must have shape [] or [2], got (3,)"),
        ((x, 2), {"seed": 1.5}, TypeError, "seed must be an integer, got float"),
    ]
    for args, options, kind, message in bad:
        with pytest.raises(kind, match=re.escape(message)):
            ops.gmm_fit(*args, **options)
