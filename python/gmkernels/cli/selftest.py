"""What `doctor` runs: every op once, on every instruction set, against its reference in plain torch.

A new op is one entry of CASES: device -> (the call, the same by the reference in float64).
"""

import contextlib
import os
import signal
import sys
import time
import warnings

import torch

from .. import _C, ops, reference

TOLERANCE = 2e-5  # of max |got - want| / max(1, max |want|), float32


def _data(device, *shape, seed=0):
    return ops.philox_normal(shape, seed=seed, stream=256, device=device)


def _philox_normal(device):
    return (
        lambda: ops.philox_normal((3, 1001), seed=7, device=device),
        lambda: reference.random.philox_normal((3, 1001), seed=7),
    )


def _philox_uniform(device):
    return (
        lambda: ops.philox_uniform((3, 1001), seed=7, device=device),
        lambda: reference.random.philox_uniform((3, 1001), seed=7),
    )


CASES = {
    "philox_normal": _philox_normal,
    "philox_uniform": _philox_uniform,
}


def names():
    """Every public op; one without an entry is reported as not tested."""
    return [name for name in ops.__all__ if callable(getattr(ops, name))]


def run(device="cpu"):
    """One result per op and instruction set: {op, device, isa, ok, error, ms, why}."""
    results = []
    before = _C.isa()
    try:
        for isa in _C.isas() if device == "cpu" else [None]:
            culprit = _survives(isa) if isa else None
            if isa:
                _C.set_isa(isa)
            for name in names():
                result = {"op": name, "device": device, "isa": isa, "ok": False, "error": None, "ms": None, "why": None}
                if culprit:
                    result["why"] = culprit
                elif name not in CASES:
                    result.update(ok=None, why="no self-test")
                else:
                    result.update(_check(name, device))
                results.append(result)
    finally:
        _C.set_isa(before)
    return results


def _check(name, device):
    try:
        ours, in_float64 = CASES[name](device)
        ours()
        started = time.perf_counter()
        got = ours().cpu()  # which waits for a GPU
        ms = (time.perf_counter() - started) * 1e3
        want = in_float64().cpu().double()
        if got.shape != want.shape:
            return {"why": f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"}
        error = ((got.double() - want).abs().max() / want.abs().max().clamp_min(1.0)).item()
    except Exception as failed:  # whatever it is, the other ops are still worth a look
        return {"why": f"{type(failed).__name__}: {failed}"}
    ok = error <= TOLERANCE  # false for NaN
    return {"ok": ok, "error": error, "ms": ms, "why": None if ok else f"error above {TOLERANCE:g}"}


def _survives(isa):
    """None, or how a child process died of this instruction set (SIGILL under some hypervisors, a hang)."""
    if not hasattr(os, "fork"):
        return None
    sys.stdout.flush()
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 of fork beside threads: the child runs alone
        child = os.fork()
    if child == 0:
        try:
            signal.alarm(10)
            torch.set_num_threads(1)  # libgomp hangs in a forked child whose parent has run a parallel region
            _C.set_isa(isa)
            for name in names():
                os.write(write, name.encode() + b"\n")
                if name in CASES:
                    with contextlib.suppress(Exception):  # the real run reports it
                        CASES[name]("cpu")[0]()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        last = (pipe.read().split() or ["start"])[-1]
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        return None
    number = os.WTERMSIG(status)
    return "it hung" if number == signal.SIGALRM else f"killed by {signal.Signals(number).name} in {last}"
