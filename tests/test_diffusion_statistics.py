"""diffusion_step(guidance_rescale=, dynamic_threshold=): the exact quantile, the spreads, the step made with them."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import cases
from gmkernels import ops, reference
from gmkernels.ops.step_statistics import quantile, rescale_factor

F32, F64 = torch.float32, torch.float64
ROW = torch.tensor([1.25, -0.75, 0.6, 0.4, 0.1, 0, 0, 0.2])
DATA = {
    "normal": lambda *s: cases.data(*s),
    "equal": lambda *s: torch.full(s, 0.3, dtype=F64),
    "two values": lambda *s: (cases.data(*s) > 0).double(),
    "zeros": lambda *s: torch.zeros(s, dtype=F64),
    "mostly zero": lambda *s: cases.data(*s) * (cases.data(*s, seed=7) > 2),
    "sorted": lambda *s: torch.arange(math.prod(s), dtype=F64).reshape(s) - 1000,
    "heavy": lambda *s: cases.data(*s) / cases.data(*s, seed=7).abs().clamp(min=1e-6) ** 3,
    "subnormal": lambda *s: cases.data(*s) * 1e-40,
    "columns": lambda *s: torch.arange(math.prod(s), dtype=F64).reshape(s) % 64,
}


def identity(device="cpu", dtype=F32):
    """Coefficients of |m|."""
    return torch.tensor([0.0, 1, 1, 0, 0, 0, 0, 0], dtype=dtype, device=device)


def inputs(device, *shape, dtype=F32, count=3):
    return [cases.data(*shape, seed=i).to(dtype).to(device.torch) for i in range(count)]


def exact(m, q):
    """torch.quantile, in float64."""
    return torch.quantile(m.double().abs().flatten(1), q, dim=1)


# the quantile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_quantile_of_any_data(isa, kind, dtype):
    for shape in ((2, 5000), (3, 4096), (1, 70_001), (2, 3, 128, 128)):
        m = DATA[kind](*shape).to(dtype)
        for q in (0.0, 0.3, 0.5, 0.995, 1.0):
            got = quantile(m, m, identity(), None, 1.0, q)
            cases.close(got, exact(m, q), rtol=1e-6 if dtype is F32 else 1e-14, atol=1e-45)


@pytest.mark.parametrize("dtype", cases.ALL_FLOATS, ids=str)
def test_quantile_of_a_step(device, dtype):
    """A x + B m with guidance, coefficients per sample, sizes around the size that is looked at outright."""
    for n in (1, 2, 63, 300) + (() if device.simt else (4095, 4096, 4097, 20_000)):
        x, m, u = inputs(device, 3, n, dtype=dtype)
        rows = ROW.to(device.torch) * torch.tensor([[1.0], [0.5], [2.0]], device=device.torch)
        for c in (ROW.to(device.torch), rows):
            for uncond in (None, u):
                for q in (0.0, 0.9, 0.995, 1.0):
                    got = quantile(x, m, c, uncond, 3.0, q)
                    wide = [None if t is None else t.double().cpu() for t in (x, m, c, uncond)]
                    assert got.dtype is (F64 if dtype is F64 else F32)
                    cases.close(got, reference.diffusion.step_quantile(*wide, 3.0, q), rtol=1e-5, atol=1e-6)


def test_a_small_bit_pattern_makes_a_difference(device):
    """Neighbouring floats: the digits down to the last one."""
    base = torch.tensor(1.0).view(torch.int32)
    m = (base + torch.arange(100, dtype=torch.int32)).view(F32).flip(0)[None].to(device.torch)
    for q in (0.0, 1 / 99, 0.5, 0.77, 1.0):
        assert torch.equal(quantile(m, m, identity(device.torch), None, 1.0, q).cpu(),
                           torch.quantile(m.double().cpu(), q, dim=1).float())


def test_a_coefficient_of_zero_hides_its_stream(device):
    x, m = inputs(device, 2, 50, count=2)
    want = quantile(m, m, identity(device.torch), None, 1.0, 0.9)
    assert torch.equal(quantile(torch.full_like(x, math.nan), m, identity(device.torch), None, 1.0, 0.9), want)


@pytest.mark.parametrize("n", [40, 9000])
def test_nan_and_infinity(device, n):
    n = min(n, 600) if device.simt else n
    m = cases.data(4, n).float().to(device.torch)
    m[0, 7], m[1, 3], m[2, :], m[3, 0] = math.nan, math.inf, -math.inf, -math.inf
    got = quantile(m, m, identity(device.torch), None, 1.0, 0.5)
    assert got[0].isnan() and got[2] == math.inf and got[1].isfinite() and got[3].isfinite()
    assert quantile(m, m, identity(device.torch), None, 1.0, 1.0)[1] == math.inf


def test_a_wrong_guess_of_the_bounds_is_made_good():
    """What is drawn says nothing of the rest: half of each stretch is another number, whatever place is drawn."""
    n = 300_000
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        m = torch.where(torch.rand(1, n, generator=g) < 0.5, 1.0, 2.0) + 1e-3 * torch.rand(1, n, generator=g)
        m[0, 1000:2000] = 50 + torch.rand(1000, generator=g)
        for q in (0.499, 0.5, 0.501, 0.9965, 0.997):
            cases.close(quantile(m, m, identity(), None, 1.0, q), exact(m, q), rtol=1e-6)


def test_the_same_bits_on_any_number_of_threads():
    results = []
    x, m, u = (cases.data(3, 100_003, seed=i).float() for i in range(3))
    for n in (1, 2, 3, 8):
        torch.set_num_threads(n)
        results.append(torch.stack((quantile(x, m, ROW, u, 4.0, 0.995), rescale_factor(m, u, 4.0, 0.7))))
    assert all(torch.equal(r, results[0]) for r in results)
    alone = torch.stack([quantile(x[i : i + 1], m[i : i + 1], ROW, u[i : i + 1], 4.0, 0.995)[0] for i in range(3)])
    assert torch.equal(alone, results[0][0])


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 3), st.integers(0, 300), st.floats(0, 1), st.sampled_from(sorted(DATA)))
def test_any_size(b, n, q, kind):
    m = DATA[kind](b, n).float()
    got = quantile(m, m, identity(), None, 1.0, q)
    if b and n:
        cases.close(got, exact(m, q), rtol=1e-6, atol=1e-45)
    else:
        assert got.shape == (b,) and got.isnan().all()


# the spreads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.ALL_FLOATS, ids=str)
def test_rescale_factor(device, dtype):
    for n in (2, 3, 77, 1000) + (() if device.simt else (16_384, 50_001)):
        m, u = inputs(device, 3, n, dtype=dtype, count=2)
        for scale in (1.0, 7.5, 0.0):
            want = reference.diffusion.guidance_rescale(m.double().cpu(), u.double().cpu(), scale, 0.7)
            cases.close(rescale_factor(m, u, scale, 0.7), want, rtol=1e-5)
        cases.close(rescale_factor(m, u, 3.0, 0.0), torch.ones(3, dtype=F64), rtol=0, atol=0)


def test_rescale_far_from_zero(device):
    """An offset of a thousand standard deviations."""
    m, u = (t + 1000 for t in inputs(device, 2, 3000 if not device.simt else 600, count=2))
    want = reference.diffusion.guidance_rescale(m.double().cpu(), u.double().cpu(), 5.0, 0.7)
    cases.close(rescale_factor(m, u, 5.0, 0.7), want, rtol=1e-3)  # float32 m alone is off by that


def test_rescale_of_constants_is_torchs():
    m, u = torch.ones(2, 9), torch.zeros(2, 9)
    want = reference.diffusion.guidance_rescale(m, u, 3.0, 0.5)
    assert torch.equal(rescale_factor(m, u, 3.0, 0.5).isnan(), want.isnan())
    assert rescale_factor(torch.ones(2, 1), u[:, :1], 3.0, 0.5).isnan().all()


# the step ------------------------------------------------------------------------------------------------------------


def plain(x, m, c, u, scale, phi, threshold, h1=None):
    """The lines of diffusers, float64."""
    x, m, c, u, h1 = (None if t is None else t.double().cpu() for t in (x, m, c, u, h1))
    axes = tuple(range(1, x.dim()))
    guided = m if u is None else u + scale * (m - u)
    if phi:
        rescaled = guided * (m.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
        guided = phi * rescaled + (1 - phi) * guided
    A, B, c0, c1, c2, *_ = reference.diffusion.rows(c, x)
    x0 = A * x + B * guided
    if threshold:
        s = torch.quantile(x0.flatten(1).abs(), threshold[0], dim=1).clamp(1, threshold[1])
        s = s.reshape(-1, *(1,) * len(axes))
        x0 = torch.clamp(x0, -s, s) / s
    return c0 * x0 + c1 * x + (0 if h1 is None else c2 * h1), x0


@pytest.mark.parametrize("phi, threshold", [(0.7, None), (0.0, (0.9, 100.0)), (0.7, (0.8, 1.5)), (1.0, (0.99, 1.0))])
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
def test_step(device, phi, threshold, dtype):
    tolerance = {F32: 1e-5, F64: 1e-6, torch.bfloat16: 2e-2}[dtype]  # float64: of the coefficients
    shape = (3, 2, 5, 7)
    x, m, u, h1 = (2 * t for t in inputs(device, *shape, dtype=dtype, count=4))
    rows = ROW.to(device.torch) * torch.tensor([[1.0], [0.5], [2.0]], device=device.torch)
    for c in (ROW.to(device.torch), rows):
        for uncond in (u, None)[: 1 if phi else 2]:
            got = ops.diffusion_step(x, m, c, uncond=uncond, guidance_scale=3.0, history=(h1,), return_x0=True,
                                     guidance_rescale=phi, dynamic_threshold=threshold)
            for a, b in zip(got, plain(x, m, c, uncond, 3.0, phi, threshold, h1), strict=True):
                assert a.dtype is dtype
                cases.close(a, b, rtol=tolerance, atol=tolerance)


def test_out_and_noise():
    x, m, u = (2 * cases.data(3, 50, seed=i).float() for i in range(3))
    options = {"uncond": u, "guidance_scale": 3.0, "guidance_rescale": 0.5, "dynamic_threshold": (0.9, 9.0),
               "noise": True, "seed": 3, "step": 2}
    want = ops.diffusion_step(x, m, ROW, **options)
    y = x.clone()
    assert ops.diffusion_step(y, m, ROW, out=y, **options) is y and torch.equal(y, want)
    still = dict(options, noise=False)
    z = ops.philox_normal(x.shape, 3, 2, 2)
    cases.close(want, (ops.diffusion_step(x, m, ROW, **still) + 0.2 * z).double(), rtol=1e-6, atol=1e-6)


def test_strided(device):
    x, m, u = (t.to(device.torch) for t in (cases.data(4, 6, 5, seed=i).float() for i in range(3)))
    options = {"guidance_scale": 3.0, "guidance_rescale": 0.5, "dynamic_threshold": (0.9, 9.0)}
    want = ops.diffusion_step(x, m, ROW.to(device.torch), uncond=u, **options)
    for view in (lambda t: t.transpose(0, 2).contiguous().transpose(0, 2), lambda t: torch.stack((t, t), -1)[..., 0]):
        assert torch.equal(ops.diffusion_step(view(x), view(m), ROW.to(device.torch), uncond=view(u), **options), want)


def test_gradients():
    x, m, u = (cases.data(2, 3, 3, seed=i, grad=True) for i in range(3))
    c = ROW.double().requires_grad_()

    def f(x, m, u, c):
        return ops.diffusion_step(x, m, c, uncond=u, guidance_scale=3.0, guidance_rescale=0.6,
                                  dynamic_threshold=(0.8, 50.0), return_x0=True)

    assert gradcheck(f, (x, m, u, c))
    assert gradgradcheck(f, (x, m, u, c))


def test_opcheck_compile_and_func():
    torch._dynamo.reset()
    x, m, u = (cases.data(2, 8, seed=i, grad=True) for i in range(3))
    c = ROW.double().requires_grad_()
    for op, args in ((quantile, (x, m, c, u, 3.0, 0.8)), (quantile, (x, m, c, None, 3.0, 0.8)),
                     (rescale_factor, (m, u, 3.0, 0.7))):
        assert set(torch.library.opcheck(op.op, args).values()) == {"SUCCESS"}

    def f(x, m, u):
        return ops.diffusion_step(x, m, c.detach(), uncond=u, guidance_scale=3.0, guidance_rescale=0.6,
                                  dynamic_threshold=(0.8, 50.0))

    compiled = torch.compile(f, fullgraph=True)
    cases.close(compiled(x, m, u), f(x, m, u))
    for got, want in zip(*(torch.autograd.grad(g(x, m, u).sin().sum(), (x, m, u)) for g in (compiled, f)), strict=True):
        cases.close(got, want)
    values = [t.detach() for t in (x, m, u)]
    got = torch.func.grad(lambda *v: f(*v).sin().sum(), argnums=(0, 1, 2))(*values)
    for g, want in zip(got, torch.autograd.grad(f(x, m, u).sin().sum(), (x, m, u)), strict=True):
        cases.close(g, want)
    tangents = tuple(torch.ones_like(v) for v in values)
    cases.close(torch.func.jvp(lambda *v: f(*v).sin().sum(), tuple(values), tangents)[1], sum(g.sum() for g in got))


X = torch.zeros(2, 3)
OUT = "dynamic_threshold must be (q in [0, 1], largest above 0), got"


@pytest.mark.parametrize("change, error, text", [
    ({"guidance_rescale": 0.5}, ValueError, "uncond must be given for guidance_rescale, got None"),
    ({"guidance_rescale": 1.5, "uncond": X}, ValueError, "guidance_rescale must be in [0, 1], got 1.5"),
    ({"guidance_rescale": "1", "uncond": X}, TypeError, "guidance_rescale must be a float, got str"),
    ({"dynamic_threshold": 0.9}, TypeError, "dynamic_threshold must be (q, largest), got 0.9"),
    ({"dynamic_threshold": (0.9,)}, TypeError, "dynamic_threshold must be (q, largest), got (0.9,)"),
    ({"dynamic_threshold": (1.1, 2)}, ValueError, OUT),
    ({"dynamic_threshold": (0.9, 0.0)}, ValueError, OUT),
    ({"dynamic_threshold": (math.nan, 2)}, ValueError, OUT),
    ({"dynamic_threshold": (0.9, 2), "clip": 1.0}, ValueError, "clip must be None with dynamic_threshold, got 1.0"),
    ({"dynamic_threshold": (0.9, 2), "x": torch.zeros(()), "model_output": torch.zeros(())}, ValueError,
     "x must be [b, ...] for dynamic_threshold"),
    ({"dynamic_threshold": (0.9, 2), "x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
    ({"dynamic_threshold": (0.9, 2), "model_output": torch.zeros(3, 2)}, ValueError, "model_output must have"),
    ({"dynamic_threshold": (0.9, 2), "coefficients": ROW[:3]}, ValueError, "coefficients must be [8]"),
])  # fmt: skip
def test_errors(change, error, text):
    arguments = {"x": X, "model_output": X, "coefficients": ROW} | change
    with pytest.raises(error, match=re.escape(text)):
        ops.diffusion_step(**arguments)


def test_empty(device):
    for shape in ((0, 3), (2, 0)):
        x = torch.zeros(shape, device=device.torch)
        got = ops.diffusion_step(x, x, ROW.to(device.torch), uncond=x, guidance_rescale=0.5, dynamic_threshold=(0.9, 2))
        assert got.shape == shape
