"""What rows of diffusion_step share: their data, the scheduler beside them, their error."""

import torch

from .. import reference

ALPHA, ALPHA_NEXT, ALPHA_BEFORE = 0.35, 0.4, 0.3  # cumulative alphas in the middle of a schedule
TIMESTEP = 500


def tensors(count, shape, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]


def row(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device)


def name(shape):
    return "[" + ",".join(map(str, shape)) + "]"


def scheduler(name, x, m, **config):
    """A call of its `step` at the same point of the sampler each time, or why there is none."""
    try:
        import diffusers
    except ImportError:
        return "not installed"
    scheduler = getattr(diffusers, name)(**config)
    if name == "DDPMScheduler":
        return lambda: scheduler.step(m, TIMESTEP, x).prev_sample
    scheduler.set_timesteps(50, device=x.device)
    timesteps = scheduler.timesteps
    t = timesteps[25]
    if name != "DPMSolverMultistepScheduler":
        return lambda: scheduler.step(m, t, x).prev_sample
    for i in range(24, 26):  # fill its history, then stay at one index
        scheduler._step_index = i
        scheduler.step(m, timesteps[i], x)

    def step():
        scheduler._step_index = 25
        return scheduler.step(m, t, x).prev_sample

    return step


def error(call, tensors, row, clip=None, history=(), uncond=None, guidance=1.0, z=None):
    """`call` against the same formula in float64."""

    def error():
        x, m, u, noise, *h = (None if t is None else t.double() for t in (*tensors, uncond, z, *history, *(None,) * 3))
        bound = float("inf") if clip is None else clip
        want = reference.diffusion.diffusion_step(x, m, row.double(), u, *h[:3], None, noise, None, guidance,
                                                  -bound, bound)[0]
        return ((call().double() - want).abs().max() / want.abs().max()).item()

    return error
