"""What a case could at best take on this machine: the time of its bytes, flops, exponentials or normals alone.

Each ceiling is a callable that takes part in the rounds of the case, with its threads, so it has the same weather.
"""

import math
from dataclasses import dataclass

import torch

from .. import ops

_MM = {"cpu": 768, "cuda": 8192}  # large enough for the peak, small enough not to eat the round
_RATE_SIZE = {"cpu": 1 << 18, "cuda": 1 << 26}


@dataclass
class Ceiling:
    call: object
    scale: float  # seconds of `call` times this = the floor under the case
    unit: str  # of the rate
    amount: float  # of units in one `call`


def ceilings(case, device):
    """name -> Ceiling, for every resource that the case says it needs."""
    device, dtype = torch.device(device), _dtype(case.dtype)
    found = {}
    if case.bytes:
        # copy_ of the same total bytes: half read, half written, in memory that is there already
        source = torch.ones(max(1, round(case.bytes / 2 / 4)), dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        moved = 2 * 4 * source.numel()
        found["copy_"] = Ceiling(lambda: target.copy_(source), case.bytes / moved, "B/s", moved)
    if case.flops:
        size = _MM[device.type]
        a, b, c = (torch.full((size, size), 0.5, dtype=dtype, device=device) for _ in range(3))
        amount = 2.0 * size**3
        found["mm"] = Ceiling(lambda: torch.mm(a, b, out=c), case.flops / amount, "FLOP/s", amount)
    size = _RATE_SIZE[device.type]
    if case.exps:
        x = torch.linspace(-8, 0, size, dtype=dtype, device=device)
        y = torch.empty_like(x)
        found["exp"] = Ceiling(lambda: torch.exp(x, out=y), case.exps / size, "exp/s", size)
    if case.normals:
        z = torch.empty(size, device=device)
        found["normals"] = Ceiling(lambda: ops.philox_normal(size, 0, out=z), case.normals / size, "normals/s", size)
    return found


def _dtype(name):
    dtype = getattr(torch, name.split(",")[0].split()[0].removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def binding(found, medians):
    """The ceiling with the longest floor, by medians (name -> seconds): the one that bounds the case; None without."""
    floors = {name: c.scale * medians[name] for name, c in found.items() if name in medians}
    floors = {name: floor for name, floor in floors.items() if math.isfinite(floor) and floor > 0}
    return max(floors, key=floors.get) if floors else None
