"""ops.add_noise, ops.denoising_loss and ops.flow_pair: gradients, and torch's other ways of calling."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import cases
from gmkernels import ops
from gmkernels.ops import noising
from noising_cases import F64, TARGETS, sample_times, schedule

SHAPE = (3, 4)
T = sample_times(3)


def leaf(*shape, seed=0):
    return cases.data(*shape, seed=seed, grad=True)


def added(target, drawn):
    """(function, its floating tensors) of add_noise."""
    values = (leaf(*SHAPE), schedule(dtype=F64).requires_grad_()) + (() if drawn else (leaf(*SHAPE, seed=1),))

    def f(x0, pairs, *z):
        return ops.add_noise(x0, T, pairs, target=target, **({"seed": 3} if drawn else {"noise": z[0]}))

    return f, values


def lost(target, weight):
    values = (leaf(*SHAPE), leaf(*SHAPE, seed=1))
    pairs = schedule(dtype=F64)
    if weight == "given":
        return (lambda p, x, w: ops.denoising_loss(p, x, T, pairs, 3, target=target, weight=w)), (
            *values, (leaf(3, seed=2).detach().abs() + 0.1).requires_grad_())
    return (lambda p, x: ops.denoising_loss(p, x, T, pairs, 3, target=target, weight=weight)), values


def flow(sigma=0.3):
    values = leaf(*SHAPE), leaf(*SHAPE, seed=1), torch.rand(3, dtype=F64, requires_grad=True)
    return partial(ops.flow_pair, sigma=sigma, seed=1), values


ALL = {f"add {t} {d}": partial(added, t, d) for t in (None, *TARGETS) for d in (True, False)}
ALL |= {f"loss {t} {w}": partial(lost, t, w) for t in TARGETS for w in (None, "given", "min_snr")
        if w != "min_snr" or t in ("epsilon", "x0", "v")}
ALL |= {"flow": flow, "flow without noise": partial(flow, 0.0)}
SOME = ("add v True", "add score False", "loss v given", "loss epsilon min_snr", "flow")


@pytest.mark.parametrize("name", ALL)
def test_gradients(name):
    f, values = ALL[name]()
    assert gradcheck(f, values)


@pytest.mark.parametrize("name", SOME)
def test_second_derivatives(name):
    f, values = ALL[name]()
    assert gradgradcheck(f, values)


def test_continuous_times_have_gradients():
    rows = schedule(dtype=F64)[:3].clone().requires_grad_()
    assert gradcheck(lambda x, rows: ops.add_noise(x, None, rows, seed=1, target="v"), (leaf(*SHAPE), rows))
    shared = torch.tensor(2)
    assert gradcheck(lambda x, rows: ops.add_noise(x, shared, rows, seed=1, target="v"), (leaf(*SHAPE), rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_other_dtypes(device, dtype):
    x0, pairs, t = cases.data(*SHAPE).to(device.torch, dtype), schedule(device=device.torch), T.to(device.torch)
    wide = pairs.double().requires_grad_()
    narrow, x, y = pairs.clone().requires_grad_(), x0.clone().requires_grad_(), x0.double().requires_grad_()
    sum(o.float().sum() for o in ops.add_noise(x, t, narrow, seed=1, target="v")).backward()
    sum(o.sum() for o in ops.add_noise(y, t, wide, seed=1, target="v")).backward()
    assert x.grad.dtype is dtype and narrow.grad.dtype is torch.float32
    cases.close(x.grad, y.grad)
    cases.close(narrow.grad, wide.grad, rtol=1e-5)


def test_the_gradient_of_the_pass_is_that_of_the_formula():
    """Scaled, once more after retain_graph, with x0 in the graph, and where it is differentiated again."""
    pairs, x0 = schedule(), cases.data(*SHAPE, dtype=torch.float32)
    pred = cases.data(*SHAPE, dtype=torch.float32, seed=1, grad=True)
    loss = ops.denoising_loss(pred, x0, T, pairs, 1, target="v")
    first, = torch.autograd.grad(loss, pred, retain_graph=True)
    kept = first.clone()
    scaled, = torch.autograd.grad(loss * 3.0, pred, retain_graph=True)
    again, = torch.autograd.grad(loss, pred, retain_graph=True)
    slow, = torch.autograd.grad(loss, pred, create_graph=True)
    assert slow.requires_grad and torch.equal(first, kept) and torch.equal(again, kept)
    assert torch.equal(scaled, kept * 3.0)
    cases.close(slow, kept.double(), rtol=1e-5, atol=1e-7)
    other = ops.denoising_loss(pred, x0.clone().requires_grad_(), T, pairs, 1, target="v")
    cases.close(torch.autograd.grad(other, pred)[0], kept.double(), rtol=1e-5, atol=1e-7)
    both = ops.denoising_loss(pred, x0, T, pairs, 1, target="v") + pred.square().sum()
    both.backward()
    cases.close(pred.grad, kept.double() + 2 * pred.detach().double(), rtol=1e-5, atol=1e-6)


def test_a_gradient_given_out_is_not_the_one_kept():
    pairs, x0 = schedule(), cases.data(*SHAPE, dtype=torch.float32)
    pred = cases.data(*SHAPE, dtype=torch.float32, seed=1, grad=True)
    loss = ops.denoising_loss(pred, x0, T, pairs, 1)
    first, = torch.autograd.grad(loss, pred, retain_graph=True)
    want = first.clone()
    first.mul_(2)
    assert torch.equal(torch.autograd.grad(loss, pred)[0], want)


def arguments(op):
    x, t, s = leaf(*SHAPE), T, schedule(dtype=F64)
    return {
        "add": (noising._add_op, (x, t, s.requires_grad_(), None, None, 5, 1)),
        "add target": (noising._add_target_op, (x, t, s, leaf(*SHAPE, seed=1), None, 2, 0, 0)),
        "loss": (noising._loss_op, (x, x.detach(), t, s, None, torch.arange(3), 2, 2, 5.0, True, 0, 1)),
        "loss for all": (noising._loss_op, (x, leaf(*SHAPE, seed=1), t, s, torch.rand(3, dtype=F64), None, 2, 1, 5.0,
                                            False, 7, 1)),
        "flow": (noising._flow_op, (x, leaf(*SHAPE, seed=1), torch.rand(3, dtype=F64), None, 0.5, 3, 0)),
    }[op]


@pytest.mark.parametrize("op", ["add", "add target", "loss", "loss for all", "flow"])
def test_opcheck(op):
    op, args = arguments(op)
    assert set(torch.library.opcheck(op.op, args).values()) == {"SUCCESS"}


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", SOME)
def test_compile(name):
    torch._dynamo.reset()
    f, values = ALL[name]()
    compiled = torch.compile(f, fullgraph=True)
    for got, want in zip(outputs(compiled(*values)), outputs(f(*values)), strict=True):
        cases.close(got, want)
    got, want = (torch.autograd.grad(sum(t.sin().sum() for t in outputs(g(*values))), values) for g in (compiled, f))
    for a, b in zip(got, want, strict=True):
        cases.close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SOME)
def test_func_transforms(name):
    f, values = ALL[name]()
    values = tuple(v.detach() for v in values)

    def loss(*values):
        return sum(t.sin().sum() for t in outputs(f(*values)))

    got = torch.func.grad(loss, argnums=tuple(range(len(values))))(*values)
    grown = tuple(v.clone().requires_grad_() for v in values)
    for g, w in zip(got, torch.autograd.grad(loss(*grown), grown), strict=True):
        cases.close(g, w, rtol=1e-6, atol=1e-6)
    tangents = tuple(torch.ones_like(v) for v in values)
    cases.close(torch.func.jvp(loss, values, tangents)[1], sum(g.sum() for g in got), rtol=1e-5, atol=1e-5)
    batch = tuple(torch.stack([v, 1.5 * v]) for v in values)
    wanted = [outputs(f(*(v[i] for v in batch))) for i in range(2)]
    for i, many in enumerate(outputs(torch.func.vmap(f)(*batch))):
        cases.close(many, torch.stack([w[i] for w in wanted]), rtol=1e-5, atol=1e-5)


def test_fake_tensors_and_modes(kernel_calls):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode():
        x, t, s = torch.empty(2, 3), torch.zeros(2, dtype=torch.int64), torch.empty(5, 2)
        assert ops.add_noise(x, t, s, seed=1).shape == ops.flow_pair(x, x, torch.empty(2))[1].shape == (2, 3)
        assert ops.denoising_loss(x, x, t, s, 1).shape == ()
        with pytest.raises(ValueError, match="schedule must be"):
            ops.add_noise(x, t, torch.empty(5, 3), seed=1)
    assert kernel_calls == []
    x = torch.ones(*SHAPE)
    with FlopCounterMode(display=False):
        ops.add_noise(x, T, schedule(), seed=1)
        ops.denoising_loss(x, x, T, schedule(), 1)
        ops.flow_pair(x, x, torch.ones(3))
    assert kernel_calls == ["add_noise", "denoising_loss", "flow_pair"]


def test_autocast_follows_the_inputs():
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(*SHAPE, dtype=dtype)
            assert ops.add_noise(x, T, schedule(), seed=1).dtype is dtype
            assert ops.denoising_loss(x, x, T, schedule(), 1).dtype is torch.float32
