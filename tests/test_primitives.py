"""cuda/prims.cuh on a GPU does what it does in the emulator: the kernels of tests/simt/bugs.cu, without their bugs.

Needs GMK_PRIMITIVES, the library that tests/gpu/check.py builds, and a GPU.
"""

import ctypes
import os

import pytest
import torch

from test_simt import BUGS, backend, fragments, run

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and os.environ.get("GMK_PRIMITIVES")),
                                reason="no GPU, or no library of tests/gpu/check.py")


def on_gpu(name, x, count, variant=False):
    library = ctypes.CDLL(os.environ["GMK_PRIMITIVES"])
    library.gmk_primitive.restype = ctypes.c_char_p
    library.gmk_primitive.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_char_p, ctypes.c_bool]
    x, state = x.cuda(), torch.zeros(1, dtype=torch.int32, device="cuda")
    out = torch.full((count if name.startswith(("mma", "votes")) else 2 * count,), -1.0, device="cuda")
    torch.cuda.synchronize()
    n = 128 if name.startswith(("mma", "votes")) else count
    error = library.gmk_primitive(out.data_ptr(), state.data_ptr(), x.data_ptr(), n, name.encode(), variant)
    assert error is None, error.decode()
    return out.cpu()


@pytest.mark.parametrize("name", BUGS)
def test_same_as_in_the_emulator(name):
    n = BUGS[name][2]
    want, reports = run(name, False, n)
    assert not reports
    x = torch.arange(max(n, 256), dtype=torch.float32)
    got = on_gpu(name, x, n)
    assert torch.equal(got[: 2 * n : 2] if name == "write_between" else got[:n], want)


@pytest.mark.parametrize("by_shuffles", [False, True])
@pytest.mark.parametrize("name", ["mma_bf16", "mma_f16", "mma_tf32"])
def test_mma_same_as_in_the_emulator(name, by_shuffles):
    depth = 8 if name == "mma_tf32" else 16
    generator = torch.Generator().manual_seed(0)
    dtype = {"mma_bf16": torch.bfloat16, "mma_f16": torch.float16, "mma_tf32": torch.float32}[name]
    # small integers: exact in every format and in every order of the sum
    a, b, c = (torch.randint(-8, 9, s, generator=generator).float() for s in ((16, depth), (depth, 8), (16, 8)))
    x, want = fragments(a.to(dtype), b.to(dtype), c).flatten(), torch.empty(128)
    with backend.running():
        backend._call.Kernel.backend("bug", (want, None), (x, None), (0, 128, name, by_shuffles))
    assert torch.equal(on_gpu(name, x, 128, by_shuffles), want)


def test_votes_and_shuffles_same_as_in_the_emulator():
    want, reports = run("votes", False, 13)
    assert not reports
    assert torch.equal(on_gpu("votes", torch.zeros(256), 13)[:13], want)
