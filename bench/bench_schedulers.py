"""The drop-in schedulers beside those of diffusers: all steps of a run, with a model that costs nothing."""

import torch

from .case import Case

OPS = ("schedulers",)

_LATENTS, _IMAGES, _TINY = (16, 3, 32, 32), (8, 3, 256, 256), (1, 4, 1, 1)
_GOALS = {  # against diffusers, by size and scheduler
    _LATENTS: {"DDPM": 10.0, "DDIM": 6.0, "DPMSolverMultistep": 12.0, "UniPCMultistep": 20.0},
    _IMAGES: {"DDPM": 20.0, "DPMSolverMultistep": 12.0},
}


def cases(quick, device):
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return
    cpu = torch.device(device).type == "cpu"
    for name in ("DDPM", "DPMSolverMultistep") if quick else _GOALS[_LATENTS]:
        yield _run(name, _LATENTS, 50, device, _GOALS[_LATENTS] if cpu else {})
    for name in ("DDIM",) if quick else ("DDPM", "DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete",
                                         "FlowMatchEulerDiscrete"):
        yield _host(name, device)
    if not quick:
        for name in ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LCM", "FlowMatchEulerDiscrete"):
            yield _run(name, _LATENTS, 4 if name == "LCM" else 50, device, {})
        for name in _GOALS[_IMAGES]:
            yield _run(name, _IMAGES, 10, device, _GOALS[_IMAGES] if cpu else {})


def _tensors(shape, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]


def _sampler(library, name, steps, x, m, seed=None, **config):
    import diffusers

    from .. import schedulers

    scheduler = getattr(schedulers if library == "ours" else diffusers, name + "Scheduler")(**config)
    scheduler.is_scale_input_called = True  # or it warns at every step

    scheduler.set_timesteps(steps, device=x.device)

    def run():
        if seed is not None:
            torch.manual_seed(seed)
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = None
        if hasattr(scheduler, "lower_order_nums"):  # no history yet, as after set_timesteps
            scheduler.lower_order_nums, scheduler.last_sample = 0, None
            scheduler.model_outputs = [None] * scheduler.config.solver_order
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(m, t, y).prev_sample
        return y

    return run


def _run(name, shape, steps, device, goals):
    x, m = _tensors(shape, device)
    ours = _sampler("ours", name, steps, x, m)

    def error():
        got, want = (_sampler("ours", name, steps, x.to(real), m.to(real), noise="philox", seed=0)().double()
                     for real in (torch.float32, torch.float64))  # fmt: skip
        return ((got - want).abs().max() / want.abs().max()).item()

    size = "[" + ",".join(map(str, shape)) + "]"
    return Case("schedulers", f"{name}Scheduler {size}, {steps} steps", ours,
                {"diffusers": _sampler("diffusers", name, steps, x, m)}, error=error,
                goals={"diffusers": goals[name]} if name in goals else {}, note="without set_timesteps")


def _host(name, device):
    x, m = _tensors(_TINY, device)
    steps = 50

    def add():
        y = x
        for _ in range(steps):
            y = torch.add(y, m)
        return y

    return Case("schedulers", f"{name}Scheduler [1,4], {steps} steps: the cost of a call",
                _sampler("ours", name, steps, x, m),
                {"diffusers": _sampler("diffusers", name, steps, x, m), "torch.add": add},
                goals={"torch.add": 0.1} if torch.device(device).type == "cpu" else {},
                note="without set_timesteps; torch.add: as many of them")
