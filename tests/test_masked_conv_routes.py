"""masked_conv2d: gradients of gradients, compile, func, autocast, which kernels run and what is kept for backward."""

import itertools

import pytest
import torch

import cases
from gmkernels import ops
from test_masked_conv import GATE, expected, near, problem


@pytest.mark.parametrize("gate", [None, GATE])
def test_gradcheck_and_double_backward(gate):
    x, weight, bias = problem(1, 2, 4, 3, 4, 3, dtype=torch.float64, grad=True)

    def call(*tensors):
        return ops.masked_conv2d(*tensors, mask_type="B", gate=gate, dilation=(1, 2))

    assert torch.autograd.gradcheck(call, (x, weight, bias))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias))


def test_third_derivative():
    x, weight, bias = problem(1, 1, 2, 2, 3, 3, dtype=torch.float64, grad=True)

    def second(x):
        (g,) = torch.autograd.grad(ops.masked_conv2d(x, weight, bias, gate=GATE).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, (x,))


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("gate", [None, GATE])
def test_gradients_of_some_inputs(needed, gate):
    tensors = [t.requires_grad_(n) for t, n in zip(problem(1, 2, 4, 3, 4, 3), needed, strict=True)]
    out = ops.masked_conv2d(*tensors, gate=gate)
    assert out.requires_grad == any(needed)
    if any(needed):
        out.sum().backward()
        want = torch.autograd.grad(expected(*tensors, gate=gate).sum(), [t for t in tensors if t.requires_grad])
        for t, r in zip([t for t in tensors if t.requires_grad], want, strict=True):
            near(t.grad, r)
        assert all(t.grad is None for t in tensors if not t.requires_grad)


@pytest.mark.parametrize("gate", [None, GATE])
def test_opcheck(gate):
    x, weight, bias = problem(1, 2, 4, 3, 4, 3, grad=True)
    taps, dilation = [0, 1, 2, 3, 4], [1, 1]
    lib = torch.ops.gmkernels
    grad = cases.data(1, 4, 3, 4, dtype=torch.float32, grad=True)
    half = grad[:, :2].detach().requires_grad_()
    residual = half if gate else grad
    torch.library.opcheck(lib.masked_conv2d.default, (x, weight, bias, grad[..., 0, 0], residual, taps, dilation,
                                                      gate, gate is not None))
    torch.library.opcheck(lib.masked_conv2d.default, (x.detach().to(memory_format=torch.channels_last), weight, None,
                                                      grad, None, taps, dilation, gate, False))
    torch.library.opcheck(lib.masked_conv2d_backward_input.default, (grad, weight, taps, dilation))
    torch.library.opcheck(lib.masked_conv2d_backward_weight.default, (grad, x, 3, 3, taps, dilation))
    torch.library.opcheck(lib.masked_conv2d_gate_backward.default,
                          (half, x, weight, bias, grad, taps, dilation, gate or "identity_sigmoid"))
    torch.library.opcheck(lib.gate_backward.default, (half, grad, gate or "identity_sigmoid"))


@pytest.mark.parametrize("kernel, gate, nhwc, backend", [
    (3, GATE, True, "inductor"), (3, None, False, "aot_eager"),
    (1, None, True, "aot_eager"), (1, GATE, False, "aot_eager"),
])
def test_compile(kernel, gate, nhwc, backend):
    def function(x, weight, bias):
        return ops.masked_conv2d(x.sin(), weight, bias, gate=gate) * 2

    tensors = problem(2, 3, 4, 5, 6, kernel, nhwc=nhwc, grad=True)
    want = function(*tensors)
    got = torch.compile(function, fullgraph=True, backend=backend)(*tensors)
    torch.testing.assert_close(got, want)
    assert got.stride() == want.stride()
    grad = torch.ones_like(got)
    for g, r in zip(torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, tensors, grad), strict=True):
        torch.testing.assert_close(g, r)


def test_compile_with_dynamic_shapes():
    compiled = torch.compile(lambda x, w: ops.masked_conv2d(x, w, gate=GATE), fullgraph=True, dynamic=True,
                             backend="aot_eager")
    for h, w in ((3, 4), (5, 7)):
        x, weight, _ = problem(2, 3, 4, h, w, 3)
        torch.testing.assert_close(compiled(x, weight), ops.masked_conv2d(x, weight, gate=GATE))


@pytest.mark.parametrize("gate", [None, GATE])
@pytest.mark.parametrize("kernel", [1, 3])
def test_func(gate, kernel):
    x, weight, bias = problem(2, 2, 4, 3, 4, kernel, dtype=torch.float64)

    def loss(x, weight, bias):
        return ops.masked_conv2d(x, weight, bias, gate=gate).square().sum()

    want = torch.func.grad(lambda *t: expected(*t, gate=gate).square().sum(), argnums=(0, 1, 2))(x, weight, bias)
    for g, r in zip(torch.func.grad(loss, argnums=(0, 1, 2))(x, weight, bias), want, strict=True):
        cases.close(g, r)
    many = torch.stack((x, 2 * x))
    got = torch.func.vmap(lambda x: ops.masked_conv2d(x, weight, bias, gate=gate))(many)
    cases.close(got, torch.stack([expected(m, weight, bias, gate=gate) for m in many]))
    per_sample = torch.func.vmap(torch.func.grad(loss), (0, None, None))(many, weight, bias)
    cases.close(per_sample[0], want[0])
    tangents = [torch.ones_like(t) for t in (x, weight, bias)]
    got = torch.func.jvp(lambda *t: ops.masked_conv2d(*t, gate=gate), (x, weight, bias), tuple(tangents))
    want = torch.func.jvp(lambda *t: expected(*t, gate=gate), (x, weight, bias), tuple(tangents))
    for g, r in zip(got, want, strict=True):
        cases.close(g, r)


@pytest.mark.parametrize("kernel", [1, 3])
def test_autocast_follows_the_inputs(kernel):
    x, weight, bias = problem(1, 3, 4, 3, 5, kernel)
    plain = ops.masked_conv2d(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.masked_conv2d(x, weight, bias), plain)
        halves = [t.half() for t in (x, weight, bias)]
        assert ops.masked_conv2d(*halves).dtype is torch.float16


def test_which_convolution_runs(kernel_calls):
    x, weight, bias = problem(1, 3, 4, 3, 5, 1)
    ops.masked_conv2d(x, weight, bias)
    assert kernel_calls == []  # 1x1: torch's
    ops.masked_conv2d(x, weight, bias, gate=GATE)
    ops.masked_conv2d(x, weight.expand(4, 3, 3, 3), bias)
    assert kernel_calls == ["masked_conv2d"] * 2


@pytest.mark.parametrize("gate", [None, GATE])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept_for_backward(gate, recompute, kernel_calls):
    x, weight, bias = problem(1, 4, 8, 6, 7, 3, grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = ops.masked_conv2d(x, weight, bias, gate=gate, recompute=recompute)
    inputs = [x, weight, bias] if gate and recompute else [x, weight]
    large = [t for t in kept if t.data_ptr() not in {i.data_ptr() for i in inputs}]
    assert [t.shape for t in large] == ([(1, 8, 6, 7)] if gate and not recompute else [])
    grads = torch.autograd.grad(out.square().sum(), (x, weight, bias))
    assert kernel_calls.count("gate_backward") == len(large)
    other = ops.masked_conv2d(x, weight, bias, gate=gate, recompute=not recompute)
    for g, r in zip(grads, torch.autograd.grad(other.square().sum(), (x, weight, bias)), strict=True):
        torch.testing.assert_close(g, r)
    with torch.no_grad():
        assert torch.equal(ops.masked_conv2d(x, weight, bias, gate=gate), out)
