"""Small ops for tests/test_call*.py, whose kernels read and write addresses as a real one does; their references;
tensor subclasses; and `routes`, which counts the ways taken."""

import ctypes

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gmkernels import _call
from gmkernels._call import Op, allocate, check_same_dtype

CTYPE = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


class NumpyKernel:
    """Stands where a Kernel stands; `cuda` is None, as in a CPU build."""

    cuda = None


def memory(t):
    """The contiguous tensor's memory as a numpy array; no memory is an error, as in tensor_args.h."""
    address, count = t.data_ptr(), t.numel()
    if address == 0 and count:
        raise RuntimeError(f"tensor has {count} elements but no memory")
    if not count:
        return np.empty(tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."))
    return np.ctypeslib.as_array((CTYPE[t.dtype] * count).from_address(address)).reshape(tuple(t.shape))


def _check_dtype(name, x, **others):
    if x.dtype not in CTYPE:
        raise TypeError(f"{name} must be float32 or float64, got {x.dtype}")
    check_same_dtype(name, x, **others)


# axpby ----------------------------------------------------------------------------------------------------------------


def _axpby_outputs(x, y, a, b, out=None):
    _check_dtype("x", x, y=y)
    if x.shape != y.shape:
        raise ValueError(f"y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    return allocate(out, x, x.shape)


def _axpby_launch(out, x, y, a, b):
    x, y = x.contiguous(), y.contiguous()
    a, b = ctypes.c_double(a).value, ctypes.c_double(b).value  # as a binding converts scalars, or refuses them
    memory(out)[...] = a * memory(x) + b * memory(y)


def _axpby_setup(ctx, inputs, output):
    _, _, ctx.a, ctx.b = inputs


def _axpby_backward(ctx, grad):  # through the op itself, so it can be differentiated any number of times
    return axpby(grad, grad, ctx.a, 0.0), axpby(grad, grad, ctx.b, 0.0), None, None


axpby_op = Op(
    "test_axpby(Tensor x, Tensor y, float a, float b) -> Tensor",
    outputs=_axpby_outputs,
    launch=_axpby_launch,
    kernel=NumpyKernel,
    setup=_axpby_setup,
    backward=_axpby_backward,
    reference=lambda x, y, a, b: a * x + b * y,
    autocast=torch.float32,
)


def axpby(x, y, a=1.0, b=1.0, *, out=None):
    return axpby_op(x, y, a, b, out=out)


# row_logsumexp --------------------------------------------------------------------------------------------------------


def _lse_outputs(x, out=None):
    _check_dtype("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must be [n, m], got {tuple(x.shape)}")
    return allocate(out, x, x.shape[:1])


def _lse_launch(out, x):
    x = x.contiguous()
    m = memory(x)
    top = m.max(1, initial=-np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        memory(out)[...] = np.where(np.isfinite(top), top + np.log(np.exp(m - top[:, None]).sum(1)), top)


def _lse_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _lse_backward(ctx, grad):
    return lse_grad_op(grad, *ctx.saved_tensors)


lse_op = Op(
    "test_row_logsumexp(Tensor x) -> Tensor",
    outputs=_lse_outputs,
    launch=_lse_launch,
    kernel=NumpyKernel,
    setup=_lse_setup,
    backward=_lse_backward,
    reference=lambda x: torch.logsumexp(x, 1),
    autocast=torch.float32,
)


def row_logsumexp(x, *, out=None):
    return lse_op(x, out=out)


def _lse_grad_outputs(grad, x, lse, out=None):
    _check_dtype("x", x, grad=grad, lse=lse)
    if x.dim() != 2 or grad.shape != x.shape[:1] or lse.shape != x.shape[:1]:
        raise ValueError(f"expected grad [n], x [n, m], lse [n], got {grad.shape}, {x.shape}, {lse.shape}")
    return allocate(out, x, x.shape)


def _lse_grad_launch(out, grad, x, lse):
    grad, x, lse = grad.contiguous(), x.contiguous(), lse.contiguous()
    memory(out)[...] = memory(grad)[:, None] * np.exp(memory(x) - memory(lse)[:, None])


def _lse_grad_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _lse_grad_backward(ctx, v):
    grad, x, lse = ctx.saved_tensors
    p = torch.exp(x - lse[:, None])
    gx = v * grad[:, None] * p
    return (v * p).sum(1), gx, -gx.sum(1)


lse_grad_op = Op(
    "test_row_logsumexp_backward(Tensor grad, Tensor x, Tensor lse) -> Tensor",
    outputs=_lse_grad_outputs,
    launch=_lse_grad_launch,
    kernel=NumpyKernel,
    setup=_lse_grad_setup,
    backward=_lse_grad_backward,
    reference=lambda grad, x, lse: grad[:, None] * torch.exp(x - lse[:, None]),
)


# two outputs, an optional tensor --------------------------------------------------------------------------------------


def _pair_outputs(x, y, out=None):
    _check_dtype("x", x, y=y)
    first, second = (None, None) if out is None else out
    return allocate(first, x, x.shape), allocate(second, x, x.shape)


def _pair_launch(outs, x, y):
    x, y = x.contiguous(), None if y is None else y.contiguous()
    memory(outs[0])[...] = memory(x) + (0 if y is None else memory(y))
    memory(outs[1])[...] = memory(x) * 2


def _pair_reference(x, y):
    return (x.clone() if y is None else x + y), 2 * x


def _pair_setup(ctx, inputs, output):
    ctx.has_y = inputs[1] is not None


def _pair_backward(ctx, g0, g1):
    return g0 + 2 * g1, g0.clone() if ctx.has_y else None


pair_op = Op(
    "test_pair(Tensor x, Tensor? y) -> (Tensor, Tensor)",
    outputs=_pair_outputs,
    launch=_pair_launch,
    kernel=NumpyKernel,
    setup=_pair_setup,
    backward=_pair_backward,
    reference=_pair_reference,
)


# references, data, subclasses, routes --------------------------------------------------------------------------------

F64 = torch.float64


def ref_axpby(x, y, a=2.0, b=-3.0):
    return a * x + b * y


def ref_lse(x):
    return torch.logsumexp(x, 1)


def both(x):
    """A function that uses both ops, and its reference."""
    return row_logsumexp(axpby(x, x * x, 2.0, -3.0)).sin().sum()


def ref_both(x):
    return ref_lse(ref_axpby(x, x * x)).sin().sum()


def data(*shape, dtype=F64, grad=False, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **tolerance)


class Wrapped(torch.Tensor):
    """A wrapper subclass: it has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(t):
            return t.inner if isinstance(t, cls) else t

        out = func(*torch.utils._pytree.tree_map(unwrap, args), **torch.utils._pytree.tree_map(unwrap, kwargs or {}))
        return torch.utils._pytree.tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, out)


class Logged(torch.Tensor):
    """A __torch_function__ subclass."""

    calls = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.op = row_logsumexp

    def forward(self, x):
        return self.op(axpby(self.linear(x), x))


@pytest.fixture
def routes(monkeypatch):
    """Counts launches and dispatcher calls, so that a test can say which route was taken."""
    seen = {"launch": 0, "dispatch": 0}
    for op in (axpby_op, lse_op, lse_grad_op):
        def launch(*args, _launch=op.launch):
            for t in args:  # every tensor that reaches a launcher owns memory
                assert not isinstance(t, torch.Tensor) or type(t) in (*_call._PLAIN, Logged) and not t.is_neg()
                assert not isinstance(t, torch.Tensor) or t.data_ptr() or not t.numel()
            seen["launch"] += 1
            return _launch(*args)
        monkeypatch.setattr(op, "launch", launch)
    original = _call.Op._dispatch

    def dispatch(self, args, out):
        seen["dispatch"] += 1
        return original(self, args, out)

    monkeypatch.setattr(_call.Op, "_dispatch", dispatch)
    return seen
