"""ops.discretized_logistic_mixture_sample: the reference, the distribution, temperature, seeds, errors."""

import math
import re

import pytest
import torch
from scipy import stats

import cases
from gmkernels import _C, ops, reference
from likelihood_cases import F32, F64, problem

SAMPLE = ops.discretized_logistic_mixture_sample
PARAMETRIZATIONS = ("openai", "tfp")


def oracle(params, m, seed, temperature=1.0, kind="openai", low=-1.0, high=1.0, levels=256):
    seeds = seed.cpu() if isinstance(seed, torch.Tensor) else None
    channels, seed = 3 if params.shape[1] == 10 * m else 1, seed if seeds is None else 0
    return reference.likelihood.discretized_logistic_mixture_sample(
        params.cpu().double(), seeds, m, kind, low, high, levels, channels, seed, temperature)


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_reference(device, kind, c, dtype):
    params, _ = problem(3, c, (4, 5), 3, kind, dtype, device.torch)
    for seed in (11, torch.tensor([4, -1, 2**40], device=device.torch), torch.tensor(7, device=device.torch)):
        for temperature in (1.0, 0.3, 0.0):
            got = SAMPLE(params, 3, seed=seed, temperature=temperature, parametrization=kind, low=0, high=16, levels=17)
            assert got.dtype is dtype and got.shape == (3, c, 4, 5) and torch.equal(got, got.round())
            want = oracle(params, 3, seed, temperature, kind, 0.0, 16.0, 17)
            assert torch.equal(got.cpu().double(), want.round())
    last = params.to(memory_format=torch.channels_last)
    x = SAMPLE(last, 3, seed=11, parametrization=kind)
    assert torch.equal(x, SAMPLE(params, 3, seed=11, parametrization=kind))
    assert c == 1 or x.is_contiguous(memory_format=torch.channels_last)


def test_every_value_is_drawn_as_often_as_the_likelihood_says():
    """Joint frequencies of three channels with four levels, by chi-square: rounding comes before the next mean."""
    m, n, levels = 2, 60_000, 4
    params = cases.data(1, 10 * m, 1, seed=4)
    x = SAMPLE(params.expand(1, -1, n).contiguous(), m, seed=5, levels=levels)
    grid = torch.linspace(-1, 1, levels, dtype=F64)
    every = torch.cartesian_prod(grid, grid, grid).T[None]
    nll = ops.discretized_logistic_mixture_nll(params.expand(1, -1, 64).contiguous(), every, m, levels=levels,
                                               reduction="none")
    p = torch.exp(-nll[0])
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    index = ((x[0] + 1) / 2 * (levels - 1)).round().long()
    counts = torch.bincount(index[0] * 16 + index[1] * 4 + index[2], minlength=64).double()
    assert (p * n).min() >= 5
    assert stats.chisquare(counts.numpy(), (p * n).numpy()).pvalue > 1e-3


def test_logistic_noise_and_its_tails():
    n = 200_000
    params = torch.tensor([0.0, 0.0, -9.0]).double().view(1, 3, 1).expand(1, 3, n).contiguous()
    x = SAMPLE(params, 1, seed=1, levels=2**23 - 1)[0, 0]  # log-scale -9 counts as -7
    assert stats.kstest((x * math.exp(7)).numpy(), "logistic").pvalue > 1e-3
    cold = SAMPLE(params, 1, seed=1, temperature=0.5, levels=2**23 - 1)[0, 0]
    cases.close(cold, x / 2, atol=1e-6)
    assert x.abs().max() * math.exp(7) > 10


def test_temperature_0_is_the_mean_of_the_likeliest(device):
    params, _ = problem(2, 3, (5,), 4, device=device.torch)
    params[:, 3] = params[:, :4].amax(1)  # the first of equals
    x = SAMPLE(params, 4, seed=1, temperature=0)
    assert torch.equal(x, SAMPLE(params, 4, seed=2, temperature=0))
    cases.close(x, oracle(params, 4, 1, 0.0))


@pytest.mark.parametrize("channel", [0, 1, 2])
@pytest.mark.parametrize("row", ["mean", "scale"])
def test_a_nan_in_one_channel_is_the_pixel(device, channel, row):
    params, _ = problem(2, 3, (5,), 2, device=device.torch)
    first = 2 + channel * 6 + (row == "scale") * 2  # logits, then for each channel means, scales, coefficients
    params[1, first : first + 2, 3] = math.nan
    x = SAMPLE(params, 2, seed=1)
    assert x[1, :, 3].isnan().all() and x.isnan().sum() == 3


def test_weights_and_temperature():
    """A component's frequency is softmax(logits / temperature)."""
    n, logits = 40_000, torch.tensor([0.0, 1.0, -math.inf])
    params = torch.tensor([*logits, -1.0, 1.0, 0.0, -30.0, -30.0, -30.0]).view(1, 9, 1).expand(1, 9, n).contiguous()
    for temperature in (1.0, 0.5, 3.0):
        x = SAMPLE(params, 3, seed=2, temperature=temperature, levels=3)[0, 0]
        counts = [(x == v).sum().item() for v in (-1, 1)]
        assert sum(counts) == n
        want = torch.softmax(logits[:2] / temperature, 0).double() * n
        assert stats.chisquare(counts, (want * n / want.sum()).numpy()).pvalue > 1e-3


def test_the_same_on_every_isa_thread_count_and_batch():
    params, _ = problem(5, 3, (23, 31), 3, dtype=F32)
    seeds = torch.arange(5)
    want = SAMPLE(params, 3, seed=seeds)
    for name in _C.isas():
        _C.set_isa(name)
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(SAMPLE(params, 3, seed=seeds), want)
    assert torch.equal(SAMPLE(params[2:4], 3, seed=seeds[2:4]), want[2:4])
    torch.manual_seed(1)
    first, second = SAMPLE(params, 3), SAMPLE(params, 3)
    torch.manual_seed(1)
    assert torch.equal(first, SAMPLE(params, 3)) and not torch.equal(first, second)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_and_infinite(device, temperature):
    params, _ = problem(1, 3, (6,), 2, device=device.torch)
    params[0, 0, 0] = params[0, 1, 1] = math.nan
    params[0, :2, 2] = -math.inf
    params[0, 0, 3] = math.inf
    params[0, 1, 4] = -math.inf
    params[0, 2, 4] = math.nan
    params[0, 1, 5] = -math.inf
    params[0, [3, 5, 7], 5] = math.nan  # of the component that is never drawn
    bad = SAMPLE(params, 2, seed=0, temperature=temperature).isnan().any(1)[0]
    assert torch.equal(bad.cpu(), torch.tensor([True] * 5 + [False]))


def test_no_gradient_half_and_empty(device):
    params, _ = problem(2, 3, (3,), 2, dtype=F32, device=device.torch)
    assert not SAMPLE(params.requires_grad_(), 2, seed=0).requires_grad
    half = params.detach().bfloat16()
    x = SAMPLE(half, 2, seed=0)
    assert x.dtype is torch.bfloat16 and torch.equal(x, SAMPLE(half.float(), 2, seed=0).bfloat16())
    for shape in ((0, 20, 3), (2, 20, 0)):
        assert SAMPLE(torch.zeros(shape, device=device.torch), 2, seed=0).shape == (shape[0], 3, shape[2])
    with cases.few_blocks(device):
        assert torch.equal(SAMPLE(params[:, :, :1].detach().expand(2, 20, 999), 2, seed=0).cpu().double(),
                           oracle(params[:, :, :1].detach().expand(2, 20, 999), 2, 0).float().double())


@pytest.mark.parametrize("change, kind, message", [
    ({"params": None}, TypeError, "params must be a torch.Tensor, got NoneType"),
    ({"params": torch.zeros(2, 21, 3)}, ValueError, "params must have 20 channels for num_mixtures=2 and 3 data"),
    ({"params": torch.zeros(20)}, ValueError, "params must be [b, n, ...], got (20,)"),
    ({"params": torch.zeros(2, 20, dtype=torch.int32)}, TypeError, "params must be a floating-point tensor"),
    ({"temperature": -0.1}, ValueError, "temperature must be in [0, inf), got -0.1"),
    ({"temperature": math.inf}, ValueError, "temperature must be in [0, inf), got inf"),
    ({"temperature": math.nan}, ValueError, "temperature must be in [0, inf), got nan"),
    ({"temperature": "hot"}, TypeError, "temperature must be a float, got str"),
    ({"temperature": True}, TypeError, "temperature must be a float, got bool"),
    ({"parametrization": "classic"}, ValueError, "parametrization must be"),
    ({"seed": torch.arange(3)}, ValueError, "seed must have shape [] or [2], got (3,)"),
    ({"levels": 0}, ValueError, "levels must be in [2, 8388608), got 0"),
])
def test_errors(change, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        SAMPLE(**({"params": torch.zeros(2, 20, 3), "num_mixtures": 2} | change))
