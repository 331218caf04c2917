"""pixelcnn_sample in the emulator: slices of several images, sums in parts, scratch in the workspace, a small GPU."""

import pytest
import torch

import cases
from gmkernels import ops
from pixelcnn_cases import network, uniforms

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
SAMPLE = ops.pixelcnn_sample


def both(weights, n, shape, levels, u, blocks=(), **options):
    """(levels, outputs) in the emulator, and on the CPU."""
    options = {"levels": levels, "uniforms": u, "return_logits": True, **options}
    with backend.running(blocks=blocks):
        got = SAMPLE(weights, n, shape, **options)
    return got, SAMPLE(weights, n, shape, **options)


@pytest.mark.parametrize("features", [4, 5])  # inputs four at a time, one at a time
def test_a_block_of_six_images(features):
    n, images = 132 * 5 + 1, 6
    weights, u = network(features=features, layers=2, hidden=features, outputs=3), uniforms(n, 1, 1, 2)
    (got, logits), (want, outputs) = both(weights, n, (1, 1, 2), 3, u, blocks=[0])
    assert torch.equal(got[:images], want[:images])
    cases.close(logits[:images], outputs[:images], rtol=2e-5, atol=2e-5)


def test_sums_in_parts():
    """Long sums of few outputs; the same for an image alone and among others."""
    weights, u = network(features=36, layers=2, k=5, hidden=70, outputs=3), uniforms(1, 1, 1, 2)
    (got, logits), (want, outputs) = both(weights, 1, (1, 1, 2), 3, u)
    assert torch.equal(got, want)
    cases.close(logits, outputs, rtol=2e-5, atol=2e-5)
    n = 132 * 2
    with backend.running(blocks=[0]):
        again = SAMPLE(weights, n, (1, 1, 2), levels=3, uniforms=u.expand(n, -1, -1, -1), return_logits=True)
    for alone, among in zip((got, logits), again, strict=True):
        assert torch.equal(among[:2], alone.expand(2, -1, -1, -1))


def test_scratch_that_shared_memory_cannot_hold():
    levels = 16_000
    weights, u = network(features=2, layers=1, k0=1, hidden=2, outputs=levels), uniforms(2, 1, 1, 1)
    (got, logits), (want, outputs) = both(weights, 2, (1, 1, 1), levels, u)
    assert (got - want).abs().max() <= 1  # of so many, a number may be that near to a boundary
    cases.close(logits, outputs, rtol=2e-5, atol=2e-5)


def test_more_images_than_blocks():
    weights, u = network(features=2, layers=1, hidden=2, outputs=2), uniforms(3, 1, 1, 2)
    simt = cases.Device("simt")
    with backend.running(), cases.few_blocks(simt):
        got = SAMPLE(weights, 3, (1, 1, 2), levels=2, uniforms=u)
    assert torch.equal(got, SAMPLE(weights, 3, (1, 1, 2), levels=2, uniforms=u))


@pytest.mark.parametrize("c, outputs", [(1, 6), (3, 20)])
def test_the_mixture_in_a_slice(c, outputs):
    n, images = 132 * 2, 2
    weights = network(c, features=4, layers=1, hidden=4, outputs=outputs, scale=0.6)
    (got, _), (want, _) = both(weights, n, (c, 1, 2), 4, None, blocks=[0], head="logistic_mixture", num_mixtures=2,
                               seed=torch.arange(n))
    assert torch.equal(got[:images], want[:images])
