"""ops.add_noise, ops.denoising_loss and ops.flow_pair: values, noise, special values, memory, errors."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from gmkernels import _C, ops, reference
from gmkernels.ops import noising
from noising_cases import F64, TARGETS, flow_oracle, loss_oracle, noise, oracle, sample_times, schedule
from tree import ROOT

each_target = pytest.mark.parametrize("target", TARGETS)


def close(got, want, **options):
    cases.close(got, want, **{"atol": None if got.dtype is F64 else 1e-5} | options)


def data(shape, dtype=torch.float32, device="cpu", seed=0):
    return cases.data(*shape, seed=seed).to(device, dtype)


def inputs(device, *shape, dtype=torch.float32):
    """x0, t, schedule."""
    return data(shape, dtype, device.torch), sample_times(shape[0], device.torch), schedule(device=device.torch)


# values --------------------------------------------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("dtype", cases.ALL_FLOATS, ids=str)
def test_add_noise(device, dtype, target):
    for shape in [(3, 5, 7), (5, 2), (2, 300 if not device.simt else 40)]:
        x0, t, pairs = inputs(device, *shape, dtype=dtype)
        for kwargs in ({"seed": 5, "step": 3}, {"noise": data(shape, dtype, device.torch, seed=1)}):
            xt, y = ops.add_noise(x0, t, pairs, target=target, **kwargs)
            assert xt.dtype is y.dtype is dtype and xt.shape == y.shape == shape
            for got, want in zip((xt, y), oracle(x0, t, pairs, target, **kwargs), strict=True):
                close(got, want)
            assert torch.equal(ops.add_noise(x0, t, pairs, **kwargs), xt)


@pytest.mark.parametrize("dtype", cases.ALL_FLOATS, ids=str)
def test_flow_pair(device, dtype):
    for shape in [(3, 5, 7), (5, 2), (2, 300 if not device.simt else 40)]:
        x0, x1 = (data(shape, dtype, device.torch, seed=i) for i in range(2))
        t = torch.linspace(0, 1, shape[0], device=device.torch)
        for sigma in (0.0, 0.3):
            xt, u = ops.flow_pair(x0, x1, t, sigma, seed=4, step=1)
            assert xt.dtype is u.dtype is dtype
            for got, want in zip((xt, u), flow_oracle(x0, x1, t, sigma, seed=4, step=1), strict=True):
                close(got, want)


@each_target
@pytest.mark.parametrize("dtype", cases.ALL_FLOATS, ids=str)
def test_denoising_loss(device, dtype, target):
    weights = [None, "given"] + ["min_snr"] * (target in ("epsilon", "x0", "v"))
    for shape, weight in zip([(3, 5, 7), (5, 2), (2, 40)], weights, strict=False):
        t, pairs = sample_times(shape[0], device.torch), schedule(device=device.torch)
        x0, pred = data(shape, dtype, device.torch), data(shape, dtype, device.torch, seed=2).requires_grad_()
        w = torch.linspace(0.5, 2, shape[0], device=device.torch) if weight == "given" else weight
        loss = ops.denoising_loss(pred, x0, t, pairs, 5, target=target, weight=w, step=2)
        assert loss.dtype is (F64 if dtype is F64 else torch.float32) and loss.shape == ()
        want, grad = loss_oracle(pred, x0, t, pairs, 5, target, w, step=2)
        close(loss, want, rtol=1e-5)
        if target in ("epsilon", "score"):
            assert torch.equal(ops.denoising_loss(pred, None, t, pairs, 5, target=target, weight=w, step=2), loss)
        with torch.no_grad():
            assert torch.equal(ops.denoising_loss(pred, x0, t, pairs, 5, target=target, weight=w, step=2), loss)
        loss.backward()
        assert pred.grad.dtype is dtype
        close(pred.grad, grad)


def test_large(isa):
    """Several parts and threads, on every instruction set; 1031 is a prime, 40960 a multiple of everything."""
    for shape in [(31, 1031), (4, 40960), (9000, 3), (20000, 2)]:
        x0, t, pairs = data(shape), sample_times(shape[0]), schedule()
        made = ops.add_noise(x0, t, pairs, seed=1, target="v")
        for got, want in zip(made, oracle(x0, t, pairs, "v", seed=1), strict=True):
            close(got, want)
        pred = data(shape, seed=3).requires_grad_()
        loss = ops.denoising_loss(pred, x0, t, pairs, 1, target="v")
        want, grad = loss_oracle(pred, x0, t, pairs, 1, "v")
        close(loss, want, rtol=3e-7, atol=0)
        loss.backward()
        close(pred.grad * shape[0], grad * shape[0])


def test_sizes(device):
    for n in (*cases.SIZES, 63, 64, 65, 255, 257, 1023, 1025) if not device.simt else (0, 1, 5, 17):
        x0, t, pairs = data((n,)).to(device.torch), torch.tensor(3, device=device.torch), schedule(device=device.torch)
        xt, y = ops.add_noise(x0, t, pairs, seed=1, target="v")
        want = oracle(x0, t, pairs, "v", seed=1)
        close(xt, want[0])
        close(y, want[1])
        loss = ops.denoising_loss(x0, xt, t, pairs, 1, target="v")
        if n == 0:
            assert loss.isnan()
        else:
            close(loss, loss_oracle(x0, xt, t, pairs, 1, "v")[0], rtol=1e-6)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 33, 63, 64, 65])
def test_a_small_sample_is_the_sample_alone(isa, d):
    """Words of elements that meet several samples give the bits of one sample by itself."""
    b = 300
    x0, t, pairs = data((b, d)), sample_times(b), schedule()
    z = data((b, d), seed=1)
    xt, y = ops.add_noise(x0, t, pairs, noise=z, target="v")
    u, velocity = ops.flow_pair(x0, z, torch.linspace(0, 1, b))
    for i in (0, 1, 5, 15, 16, 127, 128, 129, 255, 256, b - 1):
        alone = ops.add_noise(x0[i], t[i], pairs, noise=z[i], target="v")
        assert torch.equal(xt[i], alone[0]) and torch.equal(y[i], alone[1])
        alone = ops.flow_pair(x0[i], z[i], torch.linspace(0, 1, b)[i])
        assert torch.equal(u[i], alone[0]) and torch.equal(velocity[i], alone[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_is_rounded_once(device, dtype):
    shape = (4, 65) if not device.simt else (2, 19)
    x0, t, pairs = inputs(device, *shape, dtype=dtype)
    got = ops.add_noise(x0, t, pairs, seed=3, target="v")
    for g, want in zip(got, oracle(x0, t, pairs, "v", seed=3), strict=True):
        ulp = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(want.abs())))
        assert ((g.cpu().double() - want).abs() <= 0.5 * ulp + 3e-6).all()


def test_continuous_times_and_float64_schedules(device):
    x0 = data((3, 5), F64, device.torch)
    rows = torch.tensor([[0.9, 0.1], [1 / 3, 2 / 3], [0.0, 1.0]], dtype=F64, device=device.torch)
    z = data((3, 5), F64, device.torch, seed=1)
    xt, y = ops.add_noise(x0, None, rows, noise=z, target="v")
    cases.close(xt, rows[:, :1] * x0 + rows[:, 1:] * z, rtol=1e-15, atol=1e-15)
    cases.close(y, rows[:, :1] * z - rows[:, 1:] * x0, rtol=1e-15, atol=1e-15)
    assert not torch.equal(ops.add_noise(x0, None, rows.float(), noise=z), xt)
    weight = torch.tensor([1 / 3, 1.0, 2.0], dtype=F64, device=device.torch)
    got = ops.denoising_loss(z, x0, None, rows, 1, target="velocity", weight=weight)
    cases.close(got, loss_oracle(z, x0, None, rows, 1, "velocity", weight)[0], rtol=1e-13)
    t = torch.tensor([0.1, 1 / 3, 1.0], dtype=F64, device=device.torch)
    cases.close(ops.flow_pair(x0, z, t)[0], (1 - t[:, None]) * x0 + t[:, None] * z, rtol=1e-15, atol=1e-15)


def test_velocity_is_that_of_flow_pair():
    """From noise to data or from data to noise: the same path."""
    x0, s = data((4, 50)), torch.tensor([0.0, 0.25, 0.5, 1.0])
    z = ops.philox_normal(x0.shape, 9, 0, 8)
    xt, y = ops.add_noise(x0, None, torch.stack((1 - s, s), -1), seed=9, target="velocity")
    other = ops.flow_pair(x0, z, s)
    close(xt, other[0].double())
    close(y, other[1].double())


def test_against_diffusers():
    diffusers = pytest.importorskip("diffusers")
    s = diffusers.DDPMScheduler()
    pairs = torch.stack((s.alphas_cumprod.sqrt(), (1 - s.alphas_cumprod).sqrt()), -1)
    x0, z, t = data((5, 3, 8, 8)), data((5, 3, 8, 8), seed=1), torch.tensor([0, 1, 500, 998, 999])
    xt, v = ops.add_noise(x0, t, pairs, noise=z, target="v")
    close(xt, s.add_noise(x0, z, t).double(), atol=1e-6)
    close(v, s.get_velocity(x0, z, t).double(), atol=1e-6)


# noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.ALL_FLOATS, ids=str)
def test_the_noise_is_philox_normal(device, dtype):
    pairs = torch.tensor([[0.0, 1.0]], device=device.torch)
    seeds = 11, 2**63 + 5, torch.tensor([1, 2, -3]), torch.tensor(9)
    for shape, seed in zip([(3, 300 if not device.simt else 30), (2, 7), (3, 41), (5, 2)], seeds, strict=True):
        seed = seed.to(device.torch) if isinstance(seed, torch.Tensor) else seed
        x0, t = torch.full(shape, math.nan, dtype=dtype, device=device.torch), torch.tensor(0, device=device.torch)
        z, eps = ops.add_noise(x0, t, pairs, seed=seed, step=4, target="epsilon")
        want = ops.philox_normal(shape, seed, 4, 8, dtype=dtype, device=x0.device)
        assert torch.equal(z, want) and torch.equal(eps, want)
        zero = torch.zeros(shape, dtype=dtype, device=device.torch)
        got = ops.flow_pair(zero, zero, torch.tensor(0.5, device=device.torch), 1.0, seed=seed, step=4)[0]
        assert torch.equal(got, ops.philox_normal(shape, seed, 4, 9, dtype=dtype, device=zero.device))


@pytest.mark.parametrize("d", [3, 45, 300])
def test_a_sample_does_not_depend_on_its_batch(d):
    seeds, t, x0, pairs = torch.tensor([7, -3, 2**40]), sample_times(3), data((3, d)), schedule()
    whole = ops.add_noise(x0, t, pairs, seed=seeds, target="v")
    for i in range(3):
        alone = ops.add_noise(x0[i : i + 1], t[i : i + 1], pairs, seed=seeds[i : i + 1], target="v")
        assert torch.equal(whole[0][i], alone[0][0]) and torch.equal(whole[1][i], alone[1][0])


@pytest.mark.parametrize("shape", [(3, 70001), (30000, 3), (2, 131072)], ids=str)
def test_same_bits_on_every_thread_count(shape):
    x0, t, pairs = data(shape), sample_times(shape[0]), schedule()
    per_isa = []
    for name in _C.isas():
        _C.set_isa(name)
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            pred = x0.clone().requires_grad_()
            loss = ops.denoising_loss(pred, x0, t, pairs, 3, target="v", weight="min_snr")
            loss.backward()
            results.append((*ops.add_noise(x0, t, pairs, seed=3, target="v"), loss.detach(), pred.grad))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        per_isa.append(results[0])
    for other in per_isa[1:]:
        for a, b in zip(other, per_isa[0], strict=True):
            cases.close(a, b.double(), atol=5e-6)


def test_a_loss_knows_the_noise_of_add_noise(device):
    """A model that is right has no loss, whatever the seeds; another step is other noise."""
    shape = (3, 5)
    x0, t, pairs = inputs(device, *shape)
    for seed in (5, torch.tensor([5, 6, 7], device=device.torch)):
        for target in TARGETS:
            _, y = ops.add_noise(x0, t, pairs, seed=seed, target=target, step=1)
            assert ops.denoising_loss(y, x0, t, pairs, seed, target=target, step=1) < 1e-12
            if target != "x0":
                assert ops.denoising_loss(y, x0, t, pairs, seed, target=target, step=2) > 1e-3


def test_a_seed_of_none_is_drawn_from_torch():
    x0, t, pairs = data((2, 50)), sample_times(2), schedule()
    torch.manual_seed(3)
    first, second = ops.add_noise(x0, t, pairs), ops.add_noise(x0, t, pairs)
    torch.manual_seed(3)
    assert torch.equal(first, ops.add_noise(x0, t, pairs)) and not torch.equal(first, second)


# special values ------------------------------------------------------------------------------------------------------


def test_a_zero_hides_what_it_multiplies(device):
    bad = torch.tensor([math.nan, math.inf] * 10, device=device.torch).reshape(2, 10)
    good, t = data((2, 10), device=device.torch), torch.tensor([0, 1], device=device.torch)
    for rows in ([[0.0, 0.5], [0.0, 1.0]], [[0.5, 0.0], [1.0, 0.0]]):
        pairs = torch.tensor(rows, device=device.torch)
        x0, z = (bad, good) if rows[0][0] == 0 else (good, bad)
        assert torch.equal(ops.add_noise(x0, t, pairs, noise=z), (pairs[:, :1] if x0 is good else pairs[:, 1:]) * good)
    pairs = torch.tensor([[0.6, 0.8], [0.8, 0.6]], device=device.torch)
    assert torch.equal(ops.add_noise(bad, t, pairs, noise=good, target="epsilon")[1], good)
    assert torch.equal(ops.add_noise(good, t, pairs, noise=bad, target="x0")[1], good)
    assert ops.denoising_loss(good, bad, t, pairs, 1).isfinite()
    for call in (lambda: ops.add_noise(bad, t, pairs, seed=1), lambda: ops.denoising_loss(bad, good, t, pairs, 1),
                 lambda: ops.denoising_loss(good, bad, t, pairs, 1, target="v")):
        assert not call().isfinite().any()


def test_limits_of_the_schedule(device):
    """No noise and no signal: sigma = 0, alpha = 0."""
    pairs, x0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device.torch), data((2, 9), device=device.torch)
    t = torch.tensor([0, 1], device=device.torch)
    xt, score = ops.add_noise(x0, t, pairs, seed=2, target="score")
    z = noise(x0, 2).to(xt)
    assert torch.equal(xt[0], x0[0]) and torch.equal(xt[1], z[1])
    assert torch.equal(score[0], torch.where(z[0] > 0, -math.inf, math.inf)) and torch.equal(score[1], -z[1])
    for target in ("epsilon", "x0", "v"):
        got = ops.denoising_loss(x0, x0 + 1, t, pairs, 2, target=target, weight="min_snr")
        assert got.isfinite()
        cases.close(got, loss_oracle(x0, x0 + 1, t, pairs, 2, target, "min_snr")[0], rtol=1e-5)


def test_what_is_behind_the_last_sample_is_not_taken(isa):
    """Columns of weights of samples of few elements: what an earlier call has left there."""
    pairs = schedule()
    for d in (1, 2, 3, 9, 17):
        for b in (1, 2, 3, 5):
            many = torch.ones(300, d)
            for left in (math.nan, math.inf):
                weight = torch.full((300,), left)
                ops.denoising_loss(many, many, sample_times(300), pairs, 1, weight=weight)
                x0, t = data((b, d)), sample_times(b)
                got = ops.denoising_loss(x0, x0 + 1, t, pairs, 2)
                cases.close(got, loss_oracle(x0, x0 + 1, t, pairs, 2, "epsilon")[0], rtol=1e-5)


def test_min_snr_is_the_formula():
    alpha, sigma = torch.tensor([0.999, 0.6, 0.05]), torch.tensor([0.04, 0.8, 0.999])
    snr = (alpha / sigma).double() ** 2
    for target, below in (("epsilon", snr), ("x0", torch.ones(3)), ("v", snr + 1)):
        pred = torch.zeros(3, 8)
        got = ops.denoising_loss(pred, pred, None, torch.stack((alpha, sigma), -1), 1, target=target, weight="min_snr",
                                 gamma=3.0)
        want = ops.denoising_loss(pred, pred, None, torch.stack((alpha, sigma), -1), 1, target=target,
                                  weight=(snr.clamp(max=3.0) / below).float())
        cases.close(got, want.double(), rtol=1e-5)


def test_a_time_outside_the_schedule(device):
    x0, pairs = data((3, 6), device=device.torch), schedule(device=device.torch)
    for bad in (-1, pairs.shape[0], 2**40):
        t = torch.tensor([1, bad, 2], device=device.torch)
        if device.name == "cpu" or cases.rehearsal:
            with pytest.raises(ValueError, match=re.escape(f"t must be in [0, {pairs.shape[0]})")):
                ops.add_noise(x0, t, pairs, seed=1)
            with pytest.raises(ValueError, match=re.escape(f"t must be in [0, {pairs.shape[0]})")):
                ops.denoising_loss(x0, x0, t, pairs, 1)
            continue
        for target in TARGETS:
            xt, _ = ops.add_noise(x0, t, pairs, seed=1, target=target)
            assert xt[1].isnan().all() and xt[::2].isfinite().all()
        assert ops.denoising_loss(x0, x0, t, pairs, 1).isnan()


# memory --------------------------------------------------------------------------------------------------------------


def test_strides_and_addresses(device):
    x0, _, pairs = inputs(device, 6, 10)
    t = (torch.arange(12, device=device.torch) % 7)[::2]
    want = ops.add_noise(x0, t, pairs, seed=1, target="v")
    loss = ops.denoising_loss(x0, x0, t, pairs, 1, target="v", weight=torch.ones(6, device=device.torch))
    for view in (x0.t().contiguous().t(), torch.cat([x0.flatten()[:1], x0.flatten()])[1:].reshape(6, 10)):
        got = ops.add_noise(view, t.clone(), pairs.t().contiguous().t(), seed=1, target="v")
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        weight = torch.ones(1, device=device.torch).expand(6)
        assert torch.equal(ops.denoising_loss(view, view, t, pairs, 1, target="v", weight=weight), loss)
    one = torch.ones(1, 1, device=device.torch).expand(6, 10)
    assert torch.equal(ops.flow_pair(one, one, torch.tensor(0.5, device=device.torch))[0], one)


def test_empty(device):
    pairs = schedule(device=device.torch)
    for shape in [(0, 3), (2, 0)]:
        x0, t = torch.empty(shape, device=device.torch), torch.zeros(shape[0], dtype=torch.int64, device=device.torch)
        assert ops.add_noise(x0, t, pairs, seed=1).shape == shape
        assert ops.denoising_loss(x0, x0, t, pairs, 1).isnan()
        pred = x0.clone().requires_grad_()
        g, = torch.autograd.grad(ops.denoising_loss(pred, x0, t, pairs, 1), pred, create_graph=True)
        assert g.shape == shape
        assert ops.flow_pair(x0, x0, t.float())[1].shape == shape


def test_a_training_step_stores_the_gradient_only():
    x0, t, pairs = data((2, 1000)), sample_times(2), schedule()
    pred = torch.zeros(2, 1000, requires_grad=True)
    loss = ops.denoising_loss(pred, x0, t, pairs, 1, target="v")
    saved = sorted(s.numel() for s in loss.grad_fn.saved_tensors if s is not None)
    assert saved == [2, pairs.numel(), 2000, 2000, 2000]  # t, schedule; pred and x0, which the caller has; the gradient


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=4), dtype=st.sampled_from(cases.ALL_FLOATS),
       target=st.sampled_from(TARGETS), seeds=st.booleans(), steps=st.integers(1, 3), times=st.booleans())
def test_any_shape(shape, dtype, target, seeds, steps, times):
    x0 = data([*shape[:-1], shape[-1] * 7], dtype)[..., ::steps]
    b, pairs = x0.shape[0], schedule()
    t = sample_times(b) if times else torch.tensor(3)
    seed = torch.arange(b) - 2 if seeds else 7
    got = ops.add_noise(x0, t, pairs, seed=seed, target=target)
    for g, want in zip(got, oracle(x0, t, pairs, target, seed=seed), strict=True):
        close(g, want, atol=1e-2 if dtype is torch.bfloat16 else 2e-3 if dtype is torch.float16 else 1e-5)
    loss = ops.denoising_loss(x0, x0, t, pairs, seed, target=target)
    close(loss, loss_oracle(x0, x0, t, pairs, seed, target)[0], rtol=1e-5)


def test_blocks_take_turns(device):
    x0, t, pairs = data((2, 1500)), sample_times(2), schedule()
    weight = torch.tensor([0.5, 2.0])

    def run():
        pred = x0.flip(0).clone().requires_grad_()
        loss = ops.denoising_loss(pred, x0, t, pairs, 1, target="v", weight=weight)
        loss.backward()
        flow = ops.flow_pair(x0, pred.detach(), weight, 0.1, seed=1)
        return *ops.add_noise(x0, t, pairs, seed=1, target="v"), *flow, loss, pred.grad

    with cases.few_blocks(device):
        got = run()
    with cases.cpu_kernels():
        want = run()
    for g, w in zip(got, want, strict=True):
        close(g, w.double())


# bad input -----------------------------------------------------------------------------------------------------------

X, T, S = torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
ADD = [
    ({"x0": [1.0]}, TypeError, "x0 must be a torch.Tensor, got list"),
    ({"x0": X.long()}, TypeError, "x0 must be one of torch.float32"),
    ({"t": 3}, TypeError, "t must be a torch.Tensor, got int"),
    ({"t": T.int()}, TypeError, "t must be int64, indices of rows of the schedule, got torch.int32"),
    ({"t": T.float()}, TypeError, "t must be int64"),
    ({"t": T[:1]}, ValueError, "t must have shape [2] or [], got (1,)"),
    ({"t": T[None]}, ValueError, "t must have shape [2] or [], got (1, 2)"),
    ({"t": None, "schedule": torch.ones(3, 2)}, ValueError, "schedule must be [2, 2] (alpha, sigma) where t is None"),
    ({"schedule": None}, TypeError, "schedule must be a torch.Tensor, got NoneType"),
    ({"schedule": S.half()}, TypeError, "schedule must be float32 for data of torch.float32, got torch.float16"),
    ({"schedule": S.double()}, TypeError, "schedule must be float32"),
    ({"schedule": S[0]}, ValueError, "schedule must be [times, 2] (alpha, sigma), got (2,)"),
    ({"schedule": torch.ones(5, 3)}, ValueError, "schedule must be [times, 2]"),
    ({"schedule": torch.ones(0, 2)}, ValueError, "schedule must be [times, 2]"),
    ({"noise": X}, ValueError, "seed must be None where noise is a tensor"),
    ({"noise": X.half(), "seed": None}, TypeError, "noise must be torch.float32 as x0"),
    ({"noise": X[:1], "seed": None}, ValueError, "noise must have the shape of x0, (2, 3), got (1, 3)"),
    ({"noise": True, "seed": None}, TypeError, "noise must be a torch.Tensor, got bool"),
    ({"target": "eps"}, ValueError, "target must be one of epsilon, x0, v, score, velocity, got 'eps'"),
    ({"seed": 1.5}, TypeError, "seed must be an integer, got float"),
    ({"seed": torch.ones(3, dtype=torch.int64)}, ValueError, "seed must have shape [] or [2], got (3,)"),
    ({"step": -1}, ValueError, "step must be in [0, 4294967296), got -1"),
    ({"schedule": S.to("meta")}, ValueError, "cpu and meta"),
]
LOSS = [
    ({"pred": None}, TypeError, "pred must be a torch.Tensor, got NoneType"),
    ({"pred": X.half()}, TypeError, "x0 must be torch.float16 as pred, got torch.float32"),
    ({"x0": X[:1]}, ValueError, "x0 must have the shape of pred, (2, 3), got (1, 3)"),
    ({"x0": None, "target": "v"}, TypeError, "x0 must be a torch.Tensor for the target v, got NoneType"),
    ({"seed": None}, TypeError, "seed must be that of add_noise, an int or an int64 tensor, got None"),
    ({"target": None}, ValueError, "target must be one of epsilon"),
    ({"weight": "snr"}, TypeError, "weight must be None, \"min_snr\" or a torch.Tensor, got 'snr'"),
    ({"weight": "min_snr", "target": "score"}, ValueError, "is for the targets epsilon, x0 and v, got score"),
    ({"weight": torch.ones(3)}, ValueError, "weight must have the shape of t, (2,), got (3,)"),
    ({"weight": torch.ones(2).double()}, TypeError, "weight must be torch.float32 as schedule"),
    ({"gamma": 0.0}, ValueError, "gamma must be positive and finite, got 0.0"),
    ({"gamma": "5"}, TypeError, "gamma must be a float, got str"),
    ({"schedule": S.clone().requires_grad_()}, ValueError, "schedule must not require a gradient"),
    ({"step": 2**32}, ValueError, "step must be in"),
]
FLOW = [
    ({"x0": None}, TypeError, "x0 must be a torch.Tensor, got NoneType"),
    ({"x1": X.half()}, TypeError, "x1 must be torch.float32 as x0, got torch.float16"),
    ({"x1": X[0]}, ValueError, "x1 must have the shape of x0"),
    ({"t": 0.5}, TypeError, "t must be a torch.Tensor, got float"),
    ({"t": T}, TypeError, "t must be float32 for data of torch.float32, got torch.int64"),
    ({"t": torch.ones(3)}, ValueError, "t must have shape [2] or [], got (3,)"),
    ({"sigma": -1.0}, ValueError, "sigma must be finite and not negative, got -1.0"),
    ({"sigma": math.nan}, ValueError, "sigma must be finite"),
    ({"sigma": X}, TypeError, "sigma must be a float, got Tensor"),
    ({"sigma": 1.0, "seed": 2**64}, ValueError, "seed must be in"),
    ({"step": 0.5}, TypeError, "step must be an integer, got float"),
]
GOOD = {
    ops.add_noise: {"x0": X, "t": T, "schedule": S, "seed": 1},
    ops.denoising_loss: {"pred": X, "x0": X, "t": T, "schedule": S, "seed": 1},
    ops.flow_pair: {"x0": X, "x1": X, "t": torch.ones(2)},
}
BAD = [(op, *case) for op, cases_of in zip(GOOD, (ADD, LOSS, FLOW), strict=True) for case in cases_of]


@pytest.mark.parametrize("op, change, error, message", BAD, ids=range(len(BAD)))
def test_bad_input(op, change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        op(**{**GOOD[op], **change})


def test_names_in_python_and_cpp_agree():
    text = (ROOT / "csrc/training/noising.h").read_text()
    names = re.search(r"enum NoisingTarget : int \{ (.*), kNoTarget \}", text)[1].split(", ")
    assert [n.removeprefix("k").lower() for n in names] == list(reference.noising.TARGETS)
    assert noising._NO_TARGET == len(names)
