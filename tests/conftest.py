import os

import pytest
import torch

import cases
from call_ops import routes  # noqa: F401  (a fixture)
from gmkernels import _C, _call


def pytest_configure(config):
    torch.set_num_threads(2)
    # torch's compile cache on disk does not see that a backward written in Python has changed.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"


@pytest.fixture(autouse=True)
def threads_and_isa():
    """What a test may set and leave."""
    threads, isa = torch.get_num_threads(), _C.isa()
    yield
    torch.set_num_threads(threads)
    _C.set_isa(isa)


@pytest.fixture(params=["cpu", "simt", "cuda"])
def device(request):
    """Every test that takes `device` runs on the CPU kernels, on the CUDA kernels in the emulator, and on a GPU."""
    if request.param == "simt":
        try:
            from simt import backend
        except ImportError as error:
            pytest.skip(f"no emulator: {error}")
        with backend.running():
            yield cases.Device("simt")
        return
    if request.param == "cuda" and not (torch.cuda.is_available() and _C.with_cuda):
        pytest.skip("no GPU")
    yield cases.Device(request.param)


@pytest.fixture(params=_C.isas())
def isa(request):
    """Every instruction set of this machine, one after the other."""
    _C.set_isa(request.param)
    return request.param


@pytest.fixture
def kernel_calls(monkeypatch):
    """Counts kernel launches by name, so that a test can say which route was taken."""
    calls = []
    original = _call.Kernel.__call__

    def counted(self, *args):
        calls.append(self.name)
        return original(self, *args)

    monkeypatch.setattr(_call.Kernel, "__call__", counted)
    return calls


