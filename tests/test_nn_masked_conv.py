"""nn.MaskedConv2d, nn.GatedMaskedConv2d: the op with its parameters."""

import copy
import math

import pytest
import torch

import cases
from gmkernels import nn, ops


@pytest.mark.parametrize("options", [
    {}, {"mask_type": "A", "data_channels": 3}, {"mask_order": "vertical"}, {"mask_order": "horizontal"},
    {"dilation": (1, 2)}, {"bias": False}, {"mask_type": [[True, False, True], [False] * 3, [True] * 3]},
], ids=str)
def test_is_the_op(device, options):
    torch.manual_seed(0)
    x = cases.data(2, 3, 4, 5, dtype=torch.float32, device=device.torch)
    layer = nn.MaskedConv2d(3, 6, 3, **options).to(x.device)
    gated = nn.GatedMaskedConv2d(3, 4, 3, **options, gate="identity_sigmoid").to(x.device)
    rest = {"mask_type": "B"} | {k: v for k, v in options.items() if k != "bias"}
    assert torch.equal(layer(x), ops.masked_conv2d(x, layer.weight, layer.bias, **rest))
    cond, residual = cases.data(2, 8, dtype=torch.float32, device=device.torch), layer(x)[:, :4].detach()
    want = ops.masked_conv2d(x, gated.weight, gated.bias, gate="identity_sigmoid", cond=cond, residual=residual, **rest)
    assert torch.equal(gated(x, cond, residual), want)


def test_initial_weights():
    """Of the variance of live taps only; masked ones are zero and stay so under an optimiser with weight decay."""
    torch.manual_seed(0)
    layer = nn.MaskedConv2d(16, 64, 5, "A")
    live = layer.weight.detach().flatten(2)[..., :12]
    bound = 1 / math.sqrt(16 * 12)
    assert live.abs().max() <= bound and live.abs().mean() > 0.48 * bound
    assert not layer.weight.detach().flatten(2)[..., 12:].any()
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
    layer(torch.randn(2, 16, 6, 6)).square().mean().backward()
    optimizer.step()
    assert not layer.weight.detach().flatten(2)[..., 12:].any()


def test_weights_written_past_the_version_counter_are_seen():
    """`parameter.data` changes a weight without telling autograd: nothing packed may be kept for longer than a call."""
    layer, x = nn.MaskedConv2d(3, 4, 3), torch.randn(1, 3, 4, 4)
    before, version = layer(x), layer.weight._version
    layer.weight.data.mul_(2)
    layer.bias.data.mul_(2)
    assert layer.weight._version == version
    torch.testing.assert_close(layer(x), 2 * before)


def test_state_copy_compile():
    layer = nn.GatedMaskedConv2d(3, 4, 3, "A", mask_order="horizontal", data_channels=3)
    x = torch.randn(2, 3, 4, 5)
    other = nn.GatedMaskedConv2d(3, 4, 3, "A", mask_order="horizontal", data_channels=3)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(copy.deepcopy(layer)(x), layer(x)) and torch.equal(other(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    masked = nn.MaskedConv2d(3, 4, 3, torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool())
    torch.testing.assert_close(torch.compile(masked, fullgraph=True, backend="aot_eager")(x), masked(x))
    assert "horizontal" in repr(layer) and "data_channels=3" in repr(layer) and "boolean mask" in repr(masked)


BAD = {
    r"kernel_size must be odd .* got \(2, 2\)": dict(kernel_size=2),
    "kernel_size must be an int or a pair": dict(kernel_size=(1, 3, 3)),
    "in_channels must be in .* got 0": dict(in_channels=0),
    "out_channels must be in .* got -1": dict(out_channels=-1),
    "mask_type must be .* got 'C'": dict(mask_type="C"),
    r"mask_type must be \[kh, kw\]": dict(mask_type=[[True]]),
    'gate must be "tanh_sigmoid" or "identity_sigmoid", got None': dict(gate=None),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    module = nn.GatedMaskedConv2d if "gate" in BAD[message] else nn.MaskedConv2d
    with pytest.raises(ValueError, match=message):
        module(**{"in_channels": 3, "out_channels": 4, "kernel_size": 3} | BAD[message])
