"""What every family's tests share: devices, dtypes, shapes, tolerances, comparison with float64."""

import contextlib
from dataclasses import dataclass

import pytest
import torch

from gmkernels import _call

rehearsal = False  # gpu/rehearse.py: the device "cuda" is the CPU, with the kernels of the CPU

FLOATS = (torch.float32, torch.float64)
ALL_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 127)  # around SIMD words and warps, and primes

# rtol, atol for results that take a handful of roundings; an op with a longer sum states its own bound.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1.3e-6, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float16: (1e-3, 1e-5),
}


@dataclass(frozen=True)
class Device:
    """Where a test runs. On "simt", CPU tensors go to the CUDA kernels in the emulator: keep them small."""

    name: str  # "cpu", "simt", "cuda"

    @property
    def torch(self):
        return "cuda" if self.name == "cuda" else "cpu"

    @property
    def simt(self):
        return self.name == "simt"


@contextlib.contextmanager
def cpu_kernels():
    """The kernels of the CPU, in a test on "simt" too: there every call is a call of the emulator otherwise."""
    before = _call.Kernel.backend
    _call.Kernel.backend = None
    try:
        yield
    finally:
        _call.Kernel.backend = before


@contextlib.contextmanager
def old_gpu(device):
    """The emulator as a GPU without the tensor cores of sm_80 (sm_75)."""
    if not device.simt:
        pytest.skip("the emulator can be told to be one")
    from simt import backend

    backend.module().has_mma(False)
    try:
        yield
    finally:
        backend.module().has_mma(True)


@contextlib.contextmanager
def few_blocks(device, count=2):
    """A GPU so small that a block has more than one turn, in kernels that stride over the grid: the emulator."""
    if not device.simt:
        pytest.skip("the emulator can be told to be one")
    from simt import backend

    backend.module().most_blocks(count)
    try:
        yield
    finally:
        backend.module().most_blocks(0)


def data(*shape, dtype=torch.float64, device="cpu", seed=0, grad=False):
    """Normal numbers, the same for every dtype and device."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(device=device, dtype=dtype).requires_grad_(grad)


def close(got, want, dtype=None, rtol=None, atol=None):
    """`got` is near `want` (float64), at the written tolerance of got's dtype."""
    default = TOLERANCE[dtype or got.dtype]
    torch.testing.assert_close(
        got.detach().cpu().double(), want.detach().cpu().double(), equal_nan=True,
        rtol=default[0] if rtol is None else rtol, atol=default[1] if atol is None else atol,
    )
