"""Edges of the masked convolution's CUDA kernels that the tests by shape do not meet: full panels of a gate, outputs
that are not aligned, numbers past the last k, and what a launch cannot do."""

import math

import pytest
import torch

import cases
from gmkernels import ops, reference
from gmkernels.ops import masked_conv as module
from test_masked_conv import GATE, compare, expected, near, problem

RASTER = reference.masked_conv
FLOAT, DOUBLE, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_channels_of_a_gate_that_fill_their_panel(device, dtype):
    """32 tanh and 32 sigmoid channels are one panel of 64; 31 leave a rest."""
    for channels in (62, 64):
        compare(*problem(1, 2, channels, 1, 3, (1, 3), dtype=dtype, device=device.torch), backward=False, gate=GATE)


def test_a_chunk_that_is_not_full_reads_no_other_weight(device):
    """One input channel and one live tap: all other k of the chunk are zeros, whatever the dead taps hold."""
    x, weight, bias = problem(1, 1, 3, 2, 3, 3, device=device.torch)
    weight[:, :, 0, 0] = math.nan
    want = RASTER.masked_conv2d(x.double(), weight.double(), bias.double(), None, None, [4], (1, 1), None)
    near(torch.ops.gmkernels.masked_conv2d(x, weight, bias, None, None, [4], (1, 1), None, False)[0], want)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("offset", [1, 2])
def test_output_that_is_not_aligned(device, dtype, offset):
    """Whole rows of 4 pixels, but the output begins `offset` elements after an aligned address."""
    x, weight, bias = problem(2, 1, 3, 1, 4, (1, 3), dtype=dtype, device=device.torch)
    memory = torch.zeros(offset + 24, dtype=dtype, device=device.torch)
    out = memory[offset:].view(2, 3, 1, 4)
    ops.masked_conv2d(x, weight, bias, out=out)
    near(out, expected(x, weight, bias))
    assert not memory[:offset].any()


def test_as_many_taps_as_a_kernel_takes(device):
    """512 live taps: half of a kernel of 31 x 33 and the centre."""
    x, weight, bias = problem(1, 1, 1, 16, 17, (31, 33), dtype=BF16 if device.simt else FLOAT, device=device.torch)
    assert len(RASTER.taps(31, 33, "B")) == 512
    compare(x, weight, bias, backward=False)


# what a launch cannot do: the sizes passed are not those of the tensors, which nobody has the memory for --------------


def launch(sizes, dtype=FLOAT):
    """A convolution without input channels or taps, so that it only writes zeros. Only the first block runs."""
    backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    out, nothing = torch.full((128,), math.nan, dtype=dtype), torch.empty(0, dtype=dtype)
    with backend.running(blocks=[0]):
        module._forward((out, None, None), (nothing, nothing, *[None] * 4), sizes, [], [1, 1, 1, 1], False, [False] * 5,
                        0, False, False, module.DTYPE_CODE[dtype], 0, False)
    return out


@pytest.mark.parametrize("which", [3, 4, 1, 2], ids=["h", "w", "c_in", "c_out"])
def test_largest_side_in_the_emulator(which):
    sizes = [1, 0, 1, 1, 1]
    sizes[which] = 0x7FFF0000
    with pytest.raises(RuntimeError, match="a side or a number of channels near 2"):
        launch(sizes)
    sizes[which] -= 1
    assert not launch(sizes)[: 1 if which == 1 else None].any()


@pytest.mark.parametrize("dtype, pixels", [(FLOAT, 128), (DOUBLE, 64)], ids=str)
def test_most_blocks_of_a_grid_in_the_emulator(dtype, pixels):
    """A grid has 2^31 - 1 blocks; a block has `pixels` pixels of one panel."""
    with pytest.raises(RuntimeError, match="more blocks or chunks than a kernel can have"):
        launch([2**31 * pixels, 0, 1, 1, 1], dtype)
    assert not launch([(2**31 - 1) * pixels, 0, 1, 1, 1], dtype)[:pixels].any()


def test_smallest_workspace_in_the_emulator():
    backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    x, weight, bias = problem(1, 3, 4, 1, 5, (1, 3))
    out, size = torch.empty(1, 4, 1, 5), module._packed_size(3, 4, [0, 1], module._PLAIN, FLOAT)

    def run(size):
        with backend.running():
            module._forward((out, None, torch.empty(size)), (x, weight, bias, *[None] * 3), [1, 3, 4, 1, 5], [0, 1],
                            [1, 3, 1, 1], False, [False] * 5, 0, False, False, 0, size, False)

    with pytest.raises(RuntimeError, match="the workspace is too small"):
        run(size - 1)
    run(size)
    near(out, RASTER.masked_conv2d(x.double(), weight.double(), bias.double(), None, None, [0, 1], (1, 1), None))
