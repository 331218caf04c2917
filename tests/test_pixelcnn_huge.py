"""pixelcnn_sample past 2^31 outputs: the last block in the emulator. A lost high bit of an index is out of bounds."""

import pytest
import torch

import cases
from gmkernels import _C, ops
from gmkernels.ops import pixelcnn
from pixelcnn_cases import network

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge


def test_outputs_simt():
    """Images of one pixel, which all have the same outputs: only their numbers differ."""
    levels = 512
    n = 2**31 // levels + 2**17
    weights = network(features=1, layers=1, k0=1, hidden=1, outputs=levels)
    panel = _C.pixelcnn_panel(True, 1, 1)
    sizes = (n, 1, 1, 1, levels, 1, 1, 1, levels, 1, 1, 1, *panel)
    numbers = _C.pixelcnn_memory(sizes, True)
    drawn, bad = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64)
    logits, workspace = huge.empty((n, levels), torch.float32), huge.empty((numbers[1],), torch.float32)
    u = ops.philox_uniform(n, seed=0)
    values = torch.linspace(-1, 1, levels)
    packed, biases = pixelcnn._pack_weights(weights, 1, numbers[0], *panel), pixelcnn._biases(weights)
    ins = (None, None, packed, biases, values, u, None, None, None)
    with backend.running(blocks=[-1]):
        pixelcnn._sample((drawn, logits, bad, workspace), ins, sizes, (1, 1, 0, 1), numbers, 1, 0, 1, 1.0, 0, 0)
        image, at = backend.written(drawn), backend.written(logits)
    assert at[-1] >= 2**31 and image[-1] == at[-1] // levels and len(at) == levels * len(image)
    some = image[-5:]
    want, outputs = ops.pixelcnn_sample(weights, 5, (1, 1, 1), levels=levels, uniforms=u[some].view(5, 1, 1, 1),
                                        return_logits=True)
    cases.close(logits[some], outputs.flatten(1), rtol=2e-5, atol=2e-5)
    assert torch.equal(drawn[some], want.flatten())
