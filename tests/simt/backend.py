"""Runs CUDA kernels in the emulator: builds the module `_simt`, and gives each call buffers of exact size.

    with backend.running():            # every Kernel call now runs csrc/**/*.cu, thread by thread
        ops.philox_normal((3, 5), seed=0)

A call that the emulator finds fault with raises `Reported`, an AssertionError that lists every report.
"""

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from gmkernels import _call

from . import SCHEDULES, huge

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "simt"
KINDS = ("ascending", "descending", "random", "preempt")  # of schedules, as scheduler.cpp numbers them
LARGE = 64 << 20  # bytes of an output that is not copied as a whole, where only some blocks run
WRAPPERS = ("prims.cuh", "cuda_language.h", "simt.h")  # a report names the line that called these


def _tool(name):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise ImportError(f"{name} is not installed")
    return found


if platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"):
    raise ImportError(f"the emulator needs Linux on x86-64, this is {sys.platform} on {platform.machine()}")
if importlib.util.find_spec("pybind11") is None:
    raise ImportError("pybind11 is not installed")
_CMAKE, _NINJA, _CXX, _ADDR2LINE = (_tool(name) for name in ("cmake", "ninja", "g++", "addr2line"))


# building ------------------------------------------------------------------------------------------------------------


@functools.cache
def module():
    """The module `_simt`, built if anything changed. A file lock lets parallel test processes share one build."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (BUILD / "build.ninja").exists():
            import pybind11

            _command(_CMAKE, "-S", HERE, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_NINJA}",
                     f"-DCMAKE_CXX_COMPILER={_CXX}", f"-DPython_EXECUTABLE={sys.executable}",
                     f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        _command(_NINJA, "-C", BUILD)
    path = next(BUILD.glob("_simt.*.so"))
    spec = importlib.util.spec_from_file_location("_simt", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _command(*arguments):
    done = subprocess.run([str(a) for a in arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"building the emulator failed: {' '.join(map(str, arguments))}\n{done.stdout}")


# reports -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """One thing that is wrong. `places`: the line of the access and, for a race, that of the access it collides with;
    each is the chain of inlined calls, innermost first."""

    kind: str
    message: str
    kernel: str = ""
    block: tuple = ()
    thread: tuple = ()
    places: tuple = ()
    count: int = 1

    def __str__(self):
        lines = [f"{self.kind}: {self.message}"]
        for word, place in zip(("at", "other access at"), self.places, strict=False):
            lines.append(f"    {word} {_describe(place)}")
        if self.kernel:
            who = f"    in {self.kernel}, block {self.block}, thread {self.thread}"
            lines.append(who + (f"; {self.count} times" if self.count > 1 else ""))
        return "\n".join(lines)


class Reported(AssertionError):
    """The emulator found bugs in a kernel. `reports` lists them."""

    def __init__(self, name, schedule, reports):
        self.reports = reports
        text = "\n".join(map(str, reports))
        super().__init__(f"{len(reports)} report(s) for {name}_cuda in the emulator, schedule {schedule}:\n{text}")


def _describe(place):
    lines = [line for line in place if "/simt/simt.h:" not in line]  # the emulator's own call of the kernel
    at = next((i for i, line in enumerate(lines) if line.split(":")[0].rsplit("/")[-1] not in WRAPPERS), 0)
    text = lines[at] + (f" (in {lines[at - 1]})" if at and "prims.cuh" in lines[at - 1] else "")
    return text + "".join(f", from {line}" for line in lines[at + 1 : at + 4])


def _resolve(offsets):
    """Offsets in the module -> tuples of "file:line", the innermost inlined function first; all in one addr2line."""
    offsets = sorted(set(offsets))
    if not offsets:
        return {}
    command = [_ADDR2LINE, "-a", "-i", "-e", module().__file__, *map(hex, offsets)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    places, place = {}, None
    for line in done.stdout.splitlines():
        if line.startswith("0x"):
            place = places[int(line, 16)] = []
        else:
            file, _, number = line.partition(" (discriminator")[0].rpartition(":")
            place.append(f"{os.path.relpath(file, ROOT) if file.startswith('/') else file}:{number}")
    return {offset: tuple(place) for offset, place in places.items()}


def _reports(simt):
    raw = simt.reports()
    places = _resolve([pc for report in raw for pc in report[5]])
    for kind, kernel, block, thread, message, pcs, count in raw:
        at = tuple(places[pc] for pc in pcs)
        if kind == "barrier-divergence" and at[0] == at[1]:
            continue  # the compiler made two copies of one barrier
        yield Report(kind, message, kernel.strip("()"), block, thread, at, count)


# calls ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Buffer:
    """Device memory for tensors whose memory overlaps: [low, high) of the host and where it is in the emulator."""

    low: int
    high: int
    tensors: list  # (name, tensor, is_output)
    address: int = 0

    def mask(self, outputs):
        """A byte tensor over the buffer: 1 where an element of an output (or of an input) is."""
        mask = torch.zeros(self.high - self.low, dtype=torch.uint8)
        for _, t, is_output in self.tensors:
            if is_output == outputs:
                _bytes(mask, self, t).fill_(1)
        return mask


def _span(t):
    """Bytes from the first to past the last element."""
    return (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()


def _bytes(mask, buffer, t):
    """The bytes of t's elements, as a view [*t.shape, element_size] of a byte tensor over its buffer."""
    size = t.element_size()
    return mask.as_strided((*t.shape, size), (*(s * size for s in t.stride()), 1), t.data_ptr() - buffer.low)


def _buffers(outs, ins):
    named = [(f"out[{i}]", t, True) for i, t in enumerate(outs)] + [(f"in[{i}]", t, False) for i, t in enumerate(ins)]
    named = [item for item in named if item[1] is not None and item[1].numel()]
    items = [(item[1].data_ptr(), item[1].data_ptr() + _span(item[1]), item) for item in named]
    buffers = []
    for low, high, item in sorted(items, key=lambda i: i[:2]):
        if buffers and low < buffers[-1].high:
            buffers[-1].high = max(buffers[-1].high, high)
            buffers[-1].tensors.append(item)
        else:
            buffers.append(_Buffer(low, high, [item]))
    return buffers


def _copy_in(simt, buffer):
    tensors = buffer.tensors
    first = tensors[0][1]
    # A GPU's allocator aligns storages to 512 bytes: the tensor is as well aligned as its offset in its storage.
    phase = (buffer.low - first.untyped_storage().data_ptr()) % 256
    name = " = ".join(f"{n} {str(t.dtype)[6:]}{list(t.shape)}" for n, t, _ in tensors)
    size, writes = buffer.high - buffer.low, any(is_output for _, _, is_output in tensors)
    buffer.address = simt.allocate(size, phase, name, not writes)
    reads = [t for _, t, is_output in tensors if not is_output]
    if not reads:
        return
    if not writes and buffer.low in huge.files:
        simt.map_file(buffer.address, huge.files[buffer.low], huge.PERIOD)
        return simt.define(buffer.address, 0)
    readable = buffer.mask(outputs=False)
    if writes or not bool(readable.all()):
        data = torch.full((size,), 255, dtype=torch.uint8)
        host = torch.frombuffer((ctypes.c_uint8 * size).from_address(buffer.low), dtype=torch.uint8)
        torch.where(readable.bool(), host, data, out=data)
        ctypes.memmove(buffer.address, data.data_ptr(), size)
        simt.define(buffer.address, readable.data_ptr())
    else:
        ctypes.memmove(buffer.address, buffer.low, size)
        simt.define(buffer.address, 0)


def _copy_out(simt, buffer, complete, scratch):
    """The bytes that the kernel wrote, back to the tensors; yields reports of elements it should have written.
    `scratch`: names of outputs that are workspace."""
    size = buffer.high - buffer.low
    if size > LARGE and not complete:
        simt.copy_written(buffer.address, buffer.low)
        return
    written = torch.empty(size, dtype=torch.uint8)
    simt.written(buffer.address, written.data_ptr())
    host = torch.frombuffer((ctypes.c_uint8 * size).from_address(buffer.low), dtype=torch.uint8)
    device = torch.frombuffer((ctypes.c_uint8 * size).from_address(buffer.address), dtype=torch.uint8)
    expected = buffer.mask(outputs=True)
    inside = (written & expected).bool()
    host[inside] = device[inside]
    if not complete:
        return
    outside = (written & ~expected & 1).nonzero()
    if len(outside):
        yield Report("write-between", f"bytes between the elements of {_name(buffer)} were written, the first at byte "
                                      f"{int(outside[0])}")
    for name, t, is_output in buffer.tensors:
        if is_output and name not in scratch:
            missing = (_bytes(written, buffer, t) == 0).any(-1).nonzero()
            if len(missing):
                what = f"{name} {str(t.dtype)[6:]}{list(t.shape)}"
                text = f"{len(missing)} of {t.numel()} elements of {what} were never written, the first at "
                yield Report("unwritten-output", text + str(missing[0].tolist()))


def _name(buffer):
    return " = ".join(n for n, _, is_output in buffer.tensors if is_output)


_lock = threading.Lock()  # one machine; a call from another thread waits
_written = {}  # address of an output of the last call -> [first, past the last) bytes


def written(t):
    """The elements of `t`, a contiguous output of the last call, that the kernel has written: flat indices."""
    ranges = torch.tensor(_written[t.data_ptr()], dtype=torch.int64).reshape(-1, 2) // t.element_size()
    count = ranges[:, 1] - ranges[:, 0]
    before = torch.cat([count.new_zeros(1), count.cumsum(0)[:-1]])
    return torch.arange(int(count.sum())) + (ranges[:, 0] - before).repeat_interleave(count)


def _run(options, name, outs, ins, scalars):
    """One call of `_simt.<name>_cuda` on copies of the tensors."""
    simt = module()
    with _lock, torch.no_grad():
        simt.reset()
        schedule, check, blocks = options
        kind, _, seed = schedule.partition(":")
        simt.configure(KINDS.index(kind), int(seed or 0), check, blocks)
        try:
            buffers = _buffers(outs, ins)
            for buffer in buffers:
                _copy_in(simt, buffer)
            addresses = []
            for t in (*outs, *ins):
                if t is None or not t.numel():
                    addresses.append(0 if t is None else simt.allocate(0, 0, "an empty tensor", True))
                    continue
                buffer = next(b for b in buffers if b.low <= t.data_ptr() < b.high)
                addresses.append(buffer.address + t.data_ptr() - buffer.low)
            getattr(simt, name + "_cuda")(*addresses, *scalars, 0, 0)
            complete = check and not blocks and not simt.aborted()
            reports = []
            count = _call.Kernel.scratch.get(name, 0)
            scratch = [f"out[{i}]" for i in range(len(outs) - count, len(outs))]
            _written.clear()
            for buffer in buffers:
                if any(is_output for _, _, is_output in buffer.tensors):
                    if blocks:
                        _written[buffer.low] = simt.written_ranges(buffer.address)
                    reports.extend(_copy_out(simt, buffer, complete, scratch))
            reports = [*_reports(simt), *reports]
        finally:
            simt.reset()
    if reports:
        raise Reported(name, schedule, reports)


@contextlib.contextmanager
def running(schedule=None, check=True, blocks=()):
    """Kernel calls run in the emulator until the end of the scope.

    schedule: "ascending", "descending", "random", "preempt" (random, and threads are interrupted between accesses), the
    last two with a seed if you like, "random:7"; None: the environment's GMK_SIMT_SCHEDULE, or ascending.
    blocks: run only the blocks with these linear indices, -1 the last of each launch, for tensors too large to run
    whole (huge.py); `written` says what they wrote. Nothing is said then of elements that nobody has written, nor of
    reading them where a block of an earlier launch may have done it.
    """
    simt = module()
    schedule = schedule or os.environ.get("GMK_SIMT_SCHEDULE") or SCHEDULES[0]
    if not re.fullmatch(rf"({'|'.join(KINDS)})(:\d+)?", schedule):
        raise ValueError(f"schedule must be one of {', '.join(KINDS)}, or such a name with a seed, as random:7; "
                         f"got {schedule!r}")
    before = _call.Kernel.backend
    _call.Kernel.backend = functools.partial(_run, (schedule, check, list(blocks)))
    try:
        yield simt
    finally:
        _call.Kernel.backend = before
