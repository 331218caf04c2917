"""Likelihood heads: gradients of gradients, compile, func, autocast, and who owns the gradient."""

import math
from functools import partial

import pytest
import torch

import cases
from gmkernels import ops
from likelihood_cases import F32, KINDS, close, oracle, problem

NLL = ops.discretized_logistic_mixture_nll


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [1, 3])
def test_gradcheck(kind, c):
    for reduction in ("none", "mean") if c == 1 else ("image", "sum"):
        params, x = problem(1, c, (2,), 2, kind)
        f = partial(NLL, x=x, num_mixtures=2, reduction=reduction, **KINDS[kind])
        assert torch.autograd.gradcheck(f, (params.requires_grad_(),))
    params, x = problem(1, c, (1,), 3 - c // 2, kind)
    f = partial(NLL, x=x, num_mixtures=3 - c // 2, **KINDS[kind])
    assert torch.autograd.gradgradcheck(f, (params.requires_grad_(),))


def test_third_derivative():
    params, x = problem(1, 1, (1,), 2)
    params.requires_grad_()

    def second(p):
        (g,) = torch.autograd.grad(NLL(p, x, 2), p, create_graph=True)
        return torch.autograd.grad(g.square().sum(), p, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, (params,))


def test_opcheck():
    for need in (0, 1):
        params, x = problem(2, 3, (2, 2), 2)
        args = (params.requires_grad_(), x, 2, "openai", -1.0, 1.0, 256, "mean", need)
        assert set(torch.library.opcheck(ops.likelihood._nll_op.op, args).values()) == {"SUCCESS"}
    args = (params.detach(), None, 2, "openai", -1.0, 1.0, 256, 3, 5, 1.0)
    assert set(torch.library.opcheck(ops.likelihood._sample_op.op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("channels_last", [False, True])
def test_compile(channels_last):
    torch._dynamo.reset()
    params, x = problem(2, 3, (4, 5), 2, dtype=F32)
    if channels_last:
        params = params.to(memory_format=torch.channels_last)
    params.requires_grad_()

    def f(p):
        return NLL(2 * p, x, 2).sin()

    compiled = torch.compile(f, fullgraph=True)
    for got, want in zip((compiled(params), *torch.autograd.grad(compiled(params), params)),
                         (f(params), *torch.autograd.grad(f(params), params)), strict=True):
        cases.close(got, want.double())
    sample = torch.compile(lambda p: ops.discretized_logistic_mixture_sample(p, 2, seed=3), fullgraph=True)
    assert torch.equal(sample(params), ops.discretized_logistic_mixture_sample(params, 2, seed=3))
    drawn = torch.compile(lambda p: ops.discretized_logistic_mixture_sample(p, 2), fullgraph=True)
    assert not torch.equal(drawn(params), drawn(params))


def test_func_transforms():
    params, x = problem(2, 3, (3,), 2)
    want = oracle(params, x, 2, reduction="sum")
    cases.close(torch.func.grad(lambda p: NLL(p, x, 2, reduction="sum"))(params), want[1])
    cases.close(torch.func.jvp(lambda p: NLL(p, x, 2, reduction="sum"), (params,), (params,))[1],
                (want[1] * params).sum())
    each = torch.func.vmap(torch.func.grad(lambda p, v: NLL(p[None], v[None], 2, reduction="sum")))(params, x)
    cases.close(each, want[1])
    every = torch.func.vmap(lambda p, v: NLL(p[None], v[None], 2, reduction="sum"))
    batched = torch.func.grad(lambda p: every(p, x).sum())
    cases.close(batched(params), want[1])
    hessian = torch.func.hessian(lambda p: NLL(p, x[:1, :, :1], 2))(params[:1, :, :1])
    cases.close(hessian.view(20, 20), hessian.view(20, 20).T, atol=1e-10)


def test_autocast_and_half_types(device):
    params, x = problem(2, 3, (3, 4), 2, dtype=F32, device=device.torch)
    for dtype in (torch.bfloat16, torch.float16):
        half = params.to(dtype).requires_grad_()
        want = oracle(half, x, 2)
        for autocast in (False, True):
            with torch.autocast("cpu" if cases.rehearsal else device.torch, torch.bfloat16, enabled=autocast):
                loss = NLL(half, x, 2, reduction="none")
            (gradient,) = torch.autograd.grad(loss.sum(), half)
            assert loss.dtype is F32 and gradient.dtype is dtype
            close((loss,), want[:1])
            close((gradient.double(),), want[1:], 1e-2)


def test_integers_of_half_params():
    params, x = problem(1, 1, (9,), 2, dtype=torch.bfloat16, low=0.0, high=255.0)
    index = x.double().round().to(torch.int16)
    got = NLL(params, index, 2, low=0, high=255, reduction="none")
    close((got,), oracle(params, index, 2, low=0.0, high=255.0)[:1])


# who owns the gradient -----------------------------------------------------------------------------------------------


def test_backward_again(device):
    """A graph that is kept gives the same gradient each time, whatever is done to the one given out."""
    for factor in (1.0, 2.0):
        params, x = problem(2, 3, (2, 3), 2, device=device.torch)
        want = factor * oracle(params, x, 2, reduction="sum")[1]
        params.requires_grad_()
        loss = factor * NLL(params, x, 2, reduction="sum")
        for _ in range(3):
            (g,) = torch.autograd.grad(loss, params, retain_graph=True)
            cases.close(g, want)
            g.zero_()
        for times in (1, 2, 3):
            loss.backward(retain_graph=True)
            cases.close(params.grad, times * want)


def remember(made, t):
    made.append(t.data_ptr())
    return t


def test_the_last_backward_makes_no_copy(device, kernel_calls):
    params, x = problem(2, 3, (2, 3), 2, dtype=F32, device=device.torch)
    want = oracle(params, x, 2, reduction="sum")[1]
    params.requires_grad_()
    for factor in (1.0, 3.0):
        made = []
        with torch.autograd.graph.saved_tensors_hooks(partial(remember, made), lambda t: t):
            loss = NLL(params, x, 2, reduction="sum")
        (g,) = torch.autograd.grad(loss, params, torch.tensor(factor, device=device.torch))
        cases.close(g, factor * want, rtol=1e-4, atol=1e-4)
        assert g.data_ptr() in made
    assert kernel_calls == ["logistic_mixture_nll", "scale_in_place"] * 2


class Labelled(torch.Tensor):
    pass


FACTORS = {
    "negated lazily": lambda: torch.complex(torch.zeros(()), torch.tensor(-3.0)).conj().imag,
    "expanded": lambda: torch.tensor([3.0]).expand(4)[2],
    "subclass": lambda: torch.tensor(3.0).as_subclass(Labelled),
    "float64": lambda: torch.tensor(3.0, dtype=torch.float64).float(),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_of_any_kind(name):
    factor = FACTORS[name]()
    assert name != "negated lazily" or factor.is_neg()
    params, x = problem(2, 3, (2, 3), 2, dtype=F32)
    want = 3 * oracle(params, x, 2, reduction="sum")[1]
    params.requires_grad_()
    (g,) = torch.autograd.grad(NLL(params, x, 2, reduction="sum"), params, factor)
    cases.close(g, want, rtol=1e-4, atol=1e-4)


def test_a_zero_tensor_and_many_factors_at_once():
    params, x = problem(2, 3, (2, 3), 2)
    want = oracle(params, x, 2, reduction="sum")[1]
    params.requires_grad_()
    (g,) = torch.autograd.grad(NLL(params, x, 2, reduction="sum"), params,
                               torch._efficientzerotensor((), dtype=params.dtype))
    assert not g.any()
    for keep in (False, True):
        loss = NLL(params, x, 2, reduction="sum")
        (g,) = torch.autograd.grad(loss, params, torch.tensor([1.0, -2.0]).double(), is_grads_batched=True,
                                   retain_graph=keep)
        cases.close(g, torch.stack([want, -2 * want]))


def test_the_gradient_that_a_caller_of_the_op_sees_is_left_alone():
    params, x = problem(2, 3, (2, 3), 2)
    loss, gradient = torch.ops.gmkernels.discretized_logistic_mixture_nll(
        params.requires_grad_(), x, 2, "openai", -1.0, 1.0, 256, "sum", 1)
    before = gradient.detach().clone()
    (got,) = torch.autograd.grad(3 * loss, params)
    assert torch.equal(gradient, before) and torch.equal(got, 3 * before)


def test_no_gradient_no_memory():
    params, x = problem(2, 3, (2, 3), 2)
    for p in (params, params.clone().requires_grad_()):
        with torch.no_grad():
            loss, gradient = ops.likelihood._nll_op(p, x, 2, "openai", -1.0, 1.0, 256, "sum", ops.likelihood.wanted(p))
        assert gradient.numel() == 0 and not loss.requires_grad
    with torch.inference_mode():
        assert math.isfinite(NLL(params, x, 2))
