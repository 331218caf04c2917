"""Every way a tensor can reach an op: the result is right, or the error is clear."""

import io
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from call_ops import (
    F64,
    Count,
    Net,
    axpby,
    axpby_op,
    both,
    close,
    data,
    lse_grad_op,
    lse_op,
    pair_op,
    ref_axpby,
    ref_both,
    ref_lse,
    row_logsumexp,
)
from gmkernels import _call

pytestmark = pytest.mark.filterwarnings("ignore")


# eager ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_eager(dtype, guard, routes):
    with guard():
        x, y = data(5, 3, dtype=dtype), data(5, 3, dtype=dtype, seed=1)
        close(axpby(x, y, 2.0, -3.0), ref_axpby(x, y))
        close(row_logsumexp(x), ref_lse(x))
    assert routes == {"launch": 2, "dispatch": 0}


def test_no_grad_region_on_tensor_that_requires_grad(routes):
    x = data(4, 3, grad=True)
    with torch.no_grad():
        assert not row_logsumexp(x).requires_grad
    assert routes["dispatch"] == 0


def test_backward_and_parameter(routes):
    p = nn.Parameter(data(4, 3))
    both(p).backward()
    q = p.detach().clone().requires_grad_()
    ref_both(q).backward()
    close(p.grad, q.grad)
    assert routes["dispatch"] == 0


def test_inference_tensor_in_grad_region():
    with torch.inference_mode():
        x = data(4, 3)
    close(row_logsumexp(x), ref_lse(x).clone())


def test_noncontiguous_leaf_and_expanded_grad():
    base = data(3, 6, grad=True)
    x = base.t()[::2]
    assert not x.is_contiguous()
    row_logsumexp(x).sum().backward()  # sum() gives a grad of stride 0
    close(base.grad, torch.autograd.grad(ref_lse(base.t()[::2]).sum(), base)[0])
    z = data(6, 4).t().requires_grad_()  # a leaf that is itself non-contiguous
    axpby(z, z, 2.0, -3.0).sum().backward()
    close(z.grad, torch.full_like(z, -1.0))


def test_out_variants(routes):
    x, y = data(5, 3), data(5, 3, seed=1)
    out = torch.empty_like(x)
    assert axpby(x, y, 2.0, -3.0, out=out) is out
    close(out, ref_axpby(x, y))
    z = x.clone()
    axpby(z, y, 2.0, -3.0, out=z)  # in place
    close(z, out)
    assert routes["dispatch"] == 0
    with torch.inference_mode():
        close(axpby(x, y, 2.0, -3.0, out=torch.empty_like(x)), out)
    for bad, message in [(torch.empty(5, 4, dtype=F64), r"out must be .*\(5, 3\), got .*\(5, 4\)"),
                         (torch.empty(5, 3), "got torch.float32"),
                         (torch.empty(3, 5, dtype=F64).t(), "contiguous"),
                         (x.to_sparse(), "contiguous")]:
        with pytest.raises(ValueError, match=message):
            axpby(x, y, out=bad)
    with pytest.raises(RuntimeError, match="does not support automatic differentiation"):
        axpby(x.clone().requires_grad_(), y, out=out)
    with pytest.raises(RuntimeError, match="does not support automatic differentiation"):
        axpby(x, y, out=out.clone().requires_grad_())


def test_out_on_other_device_is_refused():
    with pytest.raises((ValueError, RuntimeError), match="out|memory"):
        axpby(data(3), data(3), out=torch.empty(3, dtype=F64, device="meta"))


def test_out_bumps_version_counter():
    x = data(3, grad=True)
    saved = x * 1.0
    y = saved.exp() + saved * saved  # autograd saves `saved`
    with torch.no_grad():
        axpby(saved, saved, out=saved.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_zero_size_and_zero_dim():
    for shape in [(0,), (0, 3), (3, 0)]:
        x = data(*shape, grad=True)
        out = axpby(x, x)
        assert out.shape == x.shape
        out.sum().backward()
    close(axpby(data(), data(), 2.0, -3.0), ref_axpby(data(), data()))
    close(row_logsumexp(data(0, 3)), data(0))
    close(row_logsumexp(data(3, 0)), torch.full((3,), -torch.inf, dtype=F64))


# compile, export, trace --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounter()
    counted = torch.compile(both, fullgraph=True, dynamic=dynamic, backend=frames)
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic)
    for n in (4, 7, 9) if dynamic else (4,):
        x, z = data(n, 3, grad=True), data(n, 3, grad=True)
        counted(data(n, 3))
        close(compiled(x), ref_both(z))
        compiled(x).backward()
        ref_both(z).backward()
        close(x.grad, z.grad)
    assert frames.frame_count == 1
    with torch.no_grad():
        close(compiled(data(4, 3)), ref_both(data(4, 3)))


def test_compile_out():
    torch._dynamo.reset()
    f = torch.compile(lambda x, out: axpby(x, x, 2.0, -3.0, out=out), fullgraph=True)
    x, out = data(4), torch.empty(4, dtype=F64)
    f(x, out)
    close(out, ref_axpby(x, x))


def test_compile_parameter_module_and_autocast():
    torch._dynamo.reset()
    m = Net()
    c = torch.compile(m, fullgraph=True)
    x = data(4, 3, dtype=torch.float32)
    close(c(x), m(x))
    with torch.autocast("cpu", torch.bfloat16):
        close(c(x), m(x), )


def test_export():
    class M(nn.Module):
        def forward(self, x):
            return both(x)

    for strict in (False, True):
        program = torch.export.export(M(), (data(4, 3),), strict=strict,
                                      dynamic_shapes={"x": {0: torch.export.Dim("n", min=2)}})
        assert "gmkernels.test_row_logsumexp" in str(program.graph)
        close(program.module()(data(9, 3)), ref_both(data(9, 3)))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        close(torch.export.load(buffer).module()(data(5, 3)), ref_both(data(5, 3)))


def test_jit_trace_records_the_op():
    traced = torch.jit.trace(both, (data(4, 3),))
    assert "gmkernels::test_axpby" in str(traced.graph)
    close(traced(data(6, 3, seed=5)), ref_both(data(6, 3, seed=5)))


def test_jit_script_is_refused():
    with pytest.raises(Exception, match="(?i)compile|script|python|type|support"):
        torch.jit.script(axpby)


def test_make_fx():
    from torch.fx.experimental.proxy_tensor import make_fx
    for mode in ("real", "fake", "symbolic"):
        assert "gmkernels.test_axpby" in make_fx(both, tracing_mode=mode)(data(4, 3)).code


# torch.library -----------------------------------------------------------------------------------------------------


def test_opcheck():
    x, y = data(4, 3, grad=True), data(4, 3, grad=True, seed=1)
    for op, args in [(axpby_op, (x, y, 2.0, -3.0)), (lse_op, (x,)), (lse_op, (x.t(),)),
                     (lse_grad_op, (data(4, grad=True), x, data(4, grad=True, seed=2)))]:
        result = torch.library.opcheck(op.op, args)
        assert set(result.values()) == {"SUCCESS"} and len(result) == 4


@pytest.mark.parametrize("route", ["eager", "dispatcher"])
def test_gradcheck_and_gradgradcheck(route):
    call = (lambda op: op) if route == "eager" else (lambda op: op.op)
    x, y, g, s = data(3, 4, grad=True), data(3, 4, grad=True, seed=1), data(3, grad=True), data(3, grad=True, seed=2)
    for op, args in [(axpby_op, (x, y, 2.0, -3.0)), (lse_op, (x,)), (lse_grad_op, (g, x, s))]:
        assert gradcheck(call(op), args) and gradgradcheck(call(op), args)


def test_gradcheck_forward_ad():
    assert gradcheck(lambda x: row_logsumexp(axpby(x, x * x)), (data(3, 2, grad=True),), check_forward_ad=True)


# tensors that have no memory to read ---------------------------------------------------------------------------------


def test_fake_tensors(routes):
    with FakeTensorMode() as mode:
        x = torch.empty(4, 3, dtype=F64)
        assert row_logsumexp(axpby(x, x)).shape == (4,)
        with pytest.raises(ValueError, match=r"x must be \[n, m\]"):
            row_logsumexp(x[0])
    assert axpby(x, x).shape == (4, 3)  # after the mode has ended
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert row_logsumexp(data(4, 3)).shape == (4,)
    y = mode.from_tensor(data(4, 3)).requires_grad_()
    with mode:
        row_logsumexp(y).sum().backward()
    assert y.grad.shape == (4, 3)
    assert routes["launch"] == 0


def test_meta_tensors(routes):
    x = torch.empty(4, 3, device="meta", requires_grad=True)
    out = row_logsumexp(axpby(x, x))
    assert out.is_meta and out.shape == (4,)
    out.sum().backward()
    assert x.grad.is_meta
    with torch.no_grad():
        assert axpby(x, x).is_meta
    with pytest.raises(ValueError, match="[nd]"):
        row_logsumexp(x[0])
    assert routes["launch"] == 0


def test_mixed_cpu_and_meta_is_an_error():
    for args in [(torch.ones(3), torch.ones(3, device="meta")), (torch.ones(3, device="meta"), torch.ones(3))]:
        with pytest.raises((ValueError, RuntimeError), match="no memory|device"):
            axpby(*args)


def test_freed_storage_and_zero_tensor():
    x = torch.ones(4)
    x.untyped_storage().resize_(0)  # as FSDP does
    for args in [(x, torch.ones(4)), (torch.ones(4), x)]:
        with pytest.raises(RuntimeError, match="has 4 elements but no memory"):
            axpby(*args)
    z = torch._efficientzerotensor((4,))
    with pytest.raises(RuntimeError, match="no memory"):
        axpby(z, z)


def test_sparse_quantised_nested_mkldnn_complex_integer():
    x = torch.eye(3)
    q = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    for t, message in [(x.to_sparse(), "SparseCPU"), (x.to_sparse_csr(), "SparseCsrCPU"), (x.to_mkldnn(), "Mkldnn"),
                       (q, "float32 or float64"), (x.to(torch.cfloat), "float32 or float64"),
                       (x.long(), "float32 or float64"), (x.bool(), "float32 or"),
                       (torch.nested.nested_tensor([x, x]), "(?i)nested"),
                       (torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged), "gmkernels|nested")]:
        for guard in (torch.enable_grad, torch.no_grad):
            with guard(), pytest.raises((TypeError, RuntimeError, NotImplementedError), match=message):
                print(row_logsumexp(t), axpby(t, t))


def test_cuda_tensor_without_cuda_kernel_or_device():
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError), match="(?i)cuda"):
            axpby(torch.ones(3, device="cuda"), torch.ones(3, device="cuda"))


def test_not_tensors():
    for bad in ([1.0], None, 3.0):
        with pytest.raises((RuntimeError, TypeError), match="'x'|None"):
            axpby(bad, torch.ones(1))
    with pytest.raises((RuntimeError, TypeError), match="real number|float"):
        axpby(torch.ones(1), torch.ones(1), "two")
    with pytest.raises(TypeError, match="y must be torch.float32"):
        axpby(torch.ones(1), torch.ones(1, dtype=F64))
    with pytest.raises(ValueError, match=re.escape("y must have the shape of x, (2,), got (3,)")):
        axpby(torch.ones(2), torch.ones(3))


def test_conj_and_neg_bit(routes):
    for n in (1, 3):  # with one element the view is contiguous: nothing but is_neg() tells
        c = data(n, 2, dtype=F64).to(torch.cdouble) * (1 + 2j)
        x = c.conj().imag
        assert x.is_neg()
        close(axpby(x, x, 2.0, -3.0), -x.resolve_neg())
        close(row_logsumexp(x), ref_lse(x))
        close(row_logsumexp(c.conj().real), ref_lse(c.real))
        x = x.requires_grad_() if x.is_leaf else x
        row_logsumexp(x).sum().backward()
    with pytest.raises(TypeError, match="complex128"):
        axpby(c.conj(), c)
    t = torch._neg_view(torch.ones(4))
    close(axpby(t, t), torch.full((4,), -2.0))
    out = torch._neg_view(torch.ones(4))
    with pytest.raises(ValueError, match="out"):
        axpby(torch.ones(4), torch.ones(4), out=out)


def test_lazy_clone_copies_on_write():
    x = torch.ones(4)
    y = torch._lazy_clone(x)
    axpby(x, x, out=y)
    close(x, torch.ones(4))


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad])
def test_autocast(guard):
    x = data(4, 3, dtype=torch.float32)
    with guard(), torch.autocast("cpu", torch.bfloat16):
        for a, b in [(x.bfloat16(), x.bfloat16()), (x, x.bfloat16()), (x, x)]:
            out = axpby(a, b, 2.0, -3.0)
            assert out.dtype is torch.float32
            close(out, ref_axpby(a.float(), b.float()))
        assert axpby(x.double(), x.double()).dtype is F64
        y = x.bfloat16().requires_grad_()
        if torch.is_grad_enabled():
            row_logsumexp(y).sum().backward()
            assert y.grad.dtype is torch.bfloat16


# where there is no kernel -------------------------------------------------------------------------------------------


def test_a_dtype_without_kernel_runs_the_reference_with_one_warning(monkeypatch):
    x = data(4, 3, dtype=torch.float32).bfloat16()
    monkeypatch.setattr(_call, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            close(row_logsumexp(x), ref_lse(x))
    assert [str(w.message) for w in caught] == [
        "gmkernels.test_row_logsumexp: no torch.bfloat16 kernel; running the reference in plain torch"
    ]
    y = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row_logsumexp(y).sum().backward()
        out = torch.empty(4, dtype=torch.bfloat16)
        assert row_logsumexp(x, out=out) is out
    close(out, ref_lse(x))
    close(y.grad, torch.softmax(x, 1), rtol=2e-2, atol=2e-2)


def test_strict_turns_the_fallback_into_an_error(monkeypatch):
    monkeypatch.setenv("GMKERNELS_STRICT", "1")
    with pytest.raises(NotImplementedError, match="no torch.bfloat16 kernel"):
        row_logsumexp(torch.ones(2, 2, dtype=torch.bfloat16))
    row_logsumexp(torch.ones(2, 2))


def test_a_cuda_tensor_in_a_cpu_build_runs_the_reference():
    class Cuda:  # enough of a CUDA tensor for _run to choose
        dtype, is_cpu, device = torch.float32, False, torch.device("cuda")

    op = _call.Op("test_fallback(Tensor x) -> Tensor", outputs=None, launch=None, kernel=lse_op.kernel,
                  reference=lambda x: "reference")
    with pytest.warns(UserWarning, match="no kernel for cuda in this build"):
        assert op._run(Cuda()) == "reference"


# several outputs, optional tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_y", [True, False])
def test_two_outputs_and_an_optional_tensor(with_y):
    x, y = data(4, 3, grad=True), data(4, 3, grad=True, seed=1) if with_y else None
    a, b = pair_op(x, y)
    close(a, x + y if with_y else x)
    close(b, 2 * x)
    (a.sum() + 3 * b.sum()).backward()
    close(x.grad, torch.full_like(x, 7.0))
    if with_y:
        close(y.grad, torch.ones_like(y))
    f = torch.compile(lambda x, y: pair_op(x, y), fullgraph=True)
    for got, want in zip(f(x, y), (a, b), strict=True):
        close(got, want)
    outs = torch.empty(4, 3, dtype=F64), torch.empty(4, 3, dtype=F64)
    with torch.no_grad():
        assert pair_op(x, y, out=outs) is outs
    close(outs[0], a)
    result = torch.library.opcheck(pair_op.op, (x, y))
    assert set(result.values()) == {"SUCCESS"}
    close(torch.func.vmap(lambda x: pair_op(x, None)[1])(x.detach()[:, None]), 2 * x.detach()[:, None])


def test_a_missing_required_tensor():
    with pytest.raises(TypeError, match="tensor argument 1 is required, got None"):
        axpby_op(torch.ones(2), None, 1.0, 1.0)
    with pytest.raises(TypeError, match="tensor argument 0 is required, got None"):
        pair_op(None, torch.ones(2))


# processes and threads -----------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return row_logsumexp(axpby(torch.full((2, 3), float(i)), torch.zeros(2, 3)))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_dataloader_workers(start):
    both(data(4, 3, grad=True)).backward()  # the parent has used the ops
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=2, multiprocessing_context=start)
    close(torch.cat(list(loader)), torch.stack([Rows()[i] for i in range(8)]))


def test_threads():
    def work(i):
        x = data(40, 300, grad=True, seed=i)
        both(x).backward()
        with torch.no_grad():
            row_logsumexp(x)
        return x.grad

    with ThreadPoolExecutor(8) as pool:
        for i, g in enumerate(pool.map(work, range(64))):
            z = data(40, 300, grad=True, seed=i)
            ref_both(z).backward()
            close(g, z.grad)


def test_mode_in_another_thread_does_not_leak(routes):
    with Count(), ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: axpby(torch.ones(2), torch.ones(2))).result()
    assert routes["dispatch"] == 0


# the guards themselves -----------------------------------------------------------------------------------------------


def test_fallback_without_private_probes(monkeypatch):
    monkeypatch.setattr(_call, "_observed", lambda: True)
    x = data(4, 3, grad=True)
    close(both(x), ref_both(x))
    assert gradcheck(lambda x: both(x), (x,))
    with torch.no_grad():
        out = torch.empty_like(x)
        close(axpby(x, x, 2.0, -3.0, out=out), ref_axpby(x, x))
