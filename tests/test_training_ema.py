"""ops.ema_update_: the formula, every route, what cannot share memory."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from gmkernels import _C, ops, reference
from gmkernels.ops import ema as room

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAIRS = [(d, d) for d in (F32, F64, BF16, F16)] + [(F32, BF16), (F32, F16)]
ULP = {F32: 2.0**-23, F64: 2.0**-52, BF16: 2.0**-8, F16: 2.0**-11}
SHAPES = [(), (1,), (3,), (17,), (0, 3), (5, 7), (2, 3, 4, 4), (4099,)]


def tensors(shapes, dtype=F32, device="cpu", seed=0):
    return [cases.data(*s, seed=seed + i).to(dtype).to(device) for i, s in enumerate(shapes)]


def clones(ts):
    return [t.clone(memory_format=torch.preserve_format) for t in ts]


def oracle(ema, values, decay):
    return [decay * e.double().cpu() + (1 - decay) * v.double().cpu() for e, v in zip(ema, values, strict=True)]


def check(ema, values, decay, dtype):
    before = clones(ema)
    ops.ema_update_(ema, values, decay)
    for got, e, v, want in zip(ema, before, values, oracle(before, values, decay), strict=True):
        scale = torch.maximum(e.double().cpu().abs(), v.double().cpu().abs())
        assert ((got.double().cpu() - want).abs() <= 2 * ULP[dtype] * scale).all()


@pytest.mark.parametrize("dtype, value", PAIRS, ids=str)
def test_formula(device, dtype, value):
    for decay in (0.999, 0.5, 0.25, 0.75):
        check(tensors(SHAPES, dtype, device.torch), tensors(SHAPES, value, device.torch, 20), decay, dtype)


def test_formula_on_every_instruction_set(isa):
    for dtype, value in PAIRS:
        check(tensors(SHAPES, dtype), tensors(SHAPES, value, seed=20), 0.9, dtype)
    e, v = tensors(SHAPES), tensors(SHAPES, seed=20)
    want = clones(e)
    ops.ema_update_(e, v, 0.9)
    if isa == "base":
        return  # no fused multiply-add
    for a, b in zip(want, v, strict=True):
        a.copy_((a.double() + float(torch.tensor(0.1)) * (b - a).double()).float())
    for got, a in zip(e, want, strict=True):
        assert torch.equal(got, a)


def test_many_tensors_of_many_sizes(device):
    """More than a launch takes; more than a block makes."""
    shapes = [((i * 37) % 50,) for i in range(150)] + [(8192,), (8193,), (20000,)]
    check(tensors(shapes, device=device.torch), tensors(shapes, device=device.torch, seed=500), 0.99, F32)


def test_the_ends_of_decay(device):
    """0 copies and 1 changes nothing, whatever the tensors hold; equal numbers stay what they are."""
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.0, 0.1], device=device.torch)
    e, v = odd.clone(), odd.flip(0)
    ops.ema_update_([e], [v], 1)
    assert torch.equal(e.nan_to_num(7), odd.nan_to_num(7))
    ops.ema_update_([e], [v], 0)
    assert torch.equal(e.nan_to_num(7), v.nan_to_num(7)) and torch.equal(e.isnan(), v.isnan())
    for decay in (0.1, 0.3, 0.5, 0.7, 0.999):
        e = torch.full((9,), 0.1, device=device.torch)
        ops.ema_update_([e], [e.clone()], decay)
        assert torch.equal(e, torch.full_like(e, 0.1))
        e, v = odd.clone(), torch.ones(5, device=device.torch)
        ops.ema_update_([e], [v], decay)
        assert torch.equal(e.isfinite(), odd.isfinite()) and e[0].isnan()


def test_the_same_bits_on_any_number_of_threads():
    shapes = [(7,), (100_003,), (31,), (64, 1000), (1,), (250_000,)]
    results = []
    for n in (1, 2, 3, 8):
        torch.set_num_threads(n)
        e = tensors(shapes)
        ops.ema_update_(e, tensors(shapes, seed=9), 0.97)
        results.append(torch.cat([t.flatten() for t in e]))
    assert all(torch.equal(r, results[0]) for r in results)


# routes --------------------------------------------------------------------------------------------------------------


def test_routes_agree(monkeypatch, kernel_calls):
    e, v = tensors(SHAPES), tensors(SHAPES, seed=20)
    other = clones(e)
    ops.ema_update_(e, v, 0.9)
    assert kernel_calls == []  # the fast route
    monkeypatch.setattr(room, "plain_eager", lambda: False)
    monkeypatch.setattr(_C, "ema_update_plain", lambda *_: False)
    ops.ema_update_(other, v, 0.9)
    assert kernel_calls == ["ema_update"]
    for a, b in zip(e, other, strict=True):
        assert torch.equal(a, b)


class Labelled(torch.Tensor):
    pass


def permuted(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


KINDS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "columns": permuted,
    "steps": lambda t: torch.stack((t, t), -1)[..., 0],
    "subclass": lambda t: t.as_subclass(Labelled),
    "float64": lambda t: t.double(),
    "parameter": torch.nn.Parameter,
    "negated lazily": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag,
    "complex": lambda t: torch.complex(t, 2 * t),
}


@pytest.mark.parametrize("of_value", KINDS)
@pytest.mark.parametrize("of_ema", KINDS)
def test_any_kind_of_tensor(of_ema, of_value):
    if (of_ema == "complex") != (of_value == "complex"):
        pytest.skip("a complex number has no real average")
    e, v = (KINDS[kind](t) for kind, t in zip((of_ema, of_value), tensors([(2, 3, 4, 5)] * 2), strict=True))
    plain, version = tensors([(3,), (3,)], seed=5), e._version
    want = 0.9 * e.detach() + 0.1 * v.detach()
    ops.ema_update_([e, plain[0]], [v, plain[1]], 0.9)
    torch.testing.assert_close(e.detach().resolve_neg(), want.to(e.dtype), rtol=1e-6, atol=1e-6, check_stride=False)
    cases.close(plain[0], oracle(tensors([(3,)], seed=5), plain[1:], 0.9)[0], rtol=1e-6)
    assert e._version > version


def test_integers_are_copied(device):
    """The buffers of batch normalization."""
    e = [torch.zeros(3, device=device.torch), torch.tensor(3, device=device.torch), torch.tensor(True)]
    v = [torch.ones(3, device=device.torch), torch.tensor(10, device=device.torch), torch.tensor(False)]
    ops.ema_update_(e, v, 0.75)
    assert torch.equal(e[0], 0.25 * v[0]) and e[1] == 10 and not e[2]


def test_models():
    model, average = (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)) for _ in range(2))
    model(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))).sum().backward()
    want = oracle(average.parameters(), model.parameters(), 0.9)
    ops.ema_update_(average.parameters(), model.parameters(), 0.9)
    for got, w in zip(average.parameters(), want, strict=True):
        cases.close(got.detach(), w, rtol=1e-5, atol=1e-6)
        assert got.grad_fn is None and got.requires_grad
    ops.ema_update_(average.state_dict().values(), model.state_dict().values(), 0.0)
    assert all(torch.equal(a, b) for a, b in
               zip(average.state_dict().values(), model.state_dict().values(), strict=True))


def test_autograd_sees_the_change():
    for e in tensors([(3,)]) + [KINDS["channels_last"](tensors([(2, 3, 4, 5)])[0])]:
        x = torch.ones_like(e, requires_grad=True)
        y = (x * e).sum()
        ops.ema_update_([e], [torch.ones_like(e)], 0.9)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_inference_mode():
    with torch.inference_mode():
        e, v = tensors([(5,)]), tensors([(5,)], seed=1)
        want = oracle(e, v, 0.9)[0]
        ops.ema_update_(e, v, 0.9)
        cases.close(e[0], want, rtol=1e-6)


def test_compile_and_fake():
    torch._dynamo.reset()
    shapes = [(5, 3), (7,), (0,)]

    def step(e, v):
        ops.ema_update_(e, [2 * t for t in v], 0.9)
        return e[0].sin()

    e, v = tensors(shapes), tensors(shapes, seed=5)
    other = clones(e)
    want, got = step(e, v), torch.compile(step, fullgraph=True)(other, v)
    cases.close(got, want.double())
    for a, b in zip(e, other, strict=True):
        assert torch.equal(a, b)
    assert set(torch.library.opcheck(torch.ops.gmkernels.ema_update_.default, (e, v, 0.9)).values()) == {"SUCCESS"}
    meta = [t.to("meta") for t in e]
    torch.ops.gmkernels.ema_update_(meta, meta, 0.9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=3), max_size=9), st.sampled_from(PAIRS),
       st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.booleans())
def test_any_list(shapes, dtypes, decay, plain):
    e, v = tensors(shapes, dtypes[0]), tensors(shapes, dtypes[1], seed=50)
    want = clones(e)
    reference.ema.ema_update_(want, v, decay)
    if not plain and e:
        e[0] = torch.stack((e[0], e[0]), -1)[..., 0]
    ops.ema_update_(iter(e), iter(v), decay)
    for got, w in zip(e, want, strict=True):
        torch.testing.assert_close(got, w, rtol=2 * ULP[dtypes[0]], atol=2 * ULP[dtypes[0]], check_stride=False)


# errors --------------------------------------------------------------------------------------------------------------

T = torch.zeros


@pytest.mark.parametrize("e, v, decay, error, text", [
    ([T(2)], [T(2)], "0.9", TypeError, "decay must be a float, got str"),
    ([T(2)], [T(2)], True, TypeError, "decay must be a float, got bool"),
    ([T(2)], [T(2)], -0.1, ValueError, "decay must be in [0, 1], got -0.1"),
    ([T(2)], [T(2)], float("nan"), ValueError, "decay must be in [0, 1], got nan"),
    ([T(2)], [], 0.9, ValueError, "values must hold as many tensors as ema, 1, got 0"),
    ([T(2), 3], [T(2), T(2)], 0.9, TypeError, "ema[1] must be a torch.Tensor, got int"),
    ([T(2), T(2)], [T(2), None], 0.9, TypeError, "values[1] must be a torch.Tensor, got NoneType"),
    ([T(2), T(2)], [T(2), T(3)], 0.9, ValueError, "values[1] must have the shape of ema[1], (2,), got (3,)"),
    ([T(2), T(2)], [T(2), T(1, 2)], 0.9, ValueError, "values[1] must have the shape of ema[1], (2,), got (1, 2)"),
    ([T(2)], [T(2, device="meta")], 0.9, ValueError, "values[0] must be on the device of ema[0], cpu, got meta"),
])  # fmt: skip
def test_errors(e, v, decay, error, text):
    with pytest.raises(error, match=re.escape(text)):
        ops.ema_update_(e, v, decay)
    assert not any(t.any() for t in e if isinstance(t, torch.Tensor))


def test_nothing_is_written_twice_or_read_after():
    whole = torch.arange(24.0)
    tied, other = torch.ones(4), torch.zeros(4)
    for e, v, text in (([tied, other, tied], [other + 1, tied + 1, other + 2], "ema[0] and ema[2] share memory"),
                       ([whole[:8], whole[4:12]], [tied.repeat(2)] * 2, "ema[0] and ema[1] share memory"),
                       ([whole[:8]], [whole[4:12]], "values[0] and ema[0] share memory")):
        before = clones([*e, *v])
        for _ in range(2):
            with pytest.raises(ValueError, match=re.escape(text)):
                ops.ema_update_(e, v, 0.9)
        assert all(torch.equal(a, b) for a, b in zip(before, [*e, *v], strict=True))
    ops.ema_update_([whole[:8], whole[8:16]], [whole[:8], whole[16:]], 0.5)  # a whole value that is its average
    assert torch.equal(whole[:8], torch.arange(8.0))


def test_a_value_that_is_another_average(monkeypatch):
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(room, "plain_eager", lambda: False)
        a, b, c, whole = torch.ones(3), torch.zeros(3), torch.full((3,), 5.0), torch.zeros(30)
        for e, v, text in (([a, b], [b, c], "values[0] and ema[1]"), ([a, b], [c, a], "values[1] and ema[0]"),
                           ([whole[:20], b], [torch.ones(20), whole[18:21]], "values[1] and ema[0]"),
                           ([whole[5:8], b], [c, whole[7:10]], "values[1] and ema[0]"),
                           ([whole[5:8], b], [c, whole[3:6]], "values[1] and ema[0]")):
            with pytest.raises(ValueError, match=re.escape(text + " share memory")):
                ops.ema_update_(e, v, 0.5)
        assert (a == 1).all() and not b.any() and not whole.any()
        ops.ema_update_([whole[5:8], b], [c, whole[8:11]], 0.5)


@pytest.mark.slow
def test_more_than_2_31_elements():
    n = 2**31 + 3 * 2**20 + 5
    e, v = torch.zeros(n, dtype=BF16), torch.zeros(n, dtype=BF16)
    v[2**31 - 3 :] = 8
    ops.ema_update_([torch.zeros(5, dtype=BF16), e], [torch.zeros(5, dtype=BF16), v], 0.75)
    assert torch.equal(e[2**31 - 9 : 2**31 + 9], 0.25 * v[2**31 - 9 : 2**31 + 9]) and e[-1] == 2 and not e[:1000].any()
