"""Edges of the CUDA kernels of the gradient for the weight that the tests by shape do not meet: many chunks of pixels
by asynchronous copies, more weights than blocks, zeros, huge numbers, and what a launch cannot do."""

import math

import pytest
import torch

import cases
from gmkernels import reference
from gmkernels.ops import masked_conv as module
from test_masked_conv_cuda import check_sum

FLOAT, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
_reference = reference.masked_conv.masked_conv2d_backward_weight


@pytest.fixture(autouse=True)
def _only_cuda_kernels(device):
    if device.name == "cpu" or (cases.rehearsal and not device.simt):
        pytest.skip("of the CUDA kernels")


def factors(b, c_in, c_out, h, w, dtype, device, nhwc=False):
    """grad and x"""
    form = torch.channels_last if nhwc else torch.contiguous_format
    tensors = (cases.data(b, c, h, w, dtype=dtype, device=device.torch, seed=c) for c in (c_out, c_in))
    return [t.contiguous(memory_format=form) for t in tensors]


def gradient(grad, x, taps=(0, 1)):
    """For a weight of one row of three, and the bias."""
    return torch.ops.gmkernels.masked_conv2d_backward_weight(grad, x, 1, 3, list(taps), [1, 1])


def check(got, grad, x):
    """Gradients for the weight and, unless None, the bias, against their sums in float64."""
    grad, x = grad.double(), x.double()
    want = _reference(grad, x, 1, 3, [0, 1], [1, 1])
    for g, r, size in zip(got, want, _reference(grad.abs(), x.abs(), 1, 3, [0, 1], [1, 1]), strict=True):
        if g is not None:
            check_sum(g, r, size)


@pytest.mark.parametrize("dtype", [FLOAT, BF16, F16], ids=str)
@pytest.mark.parametrize("c_in, c_out, w", [(8, 16, 0), (64, 8, 2)], ids=["wide", "tall"])
def test_many_chunks_of_two_factors_in_channels_last(device, dtype, c_in, c_out, w):
    """Both come by asynchronous copies, in more chunks (16 or 32 pixels) than are under way; the last is not full."""
    pixels = 38 if dtype is FLOAT else 86
    grad, x = factors(2, c_in, c_out, pixels // w if w else 1, w or pixels, dtype, device, nhwc=True)
    assert module._nhwc(grad) and module._nhwc(x)
    check(gradient(grad, x), grad, x)


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_channels_that_are_zero_have_no_gradient(device, nhwc):
    grad, x = factors(1, 8, 64, 2, 11, FLOAT, device, nhwc)
    for parity in (0, 1):
        some_grad, some_x = grad.clone(), x.clone()
        some_grad[:, parity::2] = 0
        some_x[:, parity::2] = 0
        weight, bias = gradient(some_grad, x)
        assert not weight[parity::2].any() and not bias[parity::2].any() and weight[1 - parity :: 2, :, :, :2].all()
        assert not gradient(grad, some_x)[0][:, parity::2].any()


def test_weights_that_a_block_has_several_turns_of(device):
    grad, x = factors(1, 60, 17, 1, 4, FLOAT, device)
    with cases.few_blocks(device):
        check(gradient(grad, x), grad, x)


def test_magnitudes_that_count_as_infinite(device):
    """documented: above 3.4011e38, in float32"""
    most = torch.tensor(3.4011e38)
    values = [most, most.nextafter(torch.tensor(math.inf)), torch.tensor(torch.finfo(FLOAT).max)]
    grad, x = torch.full((1, 1, 1, 1), 0.25), torch.stack([*values, *(-v for v in values)]).view(1, 6, 1, 1)
    for factor, other in ((grad, x), (x, grad)):
        weight, _ = gradient(factor.to(device.torch), other.to(device.torch), [1])
        assert weight[..., 1].isfinite().flatten().tolist() == 2 * [True, False, False]


def test_products_lose_what_is_documented(device):
    """At most 2^-21 (conv_tile.cuh) and the rounding of the result, whatever the bits that tf32 has not."""
    low = torch.tensor([0, 1, 0xFFE, 0xFFF, 0x1000, 0x1001, 0x1FFE, 0x1FFF, 0x2FFF, 0x3FFF])
    values = ((0x3F800000 + low).int().view(FLOAT) * torch.tensor([[1.0], [-1.0]])).flatten()
    x = values.view(1, -1, 1, 1).to(device.torch)
    weight = gradient(x, x, [1])[0][:, :, 0, 1].cpu().double()
    want = values.double().outer(values.double())
    assert ((weight - want).abs() <= (2**-21 + 2**-23) * want.abs()).all()


def test_an_old_gpu_has_no_magnitudes_that_count_as_infinite(device):
    grad, x = torch.full((1, 1, 1, 1), 0.25), torch.full((1, 1, 1, 1), torch.finfo(FLOAT).max)
    with cases.old_gpu(device):
        assert gradient(grad, x, [1])[0][..., 1] == x / 4


# called without the op -----------------------------------------------------------------------------------------------


def emulator():
    return pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_without_the_gradient_for_the_bias_in_the_emulator(device, dtype):
    if not device.simt:
        pytest.skip("of the emulator")
    grad, x = factors(1, 3, 4, 1, 5, dtype, device)
    weight, workspace = torch.empty(4, 3, 1, 3, dtype=dtype), torch.empty(1, 7, 4)
    with emulator().running():
        module._weight((weight, None, workspace), (grad, x), [1, 3, 4, 1, 5], [0, 1], [1, 3, 1, 1], 1, [False] * 2,
                       module.DTYPE_CODE[dtype])
    check([weight, None], grad, x)


def test_every_misaligned_address_in_the_emulator(device):
    """An image that is its own gradient, of 16 bytes a pixel: two, four ... bytes past an aligned address. All else
    stays where it is."""
    if not device.simt:
        pytest.skip("of the emulator")
    values, _ = factors(1, 8, 8, 1, 2, BF16, device, nhwc=True)
    memory = torch.zeros(64, dtype=BF16)
    weight, bias, workspace = torch.empty(8, 8, 1, 3, dtype=BF16), torch.empty(8, dtype=BF16), torch.empty(1, 17, 8)
    want = gradient(values, values)
    for offset in range(32):
        x = memory[offset : offset + 16].view(1, 1, 2, 8).permute(0, 3, 1, 2)
        x.copy_(values)
        with emulator().running():
            module._weight((weight, bias, workspace), (x, x), [1, 8, 8, 1, 2], [0, 1], [1, 3, 1, 1], 1,
                           [module._nhwc(x)] * 2, module.DTYPE_CODE[BF16])
        assert torch.equal(weight, want[0]) and torch.equal(bias, want[1])


def test_the_last_group_costs_what_the_first_costs_in_the_emulator(device):
    """64 groups of ten pixels."""
    if not device.simt:
        pytest.skip("of the emulator")
    grad, x = factors(1, 1, 1, 1, 640, BF16, device)
    weight, bias, workspace = torch.empty(3, dtype=BF16), torch.empty(1, dtype=BF16), torch.empty(64, 2, 1)
    costs = []
    for block in (0, 63):
        with emulator().running(blocks=[block]) as simt:
            simt.counters()
            module._weight((weight, bias, workspace), (grad, x), [1, 1, 1, 1, 640], [1], [1, 3, 1, 1], 64, [False] * 2,
                           module.DTYPE_CODE[BF16])
            costs.append(simt.counters()[1])
    first, last = costs
    assert 0 < last <= first


# what a launch cannot do: the sizes passed are not those of the tensors, which nobody has the memory for --------------

NOWHERE = 2**62  # no block
PIXELS = (2**31 - 1) * 16  # of a group, in float32


def launch(sizes, taps=0, groups=1, blocks=NOWHERE):
    """Without pixels, unless no block runs: the workspace is zeros, where it is written."""
    workspace = torch.full((2113 * 128,), math.nan)
    with emulator().running(blocks=[blocks]):
        module._weight((torch.empty(1), torch.empty(1), workspace), (torch.empty(1), torch.empty(1)), sizes,
                       list(range(taps)), [1, 1025, 1, 1], groups, [False] * 2, module.DTYPE_CODE[FLOAT])
    return workspace


def refused(*args, **kwargs):
    with pytest.raises(RuntimeError, match="more blocks or chunks than a kernel can have"):
        launch(*args, **kwargs)


@pytest.fixture
def _one_device(device):
    if not device.simt:
        pytest.skip("of the emulator")


launches = pytest.mark.usefixtures("_one_device")


@launches
@pytest.mark.parametrize("side", [0x7FFF0000, 2**31, 2**32 + 1], ids=hex)
@pytest.mark.parametrize("which", [3, 4, 1, 2], ids=["h", "w", "c_in", "c_out"])
def test_sides_that_are_too_large_in_the_emulator(which, side):
    sizes = [0, 1, 1, 1, 1]
    sizes[which] = side
    with pytest.raises(RuntimeError, match="a side or a number of channels near 2"):
        launch(sizes)


@launches
def test_most_rows_in_the_emulator():
    """2^31 - 1 blocks of 128 rows, one for each pair of a tap and an input channel, and one for the bias."""
    refused([0, 1232636354, 1, 1, 1], taps=223)
    written = launch([0, 2114445437, 1, 1, 1], taps=130, blocks=2112).view(2113, 128)
    assert not written[-1].any() and written[:-1].isnan().all()


@launches
def test_most_output_channels_in_the_emulator():
    """65535 blocks of 128 channels."""
    refused([0, 0, 65535 * 128 + 1, 1, 1])
    written = launch([0, 0, 65535 * 128, 1, 1], blocks=2112).view(2113, 128)
    assert not written[-1].any() and written[:-1].isnan().all()


@launches
def test_most_pixels_of_a_group_in_the_emulator():
    """2^31 - 1 chunks of 16 pixels."""
    for b, h, w, groups in ((PIXELS, 1, 1, 1), (3 * PIXELS + 2, 1, 1, 3)):
        launch([b, 1, 1, h, w], groups=groups)
    for b, h, w, groups in ((PIXELS + 1, 1, 1, 1), (3 * PIXELS + 3, 1, 1, 3), (2**31, 16, 1, 1), (2**31, 1, 16, 1)):
        refused([b, 1, 1, h, w], groups=groups)


@launches
def test_more_than_two_to_the_32_weights_in_the_emulator():
    for c_in in (2**16 - 1, 2**16, 2**16 + 1):
        launch([1, c_in, 2**16, 1, 1])
