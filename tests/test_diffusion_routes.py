"""ops.diffusion_step: the fast route, gradients, and torch's other ways of calling."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import cases
from diffusion_cases import DDIM, F64, OPTIONS, call, close, coefficients, tensors
from gmkernels import _call, ops
from gmkernels.ops import diffusion

# the fast route ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10")
def test_the_fast_route_is_taken_and_agrees(kernel_calls, monkeypatch):
    for (names, options), rows, grad in itertools.product(OPTIONS.values(), (False, True), (False, True)):
        if isinstance(options.get("clip"), tuple):
            continue
        made = tensors((3, 3001), names)
        c = coefficients().repeat(3, 1) if rows else coefficients()
        seeds = {"seed": torch.arange(3)} if rows and options.get("noise") else {}
        with torch.set_grad_enabled(grad):
            fast = call(made, c, return_x0=True, **{**options, **seeds})
            assert kernel_calls == []
            with monkeypatch.context() as patch:
                patch.setattr(_call, "plain_eager", lambda: False)
                slow = call(made, c, return_x0=True, **{**options, **seeds})
        assert kernel_calls.pop() == "diffusion_step" and not kernel_calls
        assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])


class Logged(torch.Tensor):
    pass


def test_the_fast_route_stands_aside(kernel_calls):
    """Everything that is not a plain contiguous tensor with memory goes the general way, in every position."""
    good = torch.ones(2, 8)

    def strange():
        yield torch.ones(8, 2).t()
        yield torch.ones(2, 8).requires_grad_()
        yield torch._neg_view(torch.ones(2, 8))
        yield torch.ones(2, 8).as_subclass(Logged)
        yield torch.ones(1, 8).expand(2, 8)

    for t in strange():
        for name in ("x", "model_output", "uncond", "variance", "noise"):
            made = {"x": good, "model_output": good, name: t}
            out = ops.diffusion_step(**made, coefficients=coefficients())
            assert kernel_calls == ["diffusion_step"]
            made = {k: v.detach().as_subclass(torch.Tensor).resolve_neg().contiguous() for k, v in made.items()}
            want = ops.diffusion_step(**made, coefficients=coefficients())
            assert kernel_calls == ["diffusion_step"]
            kernel_calls.clear()
            assert torch.equal(out.detach().as_subclass(torch.Tensor), want)
    for t in (torch.eye(8).to_sparse(), torch.eye(8).to_sparse_csr(), torch.eye(8).to_mkldnn()):
        with pytest.raises((NotImplementedError, RuntimeError, TypeError, ValueError)):
            ops.diffusion_step(t, t, coefficients())
    freed = torch.ones(2, 8)
    freed.untyped_storage().resize_(0)
    for args in [(freed, good), (good, freed)]:
        with pytest.raises(RuntimeError, match="no memory"):
            ops.diffusion_step(*args, coefficients())
    assert ops.diffusion_step(good.to("meta"), good.to("meta"), coefficients().to("meta")).is_meta


def test_a_copy_on_write_tensor_is_not_written_through():
    x = torch.ones(8)
    lazy = torch._lazy_clone(x)
    ops.diffusion_step(x, x, coefficients(DDIM), out=lazy)
    assert torch.equal(x, torch.ones(8)) and not torch.equal(lazy, x)


# gradients -----------------------------------------------------------------------------------------------------------


def leaves(name, rows=False, shape=(2, 3), dtype=F64, device="cpu"):
    """(function of all the floating tensors, the tensors) for gradient checks."""
    names, options = OPTIONS[name]
    made = tensors(shape, names, dtype, device, grad=True)
    c = coefficients(dtype=F64 if dtype is F64 else torch.float32, device=device)
    c = (c * torch.linspace(0.8, 1.2, shape[0], dtype=c.dtype, device=device)[:, None] if rows else c).requires_grad_()
    keys = list(made)

    def f(c, *values, return_x0=True):
        return call(dict(zip(keys, values, strict=True)), c, return_x0=return_x0, **options)

    return f, (c, *made.values())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rows", [False, True])
def test_gradients(name, rows):
    f, values = leaves(name, rows)
    assert gradcheck(f, values)
    assert gradcheck(partial(f, return_x0=False), values)


@pytest.mark.parametrize("name", ["clip", "everything", "given"])
def test_second_derivatives(name):
    f, values = leaves(name, rows=name == "everything")
    assert gradgradcheck(f, values)
    assert gradgradcheck(partial(f, return_x0=False), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_other_dtypes(device, dtype):
    f, values = leaves("everything", dtype=dtype, device=device.torch)
    f(*values, return_x0=False).float().sum().backward()
    wide = [v.detach().double().requires_grad_() for v in values]
    f(*wide, return_x0=False).sum().backward()
    for v, w in zip(values, wide, strict=True):
        assert v.grad.dtype is v.dtype
        half = dtype is torch.bfloat16
        cases.close(v.grad, w.grad, rtol=2e-2 if half else 1e-5, atol=1e-2 if v is values[0] and half else 1e-4)


def test_gradient_does_not_spread_nan_from_a_hidden_stream():
    x, h = torch.ones(3, requires_grad=True), torch.full((3,), math.nan, requires_grad=True)
    c = coefficients((1, -0.5, 1, 0, 0, 0, 0, 0), grad=True)
    ops.diffusion_step(x, x, c, history=(h,)).sum().backward()
    assert x.grad.isfinite().all() and torch.equal(h.grad, torch.zeros(3)) and c.grad.isfinite().all()


def test_the_gradient_of_a_drawn_seed_sees_the_same_noise():
    """seed=None: the derivative by s is the sum of the z that was really drawn."""
    x = torch.zeros(500)
    c = coefficients((1, 0, 1, 0, 0, 0, 0, 2.0), grad=True)
    out = ops.diffusion_step(x, x, c, noise=True)
    out.sum().backward()
    cases.close(c.grad[7], out.sum().double() / 2, rtol=1e-5)


def test_noise_is_not_stored_for_backward():
    x = torch.zeros(1000, requires_grad=True)
    out = ops.diffusion_step(x, x.detach(), coefficients(), noise=True, seed=1)
    saved = [t for t in out.grad_fn.saved_tensors if t is not None]
    assert sorted(t.numel() for t in saved) == [8, 1000, 1000]


# torch's other ways of calling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("x0", [False, True])
@pytest.mark.parametrize("name", ["plain", "everything", "given"])
def test_opcheck(name, x0):
    names, options = OPTIONS[name]
    made = tensors((2, 5), names, F64, grad=True)
    low, high = diffusion._clip_range(options.get("clip"))
    optional = map(made.get, ("uncond", "h1", "h2", "h3", "variance", "z"))
    args = (made["x"], made["model_output"], coefficients(dtype=F64, grad=True), *optional, *(None,) * 4,
            options.get("guidance_scale", 1.0), low, high, options.get("noise", False), 5, 3, 1.0, 0.0, False)
    op = diffusion._op_x0 if x0 else diffusion._op
    assert set(torch.library.opcheck(op.op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_compile(name):
    torch._dynamo.reset()
    f, values = leaves(name)
    compiled = torch.compile(f, fullgraph=True)
    for got, want in zip(compiled(*values), f(*values), strict=True):
        close(got, want)
    for got, want in zip(torch.autograd.grad(sum(t.sin().sum() for t in compiled(*values)), values),
                         torch.autograd.grad(sum(t.sin().sum() for t in f(*values)), values), strict=True):
        close(got, want)


def test_compile_with_a_seed_of_none():
    torch._dynamo.reset()
    x, c = torch.zeros(400), coefficients((1, 0, 1, 0, 0, 0, 0, 2.0), grad=True)
    f = torch.compile(lambda x, c: ops.diffusion_step(x, x, c, noise=True), fullgraph=True)
    out, other = f(x, c), f(x, c)
    assert not torch.equal(out, other) and 1.8 < out.std() < 2.2
    out.sum().backward()
    cases.close(c.grad[7], out.sum().double() / 2, rtol=1e-5)


def test_compile_does_not_recompile_for_every_step():
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounter()
    c, x = coefficients(), torch.ones(2, 9)

    def f(x, step):
        return ops.diffusion_step(x, x, c, noise=True, seed=1, step=step)

    compiled = torch.compile(f, fullgraph=True, backend=frames)
    for step in range(6):
        assert torch.equal(compiled(x, step), f(x, step))
    assert frames.frame_count <= 3  # 0 and 1 are special, then the step is a symbol


def test_compile_into_out():
    torch._dynamo.reset()
    x, out, x0 = torch.ones(7), torch.empty(7), torch.empty(7)
    c = coefficients(DDIM)
    torch.compile(lambda x, out, x0: ops.diffusion_step(x, x, c, out=out, x0_out=x0), fullgraph=True)(x, out, x0)
    want = ops.diffusion_step(x, x, c, return_x0=True)
    close(out, want[0].double())
    close(x0, want[1].double())


def test_func_transforms():
    f, values = leaves("everything", dtype=F64)
    values = tuple(v.detach() for v in values)

    def loss(*values):
        return f(*values, return_x0=False).sin().sum()

    got = torch.func.grad(loss, argnums=tuple(range(len(values))))(*values)
    grown = tuple(v.clone().requires_grad_() for v in values)
    for g, w in zip(got, torch.autograd.grad(loss(*grown), grown), strict=True):
        cases.close(g, w)
    batch = tuple(torch.stack([v, 2 * v]) for v in values)
    want = torch.stack([f(*(v[i] for v in batch), return_x0=False) for i in range(2)])
    cases.close(torch.func.vmap(partial(f, return_x0=False))(*batch), want, rtol=1e-6, atol=1e-6)
    tangents = tuple(torch.ones_like(v) for v in values)
    directional = sum(g.sum() for g in got)
    cases.close(torch.func.jvp(loss, values, tangents)[1], directional, rtol=1e-5, atol=1e-5)


def test_fake_tensors_modes_and_subclasses(kernel_calls):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3)
        out, x0 = ops.diffusion_step(x, x, torch.empty(8), noise=True, return_x0=True)
        assert out.shape == x0.shape == (2, 3)
        with pytest.raises(ValueError, match="coefficients"):
            ops.diffusion_step(x, x, torch.empty(7))
    assert kernel_calls == []
    x = torch.ones(2, 3)
    with FlopCounterMode(display=False):
        ops.diffusion_step(x, x, coefficients())
    assert kernel_calls == ["diffusion_step"]


def test_autocast_follows_the_inputs():
    x = torch.ones(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            y = x.to(dtype)
            assert torch.equal(ops.diffusion_step(y, y, coefficients()), ops.diffusion_step(y, y, coefficients()))
            assert ops.diffusion_step(y, y, coefficients()).dtype is dtype


def test_inference_mode():
    with torch.inference_mode():
        x = torch.ones(3)
        cases.close(ops.diffusion_step(x, x, coefficients(DDIM), out=x), torch.full((3,), 0.82, dtype=F64))
