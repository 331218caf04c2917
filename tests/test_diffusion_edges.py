"""ops.diffusion_step where a group of 16 bytes ends: addresses, samples and clips just beside it."""

import math

import pytest
import torch

from diffusion_cases import OPTIONS, call, close, coefficients, oracle, tensors
from gmkernels import ops

STREAMS = ("uncond", "h1", "h2", "h3", "variance", "z")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_seeds_and_samples_of_an_odd_size(device, dtype):
    """The second sample begins between two groups, in the middle of aligned memory."""
    names, options = OPTIONS["everything"]
    made, c = tensors((2, 19), names, dtype, device.torch), coefficients(device=device.torch)
    options = {**options, "seed": torch.tensor([3, -4], device=device.torch)}
    close(call(made, c, **options), oracle(made, c, **options)[0])


def test_all_streams_may_be_unaligned_together(device):
    made = {name: torch.cat([t[:1], t])[1:] for name, t in tensors((9,), STREAMS, device=device.torch).items()}
    out, x0 = (torch.empty(10, device=device.torch)[1:] for _ in range(2))
    c = coefficients(device=device.torch)
    call(made, c, out=out, x0_out=x0)
    want = oracle(made, c)
    close(out, want[0])
    close(x0, want[1])


def test_one_tensor_in_place_at_every_address(device):
    """x is model_output and out: the only address of the call, and any multiple of two."""
    c = coefficients((1, 2, 3, 0, 0, 0, 0, 0), device=device.torch)
    storage = torch.arange(60.0, device=device.torch).half()
    for offset in range(40):
        x = storage.clone()[offset : offset + 17]
        want = 9 * x
        assert torch.equal(ops.diffusion_step(x, x, c, out=x), want)


def test_without_noise_its_coefficient_and_variance_say_nothing(device):
    made = tensors((2, 9), ("variance",), device=device.torch)
    made["variance"].fill_(math.nan)
    c = coefficients(device=device.torch)
    close(call(made, c), oracle({k: made[k] for k in ("x", "model_output")}, c)[0])


def test_a_zero_at_the_edge_of_the_clip_keeps_its_sign(device):
    """As in torch.clamp."""
    zeros = torch.tensor([0.0, -0.0], device=device.torch).repeat(5)
    c = coefficients((1, 1, 1, 1, 0, 0, 0, 0), device=device.torch)
    for clip in ((0.0, 1.0), (-0.0, 1.0), (-1.0, 0.0), (-1.0, -0.0)):
        _, x0 = ops.diffusion_step(zeros, zeros, c, clip=clip, return_x0=True)
        assert torch.equal(x0.signbit(), zeros.clamp(*clip).signbit())
        assert torch.equal(x0.signbit(), zeros.signbit())
