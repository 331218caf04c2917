"""masked_conv2d: live taps only, forward and backward, on every device."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from gmkernels import _C, ops, reference
from simt import SCHEDULES

GATE = "tanh_sigmoid"
RASTER = reference.masked_conv


def mask_of(weight, mask_type):
    return RASTER.mask(*weight.shape[2:], mask_type, device=weight.device)


def pair(dilation):
    return (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)


def expected(x, weight, bias=None, mask_type="B", gate=None, dilation=1):
    """float64: torch's own convolution of the weight with zeros for masked taps."""
    if not x.numel() or not weight.numel():  # torch refuses some empty images
        z = x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:], dtype=torch.float64)
        z = z if bias is None else z + bias.double().view(-1, 1, 1)
    else:
        masked = torch.where(mask_of(weight, mask_type), weight, 0).double()
        padding = [k // 2 * d for k, d in zip(weight.shape[2:], pair(dilation), strict=True)]
        z = F.conv2d(x.double(), masked, None if bias is None else bias.double(), padding=padding, dilation=dilation)
    return z if gate is None else torch.tanh(z.chunk(2, 1)[0]) * torch.sigmoid(z.chunk(2, 1)[1])


def problem(b, c_in, c_out, h, w, kernel, *, dtype=torch.float32, device="cpu", nhwc=False, bias=True, grad=False):
    """x, weight, bias of about unit output."""
    kernel = pair(kernel)
    x = cases.data(b, c_in, h, w, dtype=dtype, device=device, seed=1)
    scale = 1 / math.sqrt(max(1, c_in * (kernel[0] * kernel[1] // 2 + 1)))
    weight = cases.data(c_out, c_in, *kernel, dtype=dtype, device=device, seed=2) * scale
    if nhwc:
        x = x.to(memory_format=torch.channels_last)
    tensors = [x, weight, cases.data(c_out, dtype=dtype, device=device, seed=3) if bias else None]
    return [t if t is None else t.detach().requires_grad_(grad) for t in tensors]


def near(got, want):
    """Sums of a few thousand unit products: their rounding grows with the square root of their number."""
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}[got.dtype]
    cases.close(got, want, rtol=rtol, atol=rtol * scale)


def compare(x, weight, bias, backward=True, **kwargs):
    """Output and gradients against float64, and that dead taps have exactly no gradient."""
    out = ops.masked_conv2d(x, weight, bias, **kwargs)
    want = expected(x, weight, bias, **kwargs)
    assert out.dtype == x.dtype and out.shape == want.shape
    near(out, want)
    if not backward:
        return
    inputs = [t for t in (x, weight, bias) if t is not None]
    grad = cases.data(*out.shape, seed=4).to(device=out.device, dtype=out.dtype)
    got = torch.autograd.grad(out, inputs, grad)
    for g, r in zip(got, torch.autograd.grad(want, inputs, grad.double(), allow_unused=True), strict=True):
        near(g, torch.zeros_like(g) if r is None else r)
    assert not got[1][:, :, ~mask_of(weight, kwargs.get("mask_type", "B"))].any()


# values and gradients -------------------------------------------------------------------------------------------------

# b, c_in, c_out, h, w, kernel, mask_type, gate, dilation
SHAPES = [
    (1, 1, 2, 1, 1, 1, "A", None, 1),
    (2, 3, 4, 5, 7, 1, "B", GATE, 1),
    (2, 3, 64, 8, 8, 7, "A", None, 1),
    (1, 31, 34, 7, 13, 3, "B", GATE, 1),
    (1, 64, 65, 6, 6, 3, "B", None, 1),
    (1, 65, 130, 5, 17, (3, 5), "A", GATE, 1),
    (3, 2, 48, 4, 5, (1, 7), "B", None, 1),
    (2, 4, 33, 9, 4, (5, 1), "B", None, 1),
    (1, 3, 16, 11, 9, 3, "B", None, 2),
    (1, 3, 16, 11, 9, (3, 5), "A", GATE, (4, 3)),
    (1, 2, 3, 3, 2, 5, "B", None, (1, 7)),  # most taps reach no pixel
    (1, 5, 7, 2, 259, 3, "B", None, 1),  # wider than a band
]
LARGER = [
    (5, 16, 96, 19, 23, 3, "B", None, 1),  # a thread has several bands
    (2, 32, 64, 29, 31, 5, "A", GATE, 1),
    (1, 8, 40, 3, 601, 3, "B", GATE, (1, 2)),
]
layouts = pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])


def run_shape(shape, device, dtype, nhwc):
    *sizes, mask_type, gate, dilation = shape
    x, weight, bias = problem(*sizes, dtype=dtype, device=device, nhwc=nhwc, grad=True)
    compare(x, weight, bias, mask_type=mask_type, gate=gate, dilation=dilation)


@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_torch(device, shape, nhwc):
    if device.simt and shape[0] * shape[3] * shape[4] * shape[1] * shape[2] > 4000 and shape[1] > 31:
        shape = (1, 17, 66, 3, 5, *shape[5:])
    elif device.simt and shape[5] == 7:
        shape = (1, 3, 34, 5, 6, *shape[5:])
    run_shape(shape, device.torch, torch.float32, nhwc)


@layouts
@pytest.mark.parametrize("shape", LARGER, ids=str)
def test_larger_shapes_on_every_instruction_set(isa, shape, nhwc):
    run_shape(shape, "cpu", torch.float32, nhwc)


@pytest.mark.parametrize("shape", SHAPES[3:6], ids=str)
def test_every_instruction_set(isa, shape):
    for dtype, nhwc in itertools.product(cases.FLOATS, (False, True)):
        run_shape(shape, "cpu", dtype, nhwc)


@layouts
def test_float64(device, nhwc):
    run_shape((2, 3, 66, 3, 5, 3, "B", GATE, 1), device.torch, torch.float64, nhwc)


@pytest.mark.parametrize("c_out", [1, 15, 16, 17, 31, 33, 47, 49, 63, 65, 127, 129])
def test_every_panel_width(isa, c_out):
    for nhwc in (False, True):
        run_shape((1, 3, c_out, 4, 5, 3, "B", None, 1), "cpu", torch.float32, nhwc)
        run_shape((1, 3, 2 * c_out, 4, 5, 3, "B", GATE, 1), "cpu", torch.float32, nhwc)


@pytest.mark.parametrize("pixels", [*range(1, 8), 11, 12, 13, 95, 96, 97])
def test_every_tile_length(pixels):
    run_shape((1, 2, 5, 1, pixels, 3, "B", None, 1), "cpu", torch.float32, False)
    run_shape((1, 2, 5, pixels, 1, 3, "B", None, 1), "cpu", torch.float32, False)


@pytest.mark.parametrize("size", [(0, 3, 4, 5, 5), (2, 0, 4, 5, 5), (2, 3, 0, 5, 5), (2, 3, 4, 0, 5), (2, 3, 4, 5, 0)],
                         ids=str)
@pytest.mark.parametrize("gate", [None, GATE])
@pytest.mark.parametrize("kernel", [1, 3])
def test_empty(device, size, gate, kernel):
    x, weight, bias = problem(*size, kernel, device=device.torch, grad=True)
    out, want = ops.masked_conv2d(x, weight, bias, gate=gate), expected(x, weight, bias, gate=gate)
    near(out, want)
    wanted = torch.autograd.grad(want.sum(), (x, weight, bias), allow_unused=True)
    for g, r, t in zip(torch.autograd.grad(out.sum(), (x, weight, bias)), wanted, (x, weight, bias), strict=True):
        near(g, torch.zeros_like(t) if r is None else r)


def test_no_bias(device):
    x, weight, _ = problem(1, 3, 4, 3, 5, 3, device=device.torch, bias=False, grad=True)
    compare(x, weight, None, gate=GATE)


def test_type_a_of_a_single_tap_is_the_bias(device):
    x, weight, bias = problem(1, 2, 3, 2, 3, 1, device=device.torch)
    out = ops.masked_conv2d(torch.full_like(x, math.nan), weight, bias, mask_type="A")
    assert torch.equal(out, bias.view(1, 3, 1, 1).expand(1, 3, 2, 3))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 9, 70, 9, 40))),
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 7])),
    dilation=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    mask_type=st.sampled_from("AB"), gate=st.booleans(), nhwc=st.booleans(), bias=st.booleans(),
)
def test_any_shape(sizes, kernel, dilation, mask_type, gate, nhwc, bias):
    b, c_in, c_out, h, w = sizes
    x, weight, bias = problem(b, c_in, c_out * (2 if gate else 1), h, w, kernel, nhwc=nhwc, bias=bias, grad=True)
    compare(x, weight, bias, mask_type=mask_type, gate=GATE if gate else None, dilation=dilation)


@pytest.mark.parametrize("taps", [[0, 4, 8], [2, 3, 4, 5], [1, 2, 3, 6, 7], list(range(9)), [8], []], ids=str)
@pytest.mark.parametrize("dilation", [[1, 1], [2, 1]], ids=str)
def test_any_list_of_taps(device, taps, dilation):
    """What a boolean mask will need: taps that are adjacent across a row's end, gaps, taps after the centre."""
    x, weight, bias = problem(1, 3, 4, 3, 5, 3, device=device.torch, grad=True)
    out = torch.ops.gmkernels.masked_conv2d(x, weight, bias, None, None, taps, dilation, GATE, False)[0]
    want = RASTER.masked_conv2d(x.double(), weight.double(), bias.double(), None, None, taps, dilation, GATE)
    near(out, want)
    wanted = torch.autograd.grad(want.sum(), (x, weight, bias), allow_unused=True)
    for g, r, t in zip(torch.autograd.grad(out.sum(), (x, weight, bias)), wanted, (x, weight, bias), strict=True):
        near(g, torch.zeros_like(t) if r is None else r)


# the mask -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, GATE])
@pytest.mark.parametrize("mask_type", "AB")
def test_causality(device, mask_type, gate):
    """By gradient and by perturbation: output p depends on pixels before p (type B: and on p), and on no other."""
    h, w = (3, 4) if device.simt else (5, 6)
    x, weight, bias = problem(1, 2, 4, h, w, (5, 3), device=device.torch, grad=True)
    out = ops.masked_conv2d(x, weight, bias, mask_type=mask_type, gate=gate)
    order = torch.arange(h * w, device=x.device).view(h, w)
    for p in (0, w + 2, h * w - 1):
        (grad,) = torch.autograd.grad(out[0, :, p // w, p % w].sum(), x, retain_graph=True)
        allowed = (order < p) | (order == p) & (mask_type == "B")
        assert not grad[0][:, ~allowed].any()
        if p:
            assert grad[0][:, allowed].any()
        with torch.no_grad():
            changed = torch.where(allowed, x, 1000.0)
            other = ops.masked_conv2d(changed, weight, bias, mask_type=mask_type, gate=gate)
        assert torch.equal(other[..., p // w, p % w], out[..., p // w, p % w])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_weights_are_never_read(device, bad):
    x, weight, bias = problem(1, 3, 4, 3, 5, 3, device=device.torch, grad=True)
    with torch.no_grad():
        weight[:, :, ~mask_of(weight, "A")] = bad
    before = weight.detach().clone()
    for gate in (None, GATE):
        compare(x, weight, bias, mask_type="A", gate=gate)
    assert torch.equal(weight.detach().nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("dtype", cases.ALL_FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_pixel_reaches_the_outputs_that_see_it(device, dtype, bad):
    x, weight, bias = problem(1, 3, 4, 4, 5, (3, 5), dtype=dtype, device=device.torch)
    clean = ops.masked_conv2d(x, weight, bias)
    x[0, 1, 1, 2] = bad
    out = ops.masked_conv2d(x, weight, bias)
    y, x0 = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    sees = ((y == 1) & (x0 >= 2) | (y == 2) & ((x0 - 2).abs() <= 2)).to(out.device)
    assert torch.equal(~out[0].isfinite(), sees.expand(4, 4, 5))
    assert torch.equal(out[0][:, ~sees], clean[0][:, ~sees])


def test_saturated_gate(device):
    x = torch.tensor([0.0, 1e3, -1e3, math.inf, math.nan, 1e-40], device=device.torch).view(1, 1, 1, 6)
    weight = torch.ones(2, 1, 1, 1, device=device.torch)
    out = ops.masked_conv2d(x, weight, gate=GATE)
    near(out, torch.tanh(x.double()) * torch.sigmoid(x.double()))


# layouts --------------------------------------------------------------------------------------------------------------


def test_output_has_the_format_of_the_input(device):
    for channels_last in (False, True):
        x, weight, bias = problem(2, 3, 4, 3, 5, 3, device=device.torch, nhwc=channels_last)
        for gate in (None, GATE):
            out = ops.masked_conv2d(x, weight, bias, gate=gate)
            format = torch.channels_last if channels_last else torch.contiguous_format
            assert out.is_contiguous(memory_format=format)


def test_strided_expanded_offset(device):
    big = cases.data(3, 6, 5, 8, dtype=torch.float32, device=device.torch)
    weight = cases.data(6, 4, 3, 3, dtype=torch.float32, device=device.torch, seed=2)[:, :3]
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = cases.data(12, dtype=torch.float32, device=device.torch)[::2]
    for x in (big[1:, ::2, :, ::2], big[1:2, :3].expand(2, 3, 5, 8), big.transpose(2, 3)[:2, 3:]):
        x, w, b = (t.detach().requires_grad_() for t in (x, weight, bias))
        compare(x, w, b, gate=GATE)


def test_expanded_and_strided_gradients(device):
    x, weight, bias = problem(2, 3, 4, 3, 5, 3, device=device.torch, grad=True)
    losses = (lambda y: y.sum(), lambda y: y[..., ::2].sum(), lambda y: y.transpose(1, 3).contiguous().square().sum())
    for reduce in losses:
        got = torch.autograd.grad(reduce(ops.masked_conv2d(x, weight, bias, gate=GATE)), (x, weight, bias))
        want = torch.autograd.grad(reduce(expected(x, weight, bias, gate=GATE)), (x, weight, bias))
        for g, r in zip(got, want, strict=True):
            near(g, r)


def test_out(device):
    x, weight, bias = problem(2, 3, 4, 3, 5, 3, device=device.torch)
    for dtype, kernel in ((torch.float32, 3), (torch.float32, 1), (torch.bfloat16, 3)):
        tensors = [t.to(dtype) for t in (x, weight[..., :kernel, :kernel], bias)]
        want = ops.masked_conv2d(*tensors)
        out = torch.empty_like(want, memory_format=torch.contiguous_format)
        assert ops.masked_conv2d(*tensors, out=out) is out
        assert torch.equal(out, want)
        tensors[1].requires_grad_()
        with pytest.raises(RuntimeError, match="out= does not support automatic differentiation"):
            ops.masked_conv2d(*tensors, out=out)


# half types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES[1:4], *SHAPES[6:11]], ids=str)
@layouts
def test_halves(dtype, shape, nhwc, isa):
    """Sums are float32 (where they are of bfloat16 products, in another order), and rounded once."""
    *sizes, mask_type, gate, dilation = shape
    x, weight, bias = problem(*sizes, dtype=dtype, nhwc=nhwc, grad=True)
    compare(x, weight, bias, mask_type=mask_type, gate=gate, dilation=dilation)
    if shape[5] == 1 and not gate:
        return
    out, wide = (ops.masked_conv2d(*(t.detach().to(d) for t in (x, weight, bias)), mask_type, gate=gate,
                                   dilation=dilation) for d in (dtype, torch.float32))
    if dtype is torch.bfloat16 and isa == "avx512":
        rounded_once(out, x, weight, bias, mask_type, gate, dilation)
    else:
        assert torch.equal(out, wide.to(dtype))


def rounded_once(out, x, weight, bias, mask_type, gate=None, dilation=1):
    """|out - exact| <= u |exact| + (n + 2) 2^-23 sum |w x|, u = 2^-8, n products. A gate passes on at most the sum of
    the errors of its two inputs, and adds some float32 ulp."""
    want = expected(x, weight, bias, mask_type, gate, dilation).detach()
    terms = expected(x.abs(), weight.abs(), bias.abs(), mask_type, None, dilation).detach()
    bound = (mask_of(weight, mask_type).sum() * x.shape[1] + 2) * 2**-23 * terms
    if gate:
        bound = bound[:, : want.shape[1]] + bound[:, want.shape[1] :] + 2**-20
    assert ((out.double() - want).abs() <= want.abs() * 2**-8 + bound).all()


# determinism ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, GATE])
@layouts
def test_same_bits_on_any_number_of_threads(gate, nhwc, isa):
    x, weight, bias = problem(3, 17, 70, 23, 29, 3, nhwc=nhwc, grad=True)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        out = ops.masked_conv2d(x, weight, bias, gate=gate)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, weight, bias))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_sample_does_not_depend_on_its_batch():
    x, weight, bias = problem(4, 5, 20, 13, 11, 3)
    whole = ops.masked_conv2d(x, weight, bias, gate=GATE)
    assert all(torch.equal(ops.masked_conv2d(x[i : i + 1], weight, bias, gate=GATE)[0], whole[i]) for i in range(4))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_emulator_schedules(schedule):
    backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    x, weight, bias = problem(2, 3, 6, 5, 8, 3, nhwc=True, grad=True)
    with backend.running(schedule):
        compare(x, weight, bias, gate=GATE)


# bad input ------------------------------------------------------------------------------------------------------------


BAD = {
    "x must be a torch.Tensor, got list": lambda x, w, b: (([1.0], w), {}),
    "weight must be a torch.Tensor, got NoneType": lambda x, w, b: ((x, None), {}),
    "bias must be a torch.Tensor, got float": lambda x, w, b: ((x, w, 1.0), {}),
    "x must be a floating-point tensor, got torch.int64": lambda x, w, b: ((x.long(), w), {}),
    r"x must be \[b, c_in, h, w\], got \(3, 5, 5\)": lambda x, w, b: ((x[0], w), {}),
    r"weight must be \[c_out, c_in, kh, kw\], got \(4, 3, 3\)": lambda x, w, b: ((x, w[..., 0]), {}),
    r"with c_in=3 as in x, got \(4, 2, 3, 3\)": lambda x, w, b: ((x, w[:, :2]), {}),
    "odd kernel sizes .* got 2 x 3": lambda x, w, b: ((x, w[:, :, :2]), {}),
    "odd kernel sizes .* got 3 x 2": lambda x, w, b: ((x, w[..., :2]), {}),
    r"bias must be \[c_out\] with c_out=4 as in weight, got \(3,\)": lambda x, w, b: ((x, w, b[:3]), {}),
    r"bias must be \[c_out\] .* got \(\)": lambda x, w, b: ((x, w, b[0]), {}),
    "gate needs an even number .* got c_out=3": lambda x, w, b: ((x, w[:3], b[:3]), {"gate": GATE}),
    "weight must be torch.float32 as x, got torch.float64": lambda x, w, b: ((x, w.double()), {}),
    "bias must be torch.float32 as x, got torch.bfloat16": lambda x, w, b: ((x, w, b.bfloat16()), {}),
    'mask_type must be "A", "B" or a boolean .* got \'C\'': lambda x, w, b: ((x, w, b, "C"), {}),
    'gate must be None, "tanh_sigmoid" or "identity_sigmoid", got \'relu\'': lambda x, w, b: ((x, w), {"gate": "relu"}),
    "dilation must be in .* got 0": lambda x, w, b: ((x, w), {"dilation": 0}),
    "dilation must be an integer, got float": lambda x, w, b: ((x, w), {"dilation": 1.5}),
    r"dilation must be an int or a pair, got \(1, 2, 3\)": lambda x, w, b: ((x, w), {"dilation": (1, 2, 3)}),
    "at most 512 live taps, got 545": lambda x, w, b: ((x, w[..., :1, :1].expand(4, 3, 33, 33)), {}),
    r"out must be torch.float32 \(2, 4, 5, 5\)": lambda x, w, b: ((x, w), {"out": torch.empty(2, 4, 5, 4)}),
    "out must be a contiguous": lambda x, w, b: ((x, w), {"out": torch.empty(2, 4, 5, 10)[..., ::2]}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    args, kwargs = BAD[message](*problem(2, 3, 4, 5, 5, 3))
    with pytest.raises((TypeError, ValueError), match=message):
        ops.masked_conv2d(*args, **kwargs)


def test_bad_input_of_the_torch_route():
    x, weight, bias = problem(2, 3, 4, 5, 5, 1)
    with pytest.raises(ValueError, match="with c_in=3"):
        ops.masked_conv2d(x, weight[:, :2], bias)
    with pytest.raises(TypeError, match="bias must be torch.bfloat16 as x"):
        ops.masked_conv2d(x.bfloat16(), weight.bfloat16(), bias)


def test_mixed_devices():
    x, weight, bias = problem(2, 3, 4, 5, 5, 3)
    with pytest.raises((ValueError, RuntimeError), match="device|meta"):
        ops.masked_conv2d(x, weight.to("meta"), bias)


def test_huge_dilation(device):
    """Taps that reach no pixel cost nothing and overflow nothing."""
    x, weight, bias = problem(1, 2, 3, 3, 4, (3, 5), device=device.torch)
    out = ops.masked_conv2d(x, weight, bias, dilation=2**31 - 1)
    centre = torch.einsum("oi,bihw->bohw", weight[:, :, 1, 2].double(), x.double()) + bias.double().view(-1, 1, 1)
    near(out, centre)


def test_isas_agree():
    x, weight, bias = problem(2, 33, 66, 9, 11, 3)
    results = []
    for name in _C.isas():
        _C.set_isa(name)
        results.append(ops.masked_conv2d(x, weight, bias, gate=GATE))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)
