"""k-means: data sets, memory, seeds, routes, bad input."""

import warnings

import pytest
import torch

from gmkernels import ops
from gmkernels.ops.kmeans import local_trials
from kmeans_cases import F32, F64, clusters, uniforms_of, weights_of

# data sets, memory ----------------------------------------------------------------------------------------------------


def test_leading_dimensions(device):
    x = clusters(90, 3, batch=(2, 3)).to(device.torch)
    w = weights_of(3, 90).to(device.torch)
    whole = ops.kmeans(x, 4, sample_weight=w, seed=0)
    assert whole.centers.shape == (2, 3, 4, 3) and whole.labels.shape == (2, 3, 90) and whole.n_iter.shape == (2, 3)
    start = ops.kmeans_plus_plus(x, 4, sample_weight=w, seed=0)[0]
    for i in range(2):
        for j in range(3):
            one = ops.kmeans(x[i, j], init=start[i, j], sample_weight=w[j])
            assert all(torch.equal(a[i, j], b) for a, b in zip(whole, one, strict=True))
    shared = ops.kmeans(x[0, 0], init=start)
    assert torch.equal(shared.labels[1, 2], ops.kmeans(x[0, 0], init=start[1, 2]).labels)


def test_many_data_sets_on_one_thread_each():
    x = clusters(2100, 2, batch=(40,), dtype=F32)
    made = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        made.append([*ops.kmeans_plus_plus(x, 3, seed=1), *ops.kmeans(x, 3, seed=1)])
    for others in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], others, strict=True))
    one = ops.kmeans(x[17], init=made[0][0][17])
    assert torch.equal(one.centers, made[0][2][17])


def test_strides(device):
    x = clusters(100, 4).to(device.torch)
    wide = torch.zeros(100, 3, 8, dtype=F64, device=device.torch)
    wide[:, 1, ::2] = x
    w = weights_of(200).to(device.torch)
    want = ops.kmeans(x, 5, seed=0, sample_weight=w[::2].contiguous())
    for view in (wide[:, 1, ::2], x.T.contiguous().T, torch.cat([x[:1], x])[1:]):
        got = ops.kmeans(view, 5, seed=0, sample_weight=w[::2])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    expanded = x[:1].expand(50, 4)
    assert ops.kmeans(expanded, 2, seed=0).inertia == 0


def test_huge_strides():
    far = torch.empty(1, dtype=torch.int8).new_empty(2**34)  # 16 GB of addresses, a few pages of memory
    x = far.view(F64).as_strided((4, 2), (2**28, 2**29 + 1))
    values = clusters(4, 2)
    x.copy_(values)
    got, want = ops.kmeans(x, 2, seed=0), ops.kmeans(values, 2, seed=0)
    assert torch.equal(got.labels, want.labels) and torch.equal(got.centers, want.centers)


# seeds ----------------------------------------------------------------------------------------------------------------


def test_seeds(device):
    x = clusters(200, 3, batch=(3,)).to(device.torch)
    seeds = torch.tensor([7, -1, 2**40], device=device.torch)
    each = ops.kmeans_plus_plus(x, 6, seed=seeds)[1]
    for i in range(3):
        assert torch.equal(each[i], ops.kmeans_plus_plus(x[i], 6, seed=int(seeds[i]))[1])
    torch.manual_seed(1)
    first, second = ops.kmeans_plus_plus(x[0], 6)[1], ops.kmeans_plus_plus(x[0], 6)[1]
    torch.manual_seed(1)
    assert torch.equal(first, ops.kmeans_plus_plus(x[0], 6)[1]) and not torch.equal(first, second)
    count = 1 + 5 * local_trials(6)
    words = ops.philox_uniform((count, 2), seed=7, stream=5, dtype=F64, device=device.torch)  # docs/random-numbers.md
    u = words[:, 0] + words[:, 1] * 2.0**-24
    assert torch.equal(each[0], ops.kmeans_plus_plus(x[0], 6, uniforms=u)[1])


# routes and errors ----------------------------------------------------------------------------------------------------


def test_opcheck_and_compile():
    x, w, u = clusters(50, 3, dtype=F32), weights_of(50, dtype=F32), uniforms_of(4, 0)
    utils = ("test_schema", "test_faketensor")
    for weights in (None, w):
        torch.library.opcheck(torch.ops.gmkernels.kmeans_plus_plus.default, (x, u, weights, 4, 3), test_utils=utils)
        torch.library.opcheck(torch.ops.gmkernels.kmeans.default, (x, x[:4] + 0, weights, 9, 1e-4), test_utils=utils)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.kmeans(x, 4, seed=3), fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), ops.kmeans(x, 4, seed=3), strict=True))


def test_half_precision_runs_the_reference():
    x = clusters(60, 3, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = ops.kmeans(x, 3, seed=0)
    assert got.centers.dtype is torch.bfloat16
    assert torch.equal(got.labels, ops.kmeans(x.float(), 3, seed=0).labels)


def test_no_gradient_is_said():
    x = clusters(20, 3).requires_grad_()
    with pytest.raises(NotImplementedError, match="kmeans has no backward"):
        ops.kmeans(x, 2, seed=0).centers.sum().backward()
    with pytest.raises(NotImplementedError, match="kmeans_plus_plus has no backward"):
        ops.kmeans_plus_plus(x, 2, seed=0)[0].sum().backward()


def test_bad_arguments():
    x, w = clusters(10, 3, dtype=F32), torch.ones(10)
    bad = [
        (([1.0], 2), {}, TypeError, "x must be a torch.Tensor, got list"),
        ((x.long(), 2), {}, TypeError, "x must be a floating-point tensor"),
        ((x[0], 2), {}, ValueError, r"x must be \[..., n, d\], got \(3,\)"),
        ((x, 0), {}, ValueError, "k must be at least 1 and at most the number of rows, n=10, got 0"),
        ((x, -1), {}, ValueError, "k must be at least 1"),
        ((x, 11), {}, ValueError, "n=10, got 11"),
        ((x[:0], 1), {}, ValueError, "n=0, got 1"),
        ((x, 2.0), {}, TypeError, "k must be an integer, got float"),
        ((x, True), {}, TypeError, "k must be an integer, got bool"),
        ((x,), {}, TypeError, "k must be given"),
        ((x, 2), {"init": "random"}, ValueError, "init must be 'k-means\\+\\+' or a tensor"),
        ((x, 2), {"init": x[:3]}, ValueError, r"with k=2, got \(3, 3\)"),
        ((x,), {"init": x[:3, :2]}, ValueError, "with d=3 as in x"),
        ((x,), {"init": x[0]}, ValueError, "init must be"),
        ((x,), {"init": x[:0]}, ValueError, "k must be at least 1"),
        ((x,), {"init": x[:2].double()}, TypeError, "init must be torch.float32 as x"),
        ((x,), {"init": x[:2], "seed": 1}, ValueError, "seed is for"),
        ((x,), {"init": x[:2].expand(4, 2, 3), "sample_weight": w.expand(3, 10)}, ValueError, "must broadcast"),
        ((x, 2), {"max_iter": -1}, ValueError, "max_iter must be in"),
        ((x, 2), {"tol": -1.0}, ValueError, "tol must be finite and not negative"),
        ((x, 2), {"tol": float("nan")}, ValueError, "tol must be finite and not negative"),
        ((x, 2), {"seed": 2**64}, ValueError, "seed"),
        ((x, 2), {"sample_weight": w[:9]}, ValueError, "with n=10 as in x"),
        ((x, 2), {"sample_weight": w.double()}, TypeError, "sample_weight must be torch.float32"),
        ((x, 2), {"sample_weight": w - 1.5}, ValueError, "not negative, got -0.5"),
        ((x, 2), {"sample_weight": w * 0}, ValueError, "above 0 in every data set"),
        ((x, 2), {"sample_weight": torch.stack([w, w * 0])}, ValueError, "above 0 in every data set"),
        ((x, 2), {"sample_weight": w * torch.inf}, ValueError, "got inf"),
        ((x, 2), {"sample_weight": w * torch.nan}, ValueError, "got nan"),
    ]
    for value, text in ((torch.nan, "nan"), (torch.inf, "inf"), (-torch.inf, "-inf"), (2.0**64, "1.84")):
        broken = x.clone()
        broken[7, 1] = value
        bad.append(((broken, 2), {"init": x[:2]}, ValueError, f"x must hold finite numbers.*got {text}"))
        bad.append(((x, None), {"init": broken[6:8]}, ValueError, "init must hold finite numbers"))
        bad.append(((broken, 2), {"seed": 0}, ValueError, "x must hold finite numbers"))
    for arguments, more, error, message in bad:
        with pytest.raises(error, match=message):
            ops.kmeans(*arguments, **more)
    for more, error, message in [
        ({"n_local_trials": 0}, ValueError, "n_local_trials must be in"),
        ({"uniforms": uniforms_of(2, 0), "seed": 1}, ValueError, "seed and uniforms"),
        ({"uniforms": uniforms_of(2, 0).float()}, TypeError, "uniforms must be torch.float64"),
        ({"uniforms": uniforms_of(3, 0)}, ValueError, r"uniforms must be \[..., 3\] for k=2 and 2 trials"),
        ({"uniforms": uniforms_of(2, 0) + 1}, ValueError, r"in \[0, 1\)"),
    ]:
        with pytest.raises(error, match=message):
            ops.kmeans_plus_plus(x, 2, **more)
