"""Fixtures for the tests of ops that have no CUDA kernel yet: imported, they take the place of conftest's."""

import pytest
import torch

import cases


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Not "simt": a GPU runs the reference, and the emulator has nothing to run."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return cases.Device(request.param)


@pytest.fixture(autouse=True)
def same_threads():
    """As many threads after a test as before it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
