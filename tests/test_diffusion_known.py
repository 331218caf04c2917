"""diffusion_step(mask=, known=), a step that is a tensor, and ops.DiffusionPlan."""

import math
import re

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import cases
from gmkernels import ops, reference
from gmkernels.ops import diffusion

F32, F64 = torch.float32, torch.float64
ROW = torch.tensor([1.25, -0.75, 0.6, 0.4, 0.1, 0, 0, 0.2])


def inputs(device, *shape, dtype=F32, count=5):
    """x, model_output, uncond, history, known."""
    return [cases.data(*shape, seed=i).to(dtype).to(device.torch) for i in range(count)]


def masks(shape, device, dtype):
    g = torch.Generator().manual_seed(9)
    hard = torch.rand(shape, generator=g) < 0.4
    return hard.to(device), torch.rand(shape, generator=g).to(device, dtype) * hard.to(device)


def oracle(x, m, c, u, h1, mask, known, scale, of_x0, seed=None, step=0, noise=False, clip=None):
    wide = [None if t is None else t.double().cpu() for t in (x, m, c, u, h1)]
    low, high = (-math.inf, math.inf) if clip is None else (-clip, clip)
    seeds = seed.cpu() if isinstance(seed, torch.Tensor) else None
    return reference.diffusion.diffusion_step(
        *wide[:4], wide[4], None, None, None, None, seeds, 3.0, low, high, noise, 0 if seeds is not None else seed or 0,
        step, mask=mask.double().cpu(), known=known.double().cpu(), known_signal=scale[0], known_noise=scale[1],
        known_x0=of_x0)


@pytest.mark.parametrize("of_x0", [False, True])
@pytest.mark.parametrize("dtype", cases.ALL_FLOATS, ids=str)
def test_reference(device, dtype, of_x0):
    tolerance = {F32: 1e-5, F64: 1e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for shape in ((3, 5, 7), (2, 40), (70, 3)) + (() if device.simt else ((2, 3000),)):
        x, m, u, h1, known = inputs(device, *shape, dtype=dtype)
        rows = ROW.to(device.torch) * torch.linspace(0.5, 1.5, shape[0], device=device.torch)[:, None]
        seeds = torch.arange(shape[0], device=device.torch) - 1
        for mask in masks(shape, device.torch, dtype):
            for c, uncond, seed, noise, scale in ((ROW.to(device.torch), None, 7, True, (0.8, 0.6)),
                                                  (rows, u, seeds, True, (0.8, 0.6)), (rows, u, 7, False, (0.8, 0.6)),
                                                  (ROW.to(device.torch), u, seeds, False, (0.3, 1.0)),
                                                  (ROW.to(device.torch), u, None, False, (0.8, 0.0))):
                got = ops.diffusion_step(x, m, c, uncond=uncond, guidance_scale=3.0, history=(h1,), noise=noise,
                                         seed=seed, step=4, return_x0=True, clip=1.5, mask=mask, known=known,
                                         known_scale=scale, known_x0=of_x0)
                want = oracle(x, m, c, uncond, h1, mask, known, scale, of_x0, seed, 4, noise, 1.5)
                for a, b in zip(got, want, strict=True):
                    assert a.dtype is dtype
                    cases.close(a, b, rtol=tolerance, atol=tolerance)


def test_every_instruction_set_and_thread_count(isa):
    x, m, u, h1, known = (cases.data(3, 12_001, seed=i).float() for i in range(5))
    mask, _ = masks(x.shape, "cpu", F32)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(ops.diffusion_step(x, m, ROW, uncond=u, guidance_scale=3.0, history=(h1,), noise=True,
                                          seed=3, mask=mask, known=known, known_scale=(0.8, 0.6)))
    assert all(torch.equal(r, results[0]) for r in results)
    want = oracle(x, m, ROW, u, h1, mask, known, (0.8, 0.6), False, 3, 0, True)[0]
    cases.close(results[0], want, rtol=1e-5, atol=1e-5)


def test_the_noise_of_what_is_known(device):
    x, known = inputs(device, 2, 3, 21, count=2)
    one = torch.ones_like(x)
    got = ops.diffusion_step(x, x, ROW.to(device.torch), noise=True, seed=5, step=2, mask=one, known=known,
                             known_scale=(0.0, 1.0))
    assert torch.equal(got, ops.philox_normal(x.shape, 5, 2, 10, device=device.torch))


def test_the_mask_hides(device):
    """What is not taken may hold anything."""
    x, m, known = inputs(device, 4, 33, count=3)
    mask = torch.rand(4, 33, generator=torch.Generator().manual_seed(0)).to(device.torch) < 0.5
    want = ops.diffusion_step(x, m, ROW.to(device.torch), mask=mask, known=known)
    got = ops.diffusion_step(x.masked_fill(mask, math.nan), m.masked_fill(mask, math.inf), ROW.to(device.torch),
                             mask=mask, known=known.masked_fill(~mask, math.nan))
    assert torch.equal(got, want) and torch.equal(got[mask], known[mask])
    of_x0, x0 = ops.diffusion_step(x, m.masked_fill(mask, math.nan), ROW.to(device.torch), mask=mask, known=known,
                                   known_x0=True, return_x0=True)
    assert of_x0.isfinite().all() and torch.equal(x0[mask], known[mask])
    nan = torch.full_like(x, math.nan)  # as does a coefficient of 0
    of_m = torch.tensor([0, 0.5, 2.0, 0, 0, 0, 0, 0], device=device.torch)
    of_x = torch.tensor([1.0, 1, 0, 2, 0, 0, 0, 0], device=device.torch)
    assert torch.equal(ops.diffusion_step(nan, m, of_m, mask=mask, known=known), torch.where(mask, known, m))
    assert torch.equal(ops.diffusion_step(x, nan, of_x, mask=mask, known=known), torch.where(mask, known, 2 * x))


def test_in_place_and_strided(device):
    x, m, known = inputs(device, 4, 6, 5, count=3)
    mask, _ = masks(x.shape, device.torch, F32)
    options = {"known_scale": (0.8, 0.6), "seed": 3, "noise": True}
    want = ops.diffusion_step(x, m, ROW.to(device.torch), mask=mask, known=known, **options)
    y = x.clone()
    assert ops.diffusion_step(y, m, ROW.to(device.torch), mask=mask, known=known, out=y, **options) is y
    assert torch.equal(y, want)
    views = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, m, mask, known)]
    got = ops.diffusion_step(*views[:2], ROW.to(device.torch), mask=views[2], known=views[3], **options)
    assert torch.equal(got, want)
    z = torch.zeros_like(x)
    options = {"mask": mask, "known": known, "seed": 3, "known_scale": (0.8, 0.6)}
    got = ops.diffusion_step(x, m, ROW.to(device.torch), noise=z, **options)
    assert torch.equal(got, ops.diffusion_step(x, m, ROW.to(device.torch), **options))


@pytest.mark.parametrize("of_x0", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_gradients(of_x0, soft):
    mask = masks((2, 7), "cpu", F64)[soft]
    x, m, u, h1, known = (cases.data(2, 7, seed=i, grad=True) for i in range(5))
    c = ROW.double().requires_grad_()

    def f(x, m, u, h1, known, c):
        return ops.diffusion_step(x, m, c, uncond=u, guidance_scale=3.0, history=(h1,), return_x0=True, noise=True,
                                  seed=3, mask=mask, known=known, known_scale=(0.8, 0.6), known_x0=of_x0)

    assert gradcheck(f, (x, m, u, h1, known, c))
    assert gradgradcheck(f, (x, m, u, h1, known, c))


def test_opcheck_and_compile():
    torch._dynamo.reset()
    x, m, known = (cases.data(3, 8, seed=i, grad=True) for i in range(3))
    mask = masks((3, 8), "cpu", F64)[1]
    none = (None,) * 6
    args = (x, m, ROW.double(), *none, torch.arange(3), mask, known, None, 1.0, -2.0, 2.0, True, 0, 2, 0.8, 0.6, True)
    for op in (diffusion._op, diffusion._op_x0):
        assert set(torch.library.opcheck(op.op, args).values()) == {"SUCCESS"}
    indexed = (x, m, torch.stack((ROW, 2 * ROW)).double(), *none, None, None, None, torch.tensor(1), 1.0, -2.0, 2.0,
               True, 5, 0, 1.0, 0.0, False)
    assert set(torch.library.opcheck(diffusion._op.op, indexed).values()) == {"SUCCESS"}

    def f(x, m, known):
        return ops.diffusion_step(x, m, ROW.double(), mask=mask, known=known, known_scale=(0.8, 0.6), seed=4)

    compiled = torch.compile(f, fullgraph=True)
    cases.close(compiled(x, m, known), f(x, m, known))
    for got, want in zip(*(torch.autograd.grad(g(x, m, known).sin().sum(), (x, m, known)) for g in (compiled, f)),
                         strict=True):
        cases.close(got, want)


X = torch.zeros(2, 3)


@pytest.mark.parametrize("change, error, text", [
    ({"mask": X}, ValueError, "mask and known must be given together, got mask alone"),
    ({"known": X}, ValueError, "mask and known must be given together, got known alone"),
    ({"mask": X, "known": 3}, TypeError, "known must be a torch.Tensor, got int"),
    ({"mask": X[:1], "known": X}, ValueError, "mask must have the shape of x, (2, 3), got (1, 3)"),
    ({"mask": X, "known": X.T}, ValueError, "known must have the shape of x, (2, 3), got (3, 2)"),
    ({"mask": X.int(), "known": X}, TypeError, "mask must be torch.float32 as x"),
    ({"mask": X, "known": X.double()}, TypeError, "known must be torch.float32 as x"),
    ({"mask": X, "known": X, "known_scale": 1.0}, TypeError, "known_scale must be (a, b), two floats, got 1.0"),
    ({"mask": X, "known": X, "known_x0": 1}, TypeError, "known_x0 must be a bool, got int"),
    ({"mask": X.clone().requires_grad_(), "known": X}, ValueError, "mask must not require a gradient"),
    ({"step": torch.tensor(0)}, ValueError, "coefficients must be [steps, 8] where step is a tensor, got (8,)"),
    ({"step": torch.tensor([0]), "coefficients": ROW[None]}, TypeError, "step must be an int or an int64 tensor []"),
    ({"step": torch.tensor(0.0), "coefficients": ROW[None]}, TypeError, "step must be an int or an int64 tensor []"),
    ({"step": torch.tensor(1), "coefficients": ROW[None]}, ValueError, "step must be in [0, 1), the rows of"),
    ({"step": torch.tensor(-1), "coefficients": ROW[None]}, ValueError, "step must be in [0, 1), the rows of"),
    ({"step": torch.tensor(0), "coefficients": ROW[None].clone().requires_grad_()}, ValueError,
     "coefficients must not require a gradient where step is a tensor"),
    ({"step": torch.tensor(0), "coefficients": ROW[None], "dynamic_threshold": (0.9, 2)}, TypeError,
     "step must be an int with dynamic_threshold"),
])  # fmt: skip
def test_errors(change, error, text):
    arguments = {"x": X, "model_output": X, "coefficients": ROW} | change
    with pytest.raises(error, match=re.escape(text)):
        ops.diffusion_step(**arguments)


# plans ---------------------------------------------------------------------------------------------------------------


def table(steps=5, device="cpu", dtype=F32):
    return (ROW * torch.linspace(0.5, 1.5, steps)[:, None]).to(device, dtype)


def test_a_step_that_is_a_tensor(device):
    x, m, u, h1, known = inputs(device, 3, 5, 7)
    rows, mask = table(device=device.torch), masks((3, 5, 7), device.torch, F32)[0]
    seed = torch.tensor(11, device=device.torch)
    for options in ({}, {"noise": True, "seed": seed}, {"noise": True, "seed": torch.arange(3, device=device.torch)},
                    {"noise": True, "seed": seed, "mask": mask, "known": known, "known_scale": (0.8, 0.6)},
                    {"uncond": u, "guidance_scale": 3.0, "history": (h1,), "clip": 1.0, "return_x0": True}):
        for i in range(5):
            got = ops.diffusion_step(x, m, rows, step=torch.tensor(i, device=device.torch), **options)
            want = ops.diffusion_step(x, m, rows[i], step=i, **options)
            for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
                cases.close(a, b.double(), rtol=1e-6, atol=1e-6)
                assert device.simt or torch.equal(a, b)


def test_a_tensor_outside_the_rows(device):
    x, m = inputs(device, 3, 5, count=2)
    for bad in (-1, 5, 2**40, -(2**40)):
        step = torch.tensor(bad, device=device.torch)
        if device.name == "cpu" or (cases.rehearsal and not device.simt):
            with pytest.raises(ValueError, match=re.escape("step must be in [0, 5), the rows of coefficients")):
                ops.diffusion_step(x, m, table(device=device.torch), step=step)
        elif not device.simt:
            assert ops.diffusion_step(x, m, table(device=device.torch), step=step).isnan().all()


def test_a_tensor_outside_the_rows_is_nan_on_a_gpu_simt():
    backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    x, m = (cases.data(3, 5, seed=i).float() for i in range(2))
    for bad, count in ((-1, 5), (5, 5), (2**32, 5), (2**40, 5), (1, 1)):
        out, index, rows = torch.empty_like(x), torch.tensor(bad), table()[:count].contiguous()
        with backend.running():
            diffusion._kernel((out, None), (x, m, rows, *(None,) * 9, index), x.numel(), 1, 1, 0, 0, 1.0, -math.inf,
                              math.inf, 0, 1.0, 0.0, False, count, 0, False)
        assert out.isnan().all()


def test_gradients_of_a_step_that_is_a_tensor():
    x, m = (cases.data(2, 7, seed=i, grad=True) for i in range(2))
    rows = table(dtype=F64)

    def f(x, m):
        return ops.diffusion_step(x, m, rows, step=torch.tensor(3), noise=True, seed=2, clip=2.0)

    assert gradcheck(f, (x, m))
    got = torch.autograd.grad(f(x, m).sum(), (x, m))
    want = torch.autograd.grad(ops.diffusion_step(x, m, rows[3], clip=2.0).sum(), (x, m))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
def test_plan(device, dtype):
    x, m, u, h1, known = inputs(device, 3, 5, 7, dtype=dtype)
    mask = masks((3, 5, 7), device.torch, dtype)[0]
    plan = ops.DiffusionPlan(table(dtype=F64), noise=True, seed=3, clip=1.5, guidance_scale=2.0, device=device.torch,
                             dtype=dtype)
    rows = table(dtype=F64).to(F64 if dtype is F64 else F32).to(device.torch)
    assert len(plan) == 5
    for options in ({}, {"uncond": u}, {"history": (h1,), "return_x0": True},
                    {"mask": mask, "known": known, "known_scale": (0.8, 0.6), "known_x0": True}):
        for i in (0, 3, 4):
            same = {"noise": True, "seed": 3, "step": i, "clip": 1.5, "guidance_scale": 2.0}
            want = ops.diffusion_step(x, m, rows[i], **same, **options)
            for index in (i, torch.tensor(i, device=device.torch)):
                got = plan(x, m, index, **options)
                for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
                    cases.close(a, b.double(), rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)
    y = x.clone()
    assert plan(y, m, 1, out=y) is y and torch.equal(y, plan(x, m, 1))


def test_plan_with_statistics():
    x, m, u = (3 * cases.data(3, 50, seed=i).float() for i in range(3))
    plan = ops.DiffusionPlan(table(), guidance_scale=2.0, guidance_rescale=0.7, dynamic_threshold=(0.9, 4.0))
    want = ops.diffusion_step(x, m, table()[2], uncond=u, guidance_scale=2.0, guidance_rescale=0.7,
                              dynamic_threshold=(0.9, 4.0))
    assert torch.equal(plan(x, m, 2, uncond=u), want)
    with pytest.raises(TypeError, match="step must be an int with guidance_rescale"):
        plan(x, m, torch.tensor(2), uncond=u)


def test_plan_draws_a_seed_once():
    torch.manual_seed(0)
    plan, x = ops.DiffusionPlan(table(), noise=True), torch.zeros(2, 3)
    assert torch.equal(plan(x, x, 1), plan(x, x, 1)) and not torch.equal(plan(x, x, 1), plan(x, x, 2))
    assert not torch.equal(ops.DiffusionPlan(table(), noise=True)(x, x, 1), plan(x, x, 1))


def test_plan_errors():
    plan, x = ops.DiffusionPlan(table()), torch.zeros(2, 3)
    for bad in (-1, 5):
        with pytest.raises(IndexError, match=re.escape(f"i must be in [0, 5), a step of the plan, got {bad}")):
            plan(x, x, bad)
    with pytest.raises(TypeError, match="i must be an integer, got float"):
        plan(x, x, 1.0)
    with pytest.raises(ValueError, match="known_scale must have no noise in a plan without noise"):
        plan(x, x, 1, mask=x, known=x, known_scale=(1.0, 0.5))
    with pytest.raises(ValueError, match=re.escape("coefficients must be floating [steps, 8], got torch.float32 (8,)")):
        ops.DiffusionPlan(ROW)
    with pytest.raises(TypeError, match="noise must be a bool, got Tensor"):
        ops.DiffusionPlan(table(), noise=x)
