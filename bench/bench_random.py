"""philox_normal and philox_uniform beside torch's generator, compiled torch and NumPy's Philox."""

import numpy as np
import torch

from .. import _C, ops, reference
from .case import Case

OPS = ("philox_normal", "philox_uniform")

_GOAL = {"avx512": 3.5, "avx2": 2.0}  # one thread, over torch.randn


def cases(quick, device):
    cpu = torch.device(device).type == "cpu"
    n, size = (1_000_000, "1M") if cpu else (1 << 26, "64M")
    for threads in (1, None) if cpu else (None,):
        yield _case("philox_normal", n, size, threads, device)
        if threads is None or not quick:
            yield _case("philox_uniform", n, size, threads, device)
    if not quick:
        yield _case("philox_normal", n, size, None, device, torch.bfloat16)
    yield _case("philox_normal", 4096, "4096", None, device)


def _case(op, n, size, threads, device, dtype=torch.float32):
    normal, cpu = op == "philox_normal", torch.device(device).type == "cpu"
    ours, theirs = (torch.empty(n, dtype=dtype, device=device) for _ in range(2))
    call = getattr(ops, op)
    fill = torch.randn if normal else torch.rand
    compiled = torch.compile(lambda o: o.copy_(fill(n, device=device, dtype=dtype)))
    rivals = {f"torch.{fill.__name__}": lambda: fill(n, out=theirs), "torch.compile": lambda: compiled(theirs)}
    if cpu and dtype is torch.float32:
        generator, array = np.random.Generator(np.random.Philox(0)), np.empty(n, np.float32)
        method = generator.standard_normal if normal else generator.random
        rivals["numpy Philox"] = lambda: method(out=array, dtype=np.float32)

    def error():
        """Of the first numbers only: the reference, in int64 and float64, is slow."""
        exact = getattr(reference.random, op)((min(n, 1 << 16),), seed=1)
        got = call(n, 1, device=device, dtype=dtype)[: exact.numel()].double().cpu()
        return ((got - exact).abs().max() / exact.abs().max()).item()

    goal = _GOAL.get(_C.isa()) if normal and cpu and threads == 1 else None
    return Case(
        op,
        f"{size}, out=",
        ours=lambda: call(n, 0, out=ours),
        rivals=rivals,
        dtype=str(dtype).removeprefix("torch."),
        threads=threads,
        bytes=n * ours.element_size(),
        error=error,
        goals={"torch.randn": goal} if goal else {},
    )
