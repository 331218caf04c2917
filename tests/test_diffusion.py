"""ops.diffusion_step: values, noise, special values, memory, errors."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from diffusion_cases import DDIM, F64, FULL, OPTIONS, call, close, coefficients, oracle, tensors
from gmkernels import _C, ops
from gmkernels.ops import diffusion

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
@pytest.mark.parametrize("name", ["plain", "guided", "history3", "drawn", "given", "everything"])
def test_half_is_rounded_once(isa, name, dtype):
    """Half an ulp of the float64 step; 4160 elements are whole runs and a rest."""
    names, options = OPTIONS[name]
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


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 1), (7, 1), (5, 2), (2, 300), (3, 8)], ids=str)
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


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 33, 63])
@pytest.mark.parametrize("name", ["plain", "history2", "given"])
def test_a_small_sample_is_the_sample_alone(isa, name, d):
    """Words of elements that meet several rows of coefficients give the bits of one sample by itself."""
    names, options = OPTIONS[name]
    b = 300
    c = coefficients() * torch.linspace(0.5, 1.5, b)[:, None]
    for k in range(8):
        c[k::11, k] = 0
    made = tensors((b, d), names)
    made["x"][0::11] = math.inf
    made["model_output"][1::11] = math.nan
    c[0::11, 3] = 0
    whole = call(made, c, return_x0=True, **options)
    for i in (*range(17), 127, 128, 129, 255, 256, b - 1):
        alone = call({k: t[i] for k, t in made.items()}, c[i], return_x0=True, **options)
        for got, want in zip(whole, alone, strict=True):
            assert torch.equal(got[i].nan_to_num(7.0), want.nan_to_num(7.0))
            assert torch.equal(got[i].isnan(), want.isnan())
        assert torch.equal(call(made, c, **options)[i].nan_to_num(7.0), alone[0].nan_to_num(7.0))


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
    seeds = 11, 2**63 + 5, torch.tensor([1, 2, -3]), torch.tensor(9)
    for shape, seed in zip([(3, 300), (2, 7), (3, 41), (5,)], seeds, strict=True):
        if isinstance(seed, torch.Tensor):
            seed = seed.to(device.torch)
        x = torch.full(shape, math.nan, dtype=dtype, device=device.torch)
        z = ops.diffusion_step(x, x, c, noise=True, seed=seed, step=4)
        assert torch.equal(z, ops.philox_normal(shape, seed, 4, 2, dtype=dtype, device=x.device))


def test_same_bits_on_every_instruction_set_and_thread_count():
    names, options = OPTIONS["everything"]
    made = tensors((3, 70001), names)
    c = coefficients()
    only_noise = coefficients((0, 0, 0, 0, 0, 0, 0, 1))
    noise, per_isa = [], []
    for _C_isa in _C.isas():
        _C.set_isa(_C_isa)
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(call(made, c, **options))
            noise.append(call(made, only_noise, **{**options, "guidance_scale": 1.0}))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        per_isa.append(results[0])
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
        seeds = torch.arange(shape[0], device=device.torch)
        assert call(made, c.repeat(shape[0], 1), noise=True, seed=seeds).shape == shape
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


@pytest.mark.parametrize("name", ["x", "model_output", "uncond", "h1", "h2", "h3", "variance", "z"])
def test_one_stream_alone_may_be_unaligned(device, name):
    _, options = OPTIONS["plain"]
    made = tensors((32,), ("uncond", "h1", "h2", "h3", "variance", "z"), torch.float32, device.torch)
    c = coefficients(device=device.torch)
    want = call(made, c, **options)
    storage = torch.empty(33, device=device.torch)
    storage[1:] = made[name]
    assert torch.equal(call({**made, name: storage[1:]}, c, **options), want)


def test_out_and_in_place(device):
    names, options = OPTIONS["everything"]
    c = coefficients(device=device.torch)
    fresh = tensors((3, 37), names, torch.float32, device.torch)
    want, want_x0 = call(fresh, c, return_x0=True, **options)
    places = (None, "new", "x", "h1", "uncond"), (None, "new", "model_output", "variance")
    for where, x0_where in itertools.product(*places):
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


@pytest.mark.parametrize("route", ["fast", "general", "plan"])
def test_out_bumps_the_version_counter(route):
    plan, other = ops.DiffusionPlan(coefficients()[None]), torch.ones(10)[::2] if route == "general" else torch.ones(5)

    def step(**outs):
        call = (plan, 0) if route == "plan" else (ops.diffusion_step, coefficients())
        call[0](other, other, call[1], **outs)

    x = cases.data(5, dtype=torch.float32, grad=True)
    saved, saved_x0 = x * 1.0, x * 2.0
    y = saved.exp() + saved * saved + saved_x0 * saved_x0
    with torch.no_grad():
        out, x0 = saved.detach(), saved_x0.detach()
        before = out._version, x0._version
        step(out=out)
        assert out._version > before[0] and x0._version == before[1]
        step(x0_out=x0)
        assert x0._version > before[1]
        before = out._version, x0._version
        step(out=out, x0_out=x0)
        assert out._version > before[0] and x0._version > before[1]
        with torch.inference_mode():
            timeless = torch.empty(5)  # has no version
        step(out=timeless, x0_out=x0)
        assert torch.equal(timeless, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


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
