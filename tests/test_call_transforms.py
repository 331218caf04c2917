"""Subclasses, modes, torch.func, modules: everything that takes a call apart on its way to a kernel."""

import copy
import gc
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as fwAD

from call_ops import (
    Count,
    Logged,
    Net,
    Wrapped,
    axpby,
    both,
    close,
    data,
    lse_op,
    ref_axpby,
    ref_both,
    ref_lse,
    row_logsumexp,
)
from gmkernels import _call

pytestmark = pytest.mark.filterwarnings("ignore")

# subclasses and modes ------------------------------------------------------------------------------------------------


def test_wrapper_subclass(routes):
    x = Wrapped(data(4, 3))
    out = row_logsumexp(axpby(x, x * x, 2.0, -3.0))
    assert type(out) is Wrapped
    close(out.inner, ref_lse(ref_axpby(x.inner, x.inner * x.inner)))
    close(axpby(data(4, 3), x).inner, 2 * x.inner)  # subclass second
    y = Wrapped(data(4, 3, grad=True))
    both(y).backward()
    close(y.grad.inner, torch.autograd.grad(ref_both(z := data(4, 3, grad=True)), z)[0])
    with pytest.raises(ValueError, match="out must be"):
        axpby(data(3), data(3), out=Wrapped(data(3)))


def test_torch_function_subclass(routes):
    x = data(4, 3).as_subclass(Logged)
    Logged.calls.clear()
    out = row_logsumexp(x)
    assert type(out) is Logged and "gmkernels.test_row_logsumexp.default" in Logged.calls
    close(out.as_subclass(torch.Tensor), ref_lse(data(4, 3)))


def test_dispatch_mode_sees_the_op():
    with Count() as mode:
        x = data(4, 3, grad=True)
        both(x).backward()
    assert "gmkernels.test_axpby.default" in mode.ops and "gmkernels.test_row_logsumexp_backward.default" in mode.ops
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False):
        close(both(x.detach()), ref_both(x.detach()))


def test_torch_function_mode_is_harmless():
    with torch.device("meta"):  # a torch-function mode: new tensors go to meta, unless a device is given
        x = torch.ones(4, 3, device="cpu")
        assert axpby(x, x).device.type == "cpu"
        close(row_logsumexp(x), ref_lse(x))


# functional transforms -----------------------------------------------------------------------------------------------


def test_func_grad_vjp_jacrev(routes):
    x = data(4, 3)
    close(torch.func.grad(both)(x), torch.func.grad(ref_both)(x))
    f, r = (lambda x: row_logsumexp(axpby(x, x * x, 2.0, -3.0))), (lambda x: ref_lse(ref_axpby(x, x * x)))
    out, pull = torch.func.vjp(f, x)
    close(pull(out)[0], torch.func.vjp(r, x)[1](out)[0])
    close(torch.func.jacrev(f)(x), torch.func.jacrev(r)(x))
    close(torch.func.grad(lambda x: torch.func.grad(both)(x).sin().sum())(x),
          torch.func.grad(lambda x: torch.func.grad(ref_both)(x).sin().sum())(x))


def test_func_vmap():
    x = data(5, 4, 3)
    close(torch.func.vmap(row_logsumexp)(x), torch.logsumexp(x, 2))
    close(torch.func.vmap(lambda a, b: axpby(a, b, 2.0, -3.0), in_dims=(0, None))(x, x[0]), ref_axpby(x, x[0]))
    close(torch.func.vmap(torch.func.grad(both))(x), torch.func.vmap(torch.func.grad(ref_both))(x))
    close(torch.func.vmap(torch.func.vmap(lambda r: axpby(r, r)))(x), 2 * x)


def test_func_forward_mode():
    x, t = data(4, 3), data(4, 3, seed=3)
    for got, want in zip(torch.func.jvp(both, (x,), (t,)), torch.func.jvp(ref_both, (x,), (t,)), strict=True):
        close(got, want)
    close(torch.func.jacfwd(both)(x), torch.func.jacfwd(ref_both)(x))
    close(torch.func.hessian(both)(x), torch.func.hessian(ref_both)(x))
    for guard in (torch.enable_grad, torch.no_grad):
        with guard(), fwAD.dual_level():
            close(fwAD.unpack_dual(both(fwAD.make_dual(x, t))).tangent, want)


def test_an_op_without_backward_says_so():
    silent = _call.Op("test_no_backward(Tensor x) -> Tensor", outputs=lse_op.outputs, launch=lse_op.launch,
                      kernel=lse_op.kernel, reference=lse_op.reference)
    x = data(4, 3, grad=True)
    with pytest.raises(NotImplementedError, match="no backward"):
        silent(x).sum().backward()
    with pytest.raises((RuntimeError, NotImplementedError), match="backward|autograd|grad"):
        silent.op(x).sum().backward()


def test_compiled_jvp():
    torch._dynamo.reset()
    x, t = data(4, 3), data(4, 3, seed=3)
    want = torch.func.jvp(ref_both, (x,), (t,))[1]
    close(torch.compile(lambda x, t: torch.func.jvp(both, (x,), (t,))[1])(x, t), want)


def test_compiled_func_grad_and_vmap():
    torch._dynamo.reset()
    x = data(5, 4, 3)
    close(torch.compile(torch.func.grad(both))(x[0]), torch.func.grad(ref_both)(x[0]))
    close(torch.compile(torch.func.vmap(row_logsumexp))(x), torch.logsumexp(x, 2))


def test_functional_call_module_pickle_deepcopy_checkpoint():
    m, x = Net(), data(4, 3, dtype=torch.float32)
    params = dict(m.named_parameters())
    g = torch.func.grad(lambda p: torch.func.functional_call(m, p, (x,)).sum())(params)
    m(x).sum().backward()
    close(g["linear.weight"], m.linear.weight.grad)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        close(twin(x), m(x))
    y = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(m, y, use_reentrant=False).sum().backward()
    assert y.grad is not None
    result = row_logsumexp(y)
    assert result.grad_fn.name() == "test_row_logsumexpBackward"


def test_saved_output_makes_no_reference_cycle():
    gc.collect()
    x = data(4, 3, grad=True)
    alive = torch.autograd.graph.Node  # keep torch.autograd imported
    import weakref
    out = row_logsumexp(x)
    w = weakref.ref(out.grad_fn)
    gc.disable()
    try:
        del out
        assert w() is None, alive
    finally:
        gc.enable()


