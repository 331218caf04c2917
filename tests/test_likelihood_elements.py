"""Likelihoods of independent elements: values, gradients, reductions, bad input."""

import math
import re

import pytest
import torch
from torch import distributions

import cases
from gmkernels import ops
from likelihood_cases import F64, close, pixels

REDUCE = {"none": lambda t: t, "image": lambda t: t.flatten(1).sum(1), "sum": torch.sum, "mean": torch.mean}


def tensors(name, dtype=F64, device="cpu", shape=(2, 3, 4, 5)):
    a, b = (cases.data(*shape, dtype=dtype, device=device, seed=i) for i in (0, 1))
    if name == "categorical_nll":
        return (cases.data(shape[0], 7, *shape[1:], dtype=dtype, device=device),), a.abs().mul(2).long().clamp(max=6)
    if name == "bernoulli_nll":
        return (a,), (b > 0).to(dtype)
    return (a, b), pixels(*shape).to(device, dtype) if name == "discretized_logistic_nll" else a + 2 * b


def exact(name, parameters, x):
    parameters, x = [t.cpu().double() for t in parameters], x.cpu().double()
    if name == "categorical_nll":
        return -distributions.Categorical(logits=parameters[0].movedim(1, -1)).log_prob(x)
    if name == "bernoulli_nll":
        return -distributions.Bernoulli(logits=parameters[0]).log_prob(x)
    mean, log_scale = parameters
    if name == "gaussian_nll":
        return -distributions.Normal(mean, log_scale.exp()).log_prob(x)
    scale = log_scale.clamp(min=-7).exp()
    upper = torch.where(x == 1, math.inf, (x - mean + 1 / 255) / scale)
    lower = torch.where(x == -1, -math.inf, (x - mean - 1 / 255) / scale)
    return -torch.log(torch.sigmoid(upper) - torch.sigmoid(lower))


NAMES = ["discretized_logistic_nll", "categorical_nll", "gaussian_nll", "bernoulli_nll"]
names = pytest.mark.parametrize("name", NAMES)


@names
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_values_and_reductions(device, name, dtype):
    parameters, x = tensors(name, dtype, device.torch)
    want = exact(name, parameters, x)
    for reduction, f in REDUCE.items():
        got = getattr(ops, name)(*parameters, x, reduction=reduction)
        assert got.dtype is dtype
        close((got,), (f(want),), 1e-9 if dtype is F64 else 1e-5)
    assert torch.equal(getattr(ops, name)(*parameters, x), getattr(ops, name)(*parameters, x, reduction="mean"))


@names
def test_gradients(name):
    parameters, x = tensors(name, shape=(1, 1, 2))
    for reduction in ("none", "mean"):
        def f(*parameters, reduction=reduction):
            return getattr(ops, name)(*parameters, x, reduction=reduction)

        leaves = tuple(p.clone().requires_grad_() for p in parameters)
        assert torch.autograd.gradcheck(f, leaves) and torch.autograd.gradgradcheck(f, leaves)


@names
def test_compile_func_half_and_empty(name):
    torch._dynamo.reset()
    parameters, x = tensors(name, torch.float32)
    op = getattr(ops, name)
    want = exact(name, parameters, x).mean()
    close((torch.compile(op, fullgraph=True)(*parameters, x),), (want,))
    leaf = parameters[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(op(leaf, *parameters[1:], x), leaf)
    cases.close(torch.func.grad(lambda p: op(p, *parameters[1:], x))(parameters[0]), gradient.double())
    half = [p.bfloat16() for p in parameters]
    got = op(*half, x, reduction="none")
    assert got.dtype is torch.float32
    close((got,), (exact(name, half, x),))
    for b, n in ((0, 3), (2, 0)):
        parameters, x = tensors(name, shape=(b, n))
        for reduction in REDUCE:
            got = op(*parameters, x, reduction=reduction)
            assert got.shape == {"none": (b, n), "image": (b,)}.get(reduction, ())
            assert reduction != "mean" or got.isnan()


@names
def test_a_nan_stays_in_its_element(name):
    parameters, x = tensors(name, shape=(2, 9))
    clean = getattr(ops, name)(*parameters, x, reduction="none")
    parameters[0][1, ..., 3] = math.nan
    got = getattr(ops, name)(*parameters, x, reduction="none")
    hit = torch.zeros(2, 9, dtype=torch.bool)
    hit[1, 3] = True
    assert torch.equal(got.isnan(), hit) and torch.equal(got[~hit], clean[~hit])


def test_an_index_out_of_range_is_an_error():
    logits = torch.zeros(2, 5, 3)
    for bad in (5, -1, -100):
        with pytest.raises(IndexError):
            ops.categorical_nll(logits, torch.full((2, 3), bad))
    assert ops.categorical_nll(logits, torch.zeros(2, 3, dtype=torch.uint8)).item() == pytest.approx(math.log(5))


Z = torch.zeros(2, 3)


@pytest.mark.parametrize("call, kind, message", [
    (lambda: ops.gaussian_nll(Z, torch.zeros(3), Z), ValueError, "log_std must have the shape of x, (2, 3), got (3,)"),
    (lambda: ops.gaussian_nll(Z, Z.double(), Z), TypeError, "log_std must be torch.float32 as mean, got torch.float64"),
    (lambda: ops.gaussian_nll(Z, Z, Z.double()), TypeError, "x must be torch.float32 as mean, got torch.float64"),
    (lambda: ops.gaussian_nll(Z, 1.0, Z), TypeError, "log_std must be a torch.Tensor, got float"),
    (lambda: ops.bernoulli_nll(Z.long(), Z), TypeError, "logits must be a floating-point tensor, got torch.int64"),
    (lambda: ops.bernoulli_nll(Z[0, 0], Z[0, 0]), ValueError, "x must be [b, ...]"),
    (lambda: ops.bernoulli_nll(Z, Z, reduction="batch"), ValueError, "reduction must be one of"),
    (lambda: ops.categorical_nll(Z, Z), TypeError, "x must hold integers, got torch.float32"),
    (lambda: ops.categorical_nll(Z, Z.long()), ValueError, "logits must be [b, levels, ...] for x [b, ...]"),
    (lambda: ops.discretized_logistic_nll(Z, Z, Z, levels=1), ValueError, "levels must be in [2"),
    (lambda: ops.discretized_logistic_nll(Z, Z[:1], Z), ValueError, "log_scale must have the shape of x"),
])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()
