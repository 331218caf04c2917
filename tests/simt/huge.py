"""Tensors of many gigabytes that take a few megabytes of memory, for kernels whose indices pass 2^31.

    x = huge.periodic((2**31 + 5, 2), torch.float16)        # 8 MB of normal numbers, over and over
    out = huge.empty((2**31 + 5, 2), torch.float16)         # memory only where it is written
    with backend.running(blocks=[-1]):                      # the last block of each launch
        op(x, out=out)
    at = backend.written(out)                               # what it has written: flat indices
"""

import ctypes
import math
import mmap
import os
import weakref

import torch

PERIOD = 4096 * 2039  # bytes; the pages are a prime number, so that an index that has lost its high bits finds others
_NORESERVE, _FIXED = 0x4000, 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
files = {}  # address -> file of a periodic tensor; backend.py maps it into the emulator's memory too


def _map(at, size, flags, file):
    address = _libc.mmap(at, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | flags, file, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"mmap of {size} bytes: {os.strerror(ctypes.get_errno())}")
    return address


def _reserve(shape, dtype):
    size = math.prod(shape) * dtype.itemsize
    address = _map(None, size, mmap.MAP_ANONYMOUS | _NORESERVE, -1)
    memory = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(memory, _free, address, size)
    return memory, torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def _free(address, size):
    _libc.munmap(address, size)
    if address in files:
        os.close(files.pop(address))


def torch_can_allocate(size):
    """An op that allocates its own output asks torch, and Linux refuses a block larger than all memory."""
    try:
        torch.empty(size, dtype=torch.uint8)
    except RuntimeError:
        return False
    return True


def empty(shape, dtype):
    """A contiguous tensor; its pages take memory when they are written."""
    return _reserve(shape, dtype)[1]


def periodic(shape, dtype, seed=0):
    """A contiguous tensor whose bytes repeat after PERIOD: normal numbers, or for int64 any."""
    count, generator = PERIOD // dtype.itemsize, torch.Generator().manual_seed(seed)
    if dtype is torch.int64:
        values = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    else:
        values = torch.randn(count, generator=generator).to(dtype)
    file = os.memfd_create("periodic")
    with open(file, "wb", closefd=False) as f:
        f.write(values.view(torch.uint8).numpy())
    memory, t = _reserve(shape, dtype)
    address, size = t.data_ptr(), ctypes.sizeof(memory)
    files[address] = file
    for at in range(0, size, PERIOD):
        _map(address + at, min(PERIOD, size - at), _FIXED, file)
    return t
