"""ops.diffusion_step: values, noise, gradients, routes, errors."""

import itertools
import math
import re
from functools import partial

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from gmkernels import _C, _call, ops, reference
from gmkernels.ops import diffusion
from gmkernels.ops import diffusion_coefficients as co

F64 = torch.float64
FULL = (1.2, -0.5, 0.6, 0.4, 0.3, -0.2, 0.1, 0.7)  # every stream is live
DDIM = (1.2, -0.5, 0.6, 0.4, 0.0, 0.0, 0.0, 0.0)
OPTIONS = {  # name: (names of the tensors, other arguments)
    "plain": ((), {}),
    "guided": (("uncond",), {"guidance_scale": 3.0}),
    "clip": ((), {"clip": 0.8}),
    "pair": ((), {"clip": (-0.1, 1.5)}),
    "history1": (("h1",), {}),
    "history2": (("h1", "h2"), {"clip": 1.0}),
    "history3": (("h1", "h2", "h3"), {}),
    "drawn": ((), {"noise": True, "seed": 5, "step": 3}),
    "given": (("z",), {}),
    "learned": (("variance",), {"noise": True, "seed": -1, "step": 2**32 - 1}),
    "everything": (("uncond", "h1", "h2", "h3", "variance"),
                   {"guidance_scale": 2.0, "clip": 1.0, "noise": True, "seed": 2**64 - 1, "step": 1}),
}


def tensors(shape, names, dtype=torch.float32, device="cpu", grad=False):
    made = {}
    for seed, name in enumerate(("x", "model_output", *names)):
        t = cases.data(*shape, seed=seed)
        made[name] = (t.abs() + 0.1 if name == "variance" else t).to(device, dtype).requires_grad_(grad)
    return made


def coefficients(values=FULL, dtype=torch.float32, device="cpu", grad=False):
    return torch.tensor(values, dtype=dtype, device=device, requires_grad=grad)


def call(made, c, **options):
    """ops.diffusion_step of the tensors by name."""
    history = tuple(made[h] for h in ("h1", "h2", "h3") if h in made)
    more = {k: made[k] for k in ("uncond", "variance") if k in made}
    if "z" in made:
        options["noise"] = made["z"]
    return ops.diffusion_step(made["x"], made["model_output"], c, history=history, **more, **options)


def oracle(made, c, guidance_scale=1.0, clip=None, noise=False, seed=None, step=0, **_):
    """(out, x0) by the reference, in float64, with the same normal numbers."""
    d = {k: t.detach().cpu().double() for k, t in made.items()}
    z = d.get("z")
    if noise:
        shape = d["x"].shape
        z = ops.philox_normal(shape, seed=seed.cpu() if isinstance(seed, torch.Tensor) else seed, step=step, stream=2)
    low, high = diffusion._clip_range(clip)
    return reference.diffusion.diffusion_step(
        d["x"], d["model_output"], c.detach().cpu().double(), d.get("uncond"), d.get("h1"), d.get("h2"), d.get("h3"),
        d.get("variance"), z, None, guidance_scale, low, high,
    )


def close(got, want):
    cases.close(got, want, atol=None if got.dtype is F64 else 5e-6 if got.dtype is torch.float32 else 1e-4)


# values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.ALL_FLOATS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_reference(device, dtype, name):
    names, options = OPTIONS[name]
    for shape in [(3, 5, 7), (2, 40)]:
        made = tensors(shape, names, dtype, device.torch)
        c = coefficients(device=device.torch)
        out, x0 = call(made, c, return_x0=True, **options)
        assert out.dtype is x0.dtype is dtype and out.shape == x0.shape == shape
        want = oracle(made, c, **options)
        close(out, want[0])
        close(x0, want[1])
        assert torch.equal(call(made, c, **options), out)


@pytest.mark.parametrize("dtype", cases.ALL_FLOATS, ids=str)
def test_sizes(device, dtype):
    names, options = OPTIONS["everything"]
    for n in (*cases.SIZES, 255, 257) if not device.simt else (0, 1, 5, 17):
        made = tensors((n,), names, dtype, device.torch)
        close(call(made, coefficients(device=device.torch), **options), oracle(made, coefficients(), **options)[0])


def test_large(isa):
    """Several runs and threads, and every instruction set; 1031 is a prime, 40960 a multiple of everything."""
    names, options = OPTIONS["everything"]
    for shape in [(31, 1031), (4, 40960)]:
        made = tensors(shape, names)
        close(call(made, coefficients(), **options), oracle(made, coefficients(), **options)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_is_rounded_once(isa, dtype):
    names, options = OPTIONS["everything"]
    made = tensors((64, 65), names, dtype)
    want = oracle(made, coefficients(), **options)[0]
    got = call(made, coefficients(), **options).double()
    ulp = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(want.abs())))
    assert ((got - want).abs() <= 0.5 * ulp + 3e-6).all()


def test_float64_coefficients(device):
    c = coefficients((math.pi, -0.1, 0.2, 0.3, 0, 0, 0, 0), F64, device.torch)
    made = tensors((3, 5), (), F64, device.torch)
    cases.close(call(made, c), oracle(made, c)[0], rtol=1e-15, atol=1e-15)
    narrow = call(made, c.float())
    cases.close(narrow, oracle(made, c.float())[0])
    assert not torch.equal(narrow, call(made, c))


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 1), (5, 2), (2, 300), (3, 8)], ids=str)
@pytest.mark.parametrize("seeds", [False, True])
def test_rows_of_coefficients(device, shape, seeds):
    names, options = OPTIONS["everything"]
    b = shape[0]
    c = coefficients(device=device.torch) * torch.linspace(0.5, 1.5, b, device=device.torch)[:, None]
    c[0, 7] = c[1, 4] = c[b - 1, 0] = 0  # some rows draw nothing, lack a history, ignore x in x0
    if seeds:
        options = {**options, "seed": torch.arange(b, device=device.torch) - 1}
    made = tensors(shape, names, torch.float32, device.torch)
    out, x0 = call(made, c, return_x0=True, **options)
    want = oracle(made, c, **options)
    close(out, want[0])
    close(x0, want[1])


def test_per_sample_results_do_not_depend_on_the_batch(device):
    names, options = OPTIONS["everything"]
    seeds = torch.tensor([7, -3, 2**40], device=device.torch)
    made = tensors((3, 45), names, torch.float32, device.torch)
    c = coefficients(device=device.torch).repeat(3, 1)
    whole = call(made, c, **{**options, "seed": seeds})
    for i in range(3):
        part = {k: t[i : i + 1] for k, t in made.items()}
        alone = call(part, c[i : i + 1], **{**options, "seed": seeds[i : i + 1]})
        assert torch.equal(whole[i], alone[0])


# noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.ALL_FLOATS, ids=str)
def test_the_noise_is_philox_normal(device, dtype):
    c = coefficients((0, 0, 0, 0, 0, 0, 0, 1), device=device.torch)
    for shape, seed in [((3, 300), 11), ((2, 7), 2**63 + 5), ((3, 41), torch.tensor([1, 2, -3])), ((5,), torch.tensor(9))]:
        if isinstance(seed, torch.Tensor):
            seed = seed.to(device.torch)
        x = torch.full(shape, math.nan, dtype=dtype, device=device.torch)
        z = ops.diffusion_step(x, x, c, noise=True, seed=seed, step=4)
        assert torch.equal(z, ops.philox_normal(shape, seed, 4, 2, dtype=dtype, device=x.device))


def test_same_bits_on_every_instruction_set_and_thread_count():
    names, options = OPTIONS["everything"]
    made = tensors((3, 70001), names)
    c, before, isa = coefficients(), torch.get_num_threads(), _C.isa()
    only_noise = coefficients((0, 0, 0, 0, 0, 0, 0, 1))
    noise, per_isa = [], []
    try:
        for _C_isa in _C.isas():
            _C.set_isa(_C_isa)
            results = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                results.append(call(made, c, **options))
                noise.append(call(made, only_noise, **{**options, "guidance_scale": 1.0}))
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
            per_isa.append(results[0])
    finally:
        torch.set_num_threads(before)
        _C.set_isa(isa)
    assert all(torch.equal(noise[0], z) for z in noise)
    for other in per_isa[1:]:
        cases.close(other, per_isa[0].double(), atol=5e-6)


def test_a_seed_of_none_is_drawn_from_torch():
    made, c = tensors((2, 50), ()), coefficients()
    torch.manual_seed(3)
    first, second = call(made, c, noise=True), call(made, c, noise=True)
    torch.manual_seed(3)
    assert torch.equal(first, call(made, c, noise=True)) and not torch.equal(first, second)


def test_steps_differ():
    made, c = tensors((2, 50), ()), coefficients()
    assert not torch.equal(call(made, c, noise=True, seed=1, step=0), call(made, c, noise=True, seed=1, step=1))


# special values ------------------------------------------------------------------------------------------------------


def test_a_zero_coefficient_hides_its_stream(device):
    """Each stream is NaN and infinite in turn, with the coefficients that read it at 0."""
    shape, bad = (2, 19), torch.tensor([math.nan, math.inf] * 19, device=device.torch).reshape(2, 19)
    readers = {"x": (0, 3), "model_output": (1,), "uncond": (1,), "h1": (4,), "h2": (5,), "h3": (6,), "z": (7,),
               "variance": (7,)}
    for name, rows in itertools.product(readers, (False, True)):
        made = tensors(shape, ("uncond", "h1", "h2", "h3", "variance", "z"), torch.float32, device.torch)
        values = list(FULL)
        for k in readers[name]:
            values[k] = 0.0
        c = coefficients(values, device=device.torch)
        c = c.repeat(2, 1) if rows else c
        want = oracle(made, c)[0]
        made[name] = bad
        close(call(made, c), want)
    c = coefficients((1, 1, 0, 0.5, 0, 0, 0, 0), device=device.torch)  # c0 = 0 hides an x0 that is asked for
    made = {"x": torch.ones(shape, device=device.torch), "model_output": bad}
    out, x0 = call(made, c, return_x0=True, clip=2.0)
    assert torch.equal(out, torch.full_like(out, 0.5)) and torch.equal(x0.isnan(), bad.isnan())


@pytest.mark.parametrize("dtype", cases.ALL_FLOATS, ids=str)
def test_clip_is_torch_clamp(device, dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e30 if dtype is not torch.float16 else 6e4, -5.0] * 6,
                     device=device.torch).to(dtype)
    c = coefficients((1, 0, 1, 0, 0, 0, 0, 0), device=device.torch)
    for clip in (None, 1.0, (-0.5, 2.0), (1.0, 3.0), (-math.inf, 0.0)):
        out, x0 = ops.diffusion_step(x, x, c, clip=clip, return_x0=True)
        want = x if clip is None else x.clamp(*diffusion._clip_range(clip))
        assert torch.equal(out.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0)) and torch.equal(out.isnan(), x.isnan())
        assert torch.equal(x0.isnan(), x.isnan())


def test_a_nan_stays_where_it_is():
    made = tensors((4, 50), ("h1",))
    clean = call(made, coefficients(), clip=1.0)
    made["x"][2, 3] = math.nan
    out = call(made, coefficients(), clip=1.0)
    assert out.isnan().sum() == 1 and out[2, 3].isnan()
    out[2, 3] = clean[2, 3]
    assert torch.equal(out, clean)


def test_empty_and_scalar(device):
    c = coefficients(device=device.torch)
    for shape in [(0,), (0, 3), (3, 0)]:
        made = tensors(shape, ("h1", "variance"), torch.float32, device.torch)
        assert call(made, c, noise=True, seed=1).shape == shape
        assert call(made, c.repeat(shape[0], 1), noise=True, seed=torch.arange(shape[0], device=device.torch)).shape == shape
    made = tensors((), (), torch.float32, device.torch)
    close(call(made, c, noise=True, seed=1), oracle(made, c, noise=True, seed=1)[0])


# memory --------------------------------------------------------------------------------------------------------------


def test_strided_expanded_and_offset_inputs(device):
    names, options = OPTIONS["everything"]
    for view in (
        lambda t: t.transpose(0, 1),
        lambda t: t[1:, ::2],
        lambda t: t[:1].expand(4, -1),
        lambda t: t.flatten()[1:22].view(3, 7),
        lambda t: t.flip(1),
    ):
        made = {k: view(t) for k, t in tensors((4, 6), names, torch.float32, device.torch).items()}
        c = coefficients(device=device.torch)
        out = call(made, c, **options)
        assert out.is_contiguous()
        close(out, oracle(made, c, **options)[0])
        wide = coefficients(device=device.torch).repeat_interleave(2)[::2]
        assert torch.equal(call(made, wide, **options), out)


def test_out_and_in_place(device):
    names, options = OPTIONS["everything"]
    c = coefficients(device=device.torch)
    fresh = tensors((3, 37), names, torch.float32, device.torch)
    want, want_x0 = call(fresh, c, return_x0=True, **options)
    for where, x0_where in itertools.product((None, "new", "x", "h1", "uncond"), (None, "new", "model_output", "variance")):
        made = {k: t.clone() for k, t in fresh.items()}
        made["new"] = torch.empty_like(want)
        out, x0 = made.get(where), made.get(x0_where)
        if where == x0_where == "new":
            x0 = torch.empty_like(want)
        del made["new"]
        got, got_x0 = call(made, c, return_x0=True, out=out, x0_out=x0, **options)
        assert (out is None or got is out) and (x0 is None or got_x0 is x0)
        assert torch.equal(got, want) and torch.equal(got_x0, want_x0)
    x0 = torch.empty_like(want)
    got = call(fresh, c, x0_out=x0, **options)
    assert torch.equal(got, want) and torch.equal(x0, want_x0)


def test_out_of_a_strided_input_is_right():
    base = cases.data(6, 6, dtype=torch.float32)
    want = ops.diffusion_step(base.t().clone(), base, coefficients(DDIM))
    assert torch.equal(ops.diffusion_step(base.t(), base, coefficients(DDIM), out=base), want)


def test_overlaps_are_refused(device):
    memory = torch.zeros(60, device=device.torch)
    x, shifted, other = memory[:20], memory[4:24], memory[40:]
    c = coefficients(DDIM, device=device.torch)
    for name in ("x", "model_output", "uncond", "history", "variance", "noise"):
        arguments = {"x": other, "model_output": other, name: (x,) if name == "history" else x}
        with pytest.raises(ValueError, match="out overlaps a part of an input"):
            ops.diffusion_step(**arguments, coefficients=c, out=shifted)
    with pytest.raises(ValueError, match="x0_out overlaps a part"):
        ops.diffusion_step(x, other, c, x0_out=shifted)
    with pytest.raises(ValueError, match="out and x0_out must not share memory"):
        ops.diffusion_step(other, other, c, out=x, x0_out=x)
    memory[3:11] = c
    with pytest.raises(ValueError, match="out must not share memory with coefficients"):
        ops.diffusion_step(other, other, memory[3:11], out=x)
    seed = memory.view(torch.int64)[0]
    with pytest.raises(ValueError, match="out must not share memory with seed"):
        ops.diffusion_step(other, other, c, noise=True, seed=seed, out=x)


def test_out_bumps_the_version_counter():
    for route in ("fast", "general"):
        x = cases.data(5, dtype=torch.float32, grad=True)
        saved, saved_x0 = x * 1.0, x * 2.0
        y = saved.exp() + saved * saved + saved_x0 * saved_x0
        with torch.no_grad():
            out, x0 = saved.detach(), saved_x0.detach()
            before = out._version, x0._version
            other = torch.ones(5) if route == "fast" else torch.ones(10)[::2]
            ops.diffusion_step(other, other, coefficients(), out=out, x0_out=x0)
            assert out._version > before[0] and x0._version > before[1]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# the fast route ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10: general route only")
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
    c = coefficients(dtype=dtype, device=device)
    c = (c * torch.linspace(0.8, 1.2, shape[0], dtype=dtype, device=device)[:, None] if rows else c).requires_grad_()
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
    f, values = leaves("everything", dtype=dtype, device=device.torch) if dtype is torch.float32 else (None, None)
    if f is None:
        names, options = OPTIONS["everything"]
        made = tensors((2, 3), names, dtype, device.torch, grad=True)
        values = (coefficients(device=device.torch, grad=True), *made.values())
        keys = list(made)

        def f(c, *v, return_x0=True):
            return call(dict(zip(keys, v, strict=True)), c, return_x0=return_x0, **options)

    f(*values, return_x0=False).float().sum().backward()
    wide = [v.detach().double().requires_grad_() for v in values]
    f(*wide, return_x0=False).sum().backward()
    for v, w in zip(values, wide, strict=True):
        assert v.grad.dtype is v.dtype
        cases.close(v.grad, w.grad, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2 if v is values[0] else 1e-4)


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
    args = (made["x"], made["model_output"], coefficients(dtype=F64, grad=True), *map(made.get, ("uncond", "h1", "h2", "h3",
            "variance", "z")), None, options.get("guidance_scale", 1.0), low, high, options.get("noise", False), 5, 3)
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
    f = torch.compile(lambda x, step: ops.diffusion_step(x, x, c, noise=True, seed=1, step=step), fullgraph=True, backend=frames)
    for step in range(6):
        assert torch.equal(f(x, step), ops.diffusion_step(x, x, c, noise=True, seed=1, step=step))
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
    with torch.utils.flop_counter.FlopCounterMode(display=False):
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


# random shapes -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=4), dtype=st.sampled_from(cases.ALL_FLOATS),
       name=st.sampled_from(list(OPTIONS)), rows=st.booleans(), seeds=st.booleans(), steps=st.integers(1, 3))
def test_any_shape(shape, dtype, name, rows, seeds, steps):
    names, options = OPTIONS[name]
    shape[-1] *= 7
    made = {k: t[..., ::steps] for k, t in tensors(shape, names, dtype).items()}
    b = shape[0]
    if b == 0 and rows:
        return
    c = coefficients()
    c = c * torch.linspace(-1, 1, b)[:, None] if rows else c
    if seeds and options.get("noise"):
        options = {**options, "seed": torch.arange(made["x"].shape[0])}
    if made["x"].dim() == 1 and rows:
        c = c[: made["x"].shape[0]]
    got, want = call(made, c, **options), oracle(made, c, **options)[0]
    cases.close(got, want, atol=1e-2 if dtype is torch.bfloat16 else 2e-3 if dtype is torch.float16 else 1e-5)


# bad input -----------------------------------------------------------------------------------------------------------

X = torch.ones(2, 3)
BAD = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": X.long()}, TypeError, "x must be one of torch.float32"),
    ({"x": X.to(torch.cfloat)}, TypeError, "got torch.complex64"),
    ({"model_output": None}, TypeError, "model_output must be a torch.Tensor, got NoneType"),
    ({"model_output": X.double()}, TypeError, "model_output must be torch.float32 as x, got torch.float64"),
    ({"model_output": torch.ones(3, 2)}, ValueError, "model_output must have the shape of x, (2, 3), got (3, 2)"),
    ({"model_output": torch.ones(6)}, ValueError, "model_output must have the shape of x, (2, 3), got (6,)"),
    ({"uncond": torch.ones(1, 3)}, ValueError, "uncond must have the shape of x"),
    ({"uncond": 1.0}, TypeError, "uncond must be a torch.Tensor, got float"),
    ({"coefficients": list(FULL)}, TypeError, "coefficients must be a torch.Tensor, got list"),
    ({"coefficients": torch.ones(7)}, ValueError, "coefficients must be [8] or [2, 8]"),
    ({"coefficients": torch.ones(3, 8)}, ValueError, "got (3, 8)"),
    ({"coefficients": torch.ones(1, 8)}, ValueError, "got (1, 8)"),
    ({"coefficients": torch.ones(())}, ValueError, "coefficients must be [8]"),
    ({"coefficients": torch.ones(2, 1, 8)}, ValueError, "coefficients must be [8]"),
    ({"coefficients": torch.ones(8).double()}, TypeError, "coefficients must be float32 for x of torch.float32"),
    ({"coefficients": torch.ones(8).half()}, TypeError, "coefficients must be float32"),
    ({"history": X}, TypeError, "history must be a tuple of tensors, got Tensor"),
    ({"history": (X,) * 4}, ValueError, "history must have at most 3 tensors, got 4"),
    ({"history": (X, 1.0)}, TypeError, "history[1] must be a torch.Tensor, got float"),
    ({"history": (X, X.half())}, TypeError, "history[1] must be torch.float32 as x, got torch.float16"),
    ({"history": (X, X, X[0])}, ValueError, "history[2] must have the shape of x"),
    ({"variance": X[:1]}, ValueError, "variance must have the shape of x, (2, 3), got (1, 3)"),
    ({"guidance_scale": X}, TypeError, "guidance_scale must be a float, got Tensor"),
    ({"clip": -1.0}, ValueError, "clip must be a positive float"),
    ({"clip": 0.0}, ValueError, "clip must be a positive float"),
    ({"clip": math.nan}, ValueError, "clip must be a positive float"),
    ({"clip": (1.0, -1.0)}, ValueError, "with low < high, got (1.0, -1.0)"),
    ({"clip": (1.0,)}, TypeError, "a pair (low, high)"),
    ({"clip": "yes"}, TypeError, "clip must be None"),
    ({"noise": 1}, TypeError, "noise must be a bool or a tensor, got int"),
    ({"noise": X.double()}, TypeError, "noise must be torch.float32 as x"),
    ({"noise": X[0]}, ValueError, "noise must have the shape of x"),
    ({"noise": X, "seed": 1}, ValueError, "seed must be None where noise is a tensor"),
    ({"noise": True, "seed": 1.5}, TypeError, "seed must be an integer, got float"),
    ({"noise": True, "seed": 2**64}, ValueError, "seed must be in"),
    ({"noise": True, "seed": -(2**63) - 1}, ValueError, "seed must be in"),
    ({"noise": True, "seed": torch.ones(2)}, TypeError, "seed must be an int64 tensor, got torch.float32"),
    ({"noise": True, "seed": torch.ones(3, dtype=torch.int64)}, ValueError, "seed must have shape [] or [2], got (3,)"),
    ({"step": -1}, ValueError, "step must be in [0, 4294967296), got -1"),
    ({"step": 2**32}, ValueError, "step must be in"),
    ({"step": 0.5}, TypeError, "step must be an integer, got float"),
    ({"out": torch.ones(3, 2)}, ValueError, "out must be torch.float32 (2, 3), got torch.float32 (3, 2)"),
    ({"out": X.double()}, ValueError, "out must be torch.float32 (2, 3), got torch.float64 (2, 3)"),
    ({"out": torch.ones(3, 2).t()}, ValueError, "contiguous"),
    ({"x0_out": torch.ones(6)}, ValueError, "x0_out must be torch.float32 (2, 3), got torch.float32 (6,)"),
    ({"x0_out": 1}, TypeError, "x0_out must be a torch.Tensor, got int"),
    ({"model_output": X.to("meta")}, ValueError, "cpu and meta"),
    ({"coefficients": torch.ones(8, device="meta")}, ValueError, "cpu and meta"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=range(len(BAD)))
def test_bad_input(change, error, message):
    arguments = {"x": X, "model_output": X, "coefficients": coefficients()}
    with pytest.raises(error, match=re.escape(message)):
        ops.diffusion_step(**{**arguments, **change})


def test_out_refuses_gradients():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="does not support automatic differentiation"):
        ops.diffusion_step(x, x, coefficients(), out=torch.empty(3))


# the coefficients of known samplers, against diffusers' own step ----------------------------------------------------


def relative(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def in_float64(scheduler):
    """diffusers with its scalars in float64: in float32 its 1 - alpha at small t is off by 3e-5 of the step."""
    for name in ("alphas_cumprod", "one", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def sample_pair(seed=0):
    return tuple(cases.data(2, 3, 8, 8, dtype=torch.float32, seed=seed + i) for i in range(3))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_is_diffusers(monkeypatch, prediction_type, clip, variance_type):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_ddpm

    s = in_float64(
        diffusers.DDPMScheduler(prediction_type=prediction_type, clip_sample=clip, variance_type=variance_type)
    )
    x, m, z = sample_pair()
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: z)
    for t in (999, 500, 1, 0):
        a, a_next = s.alphas_cumprod[t].item(), s.alphas_cumprod[t - 1].item() if t else 1.0
        want = s.step(m, t, x)
        c = torch.tensor(co.ddpm(a, a_next, prediction_type, variance_type))
        out, x0 = ops.diffusion_step(x, m, c, clip=1.0 if clip else None, noise=z, return_x0=True)
        assert relative(out, want.prev_sample) < 2e-6 and relative(x0, want.pred_original_sample) < 2e-6


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_diffusers(prediction_type, eta):
    diffusers = pytest.importorskip("diffusers")
    s = in_float64(diffusers.DDIMScheduler(prediction_type=prediction_type, clip_sample=eta > 0))
    s.set_timesteps(20)
    x, m, z = sample_pair()
    for t in s.timesteps.tolist()[:1] + s.timesteps.tolist()[5::7]:
        before = t - 1000 // 20
        a, a_next = s.alphas_cumprod[t].item(), s.alphas_cumprod[before].item() if before >= 0 else 1.0
        want = s.step(m, t, x, eta=eta, use_clipped_model_output=True, variance_noise=z if eta else None)
        c = torch.tensor(co.ddim(a, a_next, prediction_type, eta))
        out = ops.diffusion_step(x, m, c, clip=1.0 if eta else None, noise=z)
        assert relative(out, want.prev_sample) < 2e-6


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_dpmpp_2m_is_diffusers(prediction_type):
    diffusers = pytest.importorskip("diffusers")
    s = diffusers.DPMSolverMultistepScheduler(prediction_type=prediction_type, final_sigmas_type="zero")
    s.set_timesteps(10)
    x, m, _ = sample_pair()
    alphas = [1.0 / (1.0 + sigma**2) for sigma in s.sigmas.double().tolist()]
    h1 = torch.full_like(x, math.nan)
    for i, t in enumerate(s.timesteps):
        want = s.step(m, t, x).prev_sample
        c = torch.tensor(co.dpmpp_2m(alphas[i], alphas[i + 1], alphas[i - 1] if i else None, prediction_type))
        out, h1 = ops.diffusion_step(x, m, c, history=(h1,), return_x0=True)
        assert relative(out, want) < 2e-6
        x, m = want, torch.sin(want + i)


def test_euler_and_flow_matching_are_diffusers():
    diffusers = pytest.importorskip("diffusers")
    x, m, z = sample_pair()
    for s, rule in [(diffusers.EulerDiscreteScheduler(), co.euler), (diffusers.FlowMatchEulerDiscreteScheduler(), co.flow_euler),
                    (diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"), partial(co.euler, prediction_type="v_prediction"))]:
        s.set_timesteps(10)
        y = x * s.sigmas[0]
        for i, t in enumerate(s.timesteps):
            want = s.step(m, t, y).prev_sample
            c = torch.tensor(rule(s.sigmas[i].item(), s.sigmas[i + 1].item()))
            assert relative(ops.diffusion_step(y, m, c), want) < 2e-6
            y = want


def test_ancestral_euler_is_diffusers(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as module

    x, m, z = sample_pair()
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: z)
    s = diffusers.EulerAncestralDiscreteScheduler()
    s.set_timesteps(10)
    y = x * s.sigmas[0]
    for i, t in enumerate(s.timesteps):
        want = s.step(m, t, y).prev_sample
        c = torch.tensor(co.euler(s.sigmas[i].item(), s.sigmas[i + 1].item(), eta=1.0))
        assert relative(ops.diffusion_step(y, m, c, noise=z), want) < 2e-6
        y = want


def test_coefficient_rules_name_what_they_know():
    for rule in (partial(co.ddpm, 0.5, 0.6), partial(co.ddim, 0.5, 0.6), partial(co.euler, 2.0, 1.0)):
        with pytest.raises(ValueError, match="prediction_type must be"):
            rule(prediction_type="noise")
    with pytest.raises(ValueError, match="variance_type must be"):
        co.ddpm(0.5, 0.6, variance_type="learned")
