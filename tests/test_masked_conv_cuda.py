"""masked_conv2d on CUDA and in the emulator: every dtype on the edges of the tiles, accuracy, infinities, old GPUs."""

import math

import pytest
import torch

import cases
from gmkernels import ops, reference
from test_masked_conv import problem

GATE = "tanh_sigmoid"
RASTER = reference.masked_conv
FLOAT, DOUBLE, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
dtypes = pytest.mark.parametrize("dtype", cases.ALL_FLOATS, ids=str)
layouts = pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])


@pytest.fixture(autouse=True)
def _only_cuda_kernels(device):
    if device.name == "cpu" or (cases.rehearsal and not device.simt):
        pytest.skip("of the CUDA kernels")


def rounding(dtype):
    """Of one result; and of a sum, as a part of the sum of the absolute values. float32: 2^-21 is dropped by 3xTF32,
    the rest is the rounding of sums, where tensor cores may lose a few bits more than the emulator."""
    return {FLOAT: (2**-24, 2**-19), DOUBLE: (0.0, 2**-46), BF16: (2**-8, 2**-18), F16: (2**-11, 2**-18)}[dtype]


def check_sum(got, want, size):
    """`got` is the sum `want`, of terms whose absolute values add up to `size` (float64)."""
    result, terms = rounding(got.dtype)
    bound = result * want.abs() + terms * size + (2**-24 if got.dtype is F16 else 0)
    excess = (got.detach().double() - want).abs() - bound
    assert excess.max() <= 0, f"{excess.max().item():.2e} above the bound"


def check_convolution(x, weight, bias, taps, dilation=(1, 1)):
    """Forward and the three gradients without a gate, each against its sum in float64."""
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    out = torch.ops.gmkernels.masked_conv2d(x, weight, bias, None, None, taps, dilation, None, False)[0]
    assert out.dtype is x.dtype
    grad = cases.data(*out.shape, dtype=x.dtype, device=x.device, seed=4)
    got = (out, *torch.autograd.grad(out, (x, weight, bias), grad.to(memory_format=torch.preserve_format)))
    results = []
    for f in (torch.Tensor.double, lambda t: t.double().abs()):
        xd, wd, bd, gd = (f(t.detach()) for t in (x, weight, bias, grad))
        results.append((
            RASTER.masked_conv2d(xd, wd, bd, None, None, taps, dilation, None),
            RASTER.masked_conv2d_backward_input(gd, wd, taps, dilation),
            *RASTER.masked_conv2d_backward_weight(gd, xd, *weight.shape[2:], taps, dilation),
        ))
    for g, want, size in zip(got, *results, strict=True):
        check_sum(g, want, size)


# Tiles: 128 pixels (float64: 64) x 64 or 128 channels; chunks of k: 64 bytes, so 16 in float32, 32 in the halves.
EDGES = [
    # b, c_in, c_out, h, w, kernel
    (1, 1, 1, 1, 1, (3, 3)),
    (1, 15, 63, 1, 63, (1, 3)),
    (1, 16, 64, 4, 16, (1, 3)),
    (1, 17, 65, 5, 13, (1, 3)),
    (1, 32, 128, 1, 127, (1, 3)),
    (2, 8, 130, 8, 8, (3, 1)),
    (3, 24, 66, 1, 43, (1, 3)),
    (2, 3, 16, 5, 7, (5, 7)),
]


@layouts
@dtypes
@pytest.mark.parametrize("edge", [e if i in (0, 2, 3, 7) else pytest.param(e, marks=pytest.mark.slow)
                                  for i, e in enumerate(EDGES)], ids=str)
def test_edges_of_the_tiles(device, edge, dtype, nhwc):
    *sizes, kernel = edge
    x, weight, bias = problem(*sizes, kernel, dtype=dtype, device=device.torch, nhwc=nhwc)
    check_convolution(x, weight, bias, RASTER.taps(*kernel, "B"))


@pytest.mark.parametrize("dtype", [BF16, FLOAT], ids=str)
@pytest.mark.parametrize("taps, dilation", [
    ([0, 4, 8], (1, 1)), ([8], (2, 1)), ([1, 2, 3, 6, 7], (1, 2)), ([], (1, 1))
], ids=str)
def test_any_list_of_taps(device, taps, dilation, dtype):
    """What a boolean mask is."""
    for c_in, nhwc in ((3, False), (16, True)):
        x, weight, bias = problem(2, c_in, 9, 4, 5, 3, dtype=dtype, device=device.torch, nhwc=nhwc)
        check_convolution(x, weight, bias, taps, dilation)


@layouts
@dtypes
def test_gate(device, dtype, nhwc):
    """The gate and all gradients, with the channels of a gate in several groups and a rest."""
    channels = 80 if nhwc else 66
    x, weight, bias = problem(1, 16, channels, 3, 8, 3, dtype=dtype, device=device.torch, nhwc=nhwc, grad=True)
    out = ops.masked_conv2d(x, weight, bias, gate=GATE, dilation=(2, 1))
    tensors = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = RASTER.masked_conv2d(*tensors, None, None, RASTER.taps(3, 3, "B"), (2, 1), GATE)
    grad = cases.data(*out.shape, dtype=dtype, device=device.torch, seed=4)
    got = (out, *torch.autograd.grad(out, (x, weight, bias), grad))
    wanted = (want, *torch.autograd.grad(want, tensors, grad.double()))
    rtol = {FLOAT: 1e-6, DOUBLE: 1e-14, BF16: 1e-2, F16: 1.2e-3}[dtype]  # halves: two roundings, of dz and the result
    for g, r in zip(got, wanted, strict=True):
        cases.close(g, r, rtol=rtol, atol=rtol * max(1.0, r.abs().max().item()))


@dtypes
def test_without_tensor_cores(device, dtype):
    """sm_75: the same tiles, plain multiply-adds."""
    with cases.old_gpu(device):
        for nhwc in (False, True):
            x, weight, bias = problem(1, 16, 34, 3, 7, 3, dtype=dtype, nhwc=nhwc)
            check_convolution(x, weight, bias, RASTER.taps(3, 3, "B"))


def test_float32_is_no_tf32(device):
    """Factors whose lower bits decide: one product of tf32 would be wrong by up to 2^-10, bfloat16 by more."""
    one = 1 + 2**-12 + 2**-23
    x = torch.full((1, 4, 1, 8), one, device=device.torch)
    weight = torch.full((8, 4, 1, 3), -one, device=device.torch)
    weight[:, 1::2] = 1
    for memory_format in (torch.contiguous_format, torch.channels_last):
        out = ops.masked_conv2d(x.to(memory_format=memory_format), weight, mask_type="A")
        want = 2 * one - 2 * one * one
        assert (out[..., 1:].double() - want).abs().max() <= 4 * 2**-21


def test_halves_are_summed_in_float32(device):
    """1 and 2^-9 many times: a sum kept in bfloat16 would stay 1."""
    x = torch.full((1, 257, 1, 2), 2**-9, dtype=BF16, device=device.torch)
    x[:, 0] = 1
    weight = torch.ones((8, 257, 1, 3), dtype=BF16, device=device.torch)
    out = ops.masked_conv2d(x, weight, mask_type="A")
    assert torch.equal(out[0, :, 0, 1], torch.full((8,), 1.5, dtype=BF16, device=device.torch))


# not finite -----------------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
@dtypes
def test_a_bad_pixel_as_in_a_plain_convolution(device, dtype, bad, nhwc):
    """The sign of an infinity too, and nothing else in its tile: not its neighbours, not the zeros past the ends."""
    x, weight, bias = problem(1, 8, 6, 3, 5, (3, 3), dtype=dtype, device=device.torch, nhwc=nhwc)
    x[0, 5, 1, 2] = bad
    taps = RASTER.taps(3, 3, "B")
    out = ops.masked_conv2d(x, weight, bias)
    want = RASTER.masked_conv2d(x.double(), weight.double(), bias.double(), None, None, taps, (1, 1), None)
    finite = want.isfinite()
    assert 0 < finite.sum() < finite.numel()
    assert torch.equal(out.double()[~finite].nan_to_num(), want[~finite].nan_to_num())
    assert torch.equal(out.isnan(), want.isnan())
    cases.close(out[finite], want[finite], rtol=1e-2, atol=1e-2)


def test_every_kind_of_nan_and_huge_numbers(device):
    """Bits that would become infinity or a number, were they only cut or rounded to tf32."""
    bits = [0x7FFFFFFF, 0x7F800001, 0x7F801000, -1, 0x7F7FFFFF, 0x7F7FE000, 0x7F800000]
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(device.torch).view(1, 1, 1, len(bits))
    weight = torch.full((4, 1, 1, 3), 0.3, device=device.torch)
    out = ops.masked_conv2d(torch.cat([x, torch.zeros_like(x)], -1), weight, mask_type="A")[0, 0, 0].cpu()
    assert out[1:5].isnan().all()
    assert out[5] == math.inf  # documented: above 3.4011e38 counts as infinite
    assert out[6] > 1e38 and out[7] == math.inf and not out[8:].any() and out[0] == 0


def test_bad_weights_spoil_their_channel_only(device):
    for dtype in cases.ALL_FLOATS:
        x, weight, bias = problem(1, 3, 4, 3, 5, 3, dtype=dtype, device=device.torch)
        clean = ops.masked_conv2d(x, weight, bias)
        weight[2, 1, 1, 1] = math.inf
        out = ops.masked_conv2d(x, weight, bias)
        assert not out[:, 2].isfinite().any()
        assert torch.equal(out[:, [0, 1, 3]], clean[:, [0, 1, 3]])


# the rest -------------------------------------------------------------------------------------------------------------


@dtypes
def test_a_sample_does_not_depend_on_its_batch(device, dtype):
    x, weight, bias = problem(3, 8, 6, 5, 9, 3, dtype=dtype, device=device.torch, nhwc=True)
    whole = ops.masked_conv2d(x, weight, bias, gate=GATE)
    for i in range(3):
        assert torch.equal(ops.masked_conv2d(x[i : i + 1], weight, bias, gate=GATE)[0], whole[i])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_halves_run_the_kernel(device, dtype, kernel_calls):
    x, weight, bias = problem(1, 3, 4, 3, 5, 3, dtype=dtype, device=device.torch, grad=True)
    out = ops.masked_conv2d(x, weight, bias, gate=GATE)
    assert kernel_calls == ["masked_conv2d"] and out.dtype is dtype
    grads = torch.autograd.grad(out.sum(), (x, weight, bias), create_graph=True)
    assert kernel_calls == ["masked_conv2d", "gate_backward", "masked_conv2d", "masked_conv2d_backward_weight"]
    assert all(g.dtype is dtype for g in grads)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), (x, weight, bias))
    assert all(g.dtype is dtype and g.isfinite().all() for g in second)


def test_offset_storage_and_mixed_formats(device):
    """Tensors that 16-byte accesses do not suit; a gradient in the other format."""
    big = cases.data(3 * 16 * 5 * 8 + 1, dtype=FLOAT, device=device.torch)
    x = big[1:].view(3, 5, 8, 16).permute(0, 3, 1, 2)[1:]
    x = x.detach().requires_grad_()
    _, weight, bias = problem(1, 16, 72, 5, 8, 3, device=device.torch, grad=True)
    out = ops.masked_conv2d(x, weight, bias, gate=GATE)
    taps = RASTER.taps(3, 3, "B")
    want = RASTER.masked_conv2d(x.double(), weight.double(), bias.double(), None, None, taps, (1, 1), GATE)
    cases.close(out, want, rtol=1e-6, atol=1e-6)
    grad = cases.data(*out.shape, dtype=FLOAT, device=device.torch, seed=4).contiguous()
    for g, r in zip(torch.autograd.grad(out, (x, weight, bias), grad),
                    torch.autograd.grad(want, (x, weight, bias), grad.double()), strict=True):
        cases.close(g, r, rtol=1e-6, atol=1e-6 * r.abs().max().item())


def test_the_workspace_is_checked(device):
    from gmkernels.ops import masked_conv as module

    x, weight, bias = problem(1, 3, 4, 3, 5, 3, device=device.torch)
    out, workspace = torch.empty(1, 4, 3, 5, device=x.device), torch.empty(64 * 16, device=x.device)
    with pytest.raises(RuntimeError, match="the workspace is too small"):
        module._forward((out, None, workspace), (x, weight, bias, None, None, None), [1, 3, 4, 3, 5], [0, 1, 2, 3],
                        [3, 3, 1, 1], False, [False] * 5, 0, False, False, 0, workspace.numel(), False)


@pytest.mark.parametrize("schedule", ["descending", "random:1", "preempt:1"])
@pytest.mark.parametrize("dtype", [pytest.param(FLOAT, marks=pytest.mark.slow), BF16], ids=str)
def test_schedules(device, dtype, schedule):
    if not device.simt:
        pytest.skip("of the emulator")
    from simt import backend

    for nhwc in (False, True):
        x, weight, bias = problem(2, 16, 18, 5, 11, 3, dtype=dtype, nhwc=nhwc, grad=True)
        with backend.running(schedule=schedule):
            out = ops.masked_conv2d(x, weight, bias, gate=GATE)
            got = (out, *torch.autograd.grad(out.sum(), (x, weight, bias)))
        again = ops.masked_conv2d(x, weight, bias, gate=GATE)
        assert all(torch.equal(a, b) for a, b in zip(got, (again, *torch.autograd.grad(again.sum(), (x, weight, bias))),
                                                     strict=True))
