"""The emulator itself: that its numbers are right, and that it reports bugs which were planted in small kernels."""

import pytest
import torch

from gmkernels import ops

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 127, 1023, 1025])
def test_philox_has_the_bits_of_the_cpu(size, dtype):
    for op in (ops.philox_normal, ops.philox_uniform):
        want = op(size, seed=7, step=3, dtype=dtype)
        with backend.running():
            got = op(size, seed=7, step=3, dtype=dtype)
        assert torch.equal(got, want)


def test_philox_seeds_per_sample():
    seeds = torch.tensor([5, -1, 2**62])
    want = ops.philox_normal((3, 7), seed=seeds)
    with backend.running():
        assert torch.equal(ops.philox_normal((3, 7), seed=seeds), want)
