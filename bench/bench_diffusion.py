"""diffusion_step beside hand-written eager torch, its torch.compile, and the scheduler of diffusers."""

import torch

from .. import ops, reference
from ..ops import diffusion_coefficients as coefficients
from .case import Case

OPS = ("diffusion_step",)

_A, _A_NEXT, _A_BEFORE = 0.35, 0.4, 0.3  # cumulative alphas in the middle of a schedule
_TIMESTEP = 500


def cases(quick, device):
    cpu = torch.device(device).type == "cpu"
    latents, images = (16, 3, 32, 32), (8, 3, 256, 256) if cpu else (128, 3, 256, 256)
    yield _ddpm(latents, device, goals={"eager": 8.0, "torch.compile": 30.0, "diffusers": 12.0} if cpu else {})
    yield _ddim(images, device, share_goal=0.9)
    yield _tiny(device)
    yield _plan(device)
    yield _multistep(latents, device, {"eager": 7.0, "torch.compile": 4.0} if cpu else {})
    yield _multistep_loop(latents, device, {"eager": 7.0, "torch.compile": 4.0} if cpu else {})
    if not quick:
        yield _ddim_loop(latents, device, {"eager": 3.0, "torch.compile": 4.0} if cpu else {})
        yield _ddim_loop(images, device, {})
        yield _multistep_loop(images, device, {"eager": 4.0, "diffusers": 12.0} if cpu else {})
        yield _ddim(latents, device, goals={"eager": 3.0, "torch.compile": 4.0} if cpu else {})
        yield _ddpm(images, device, goals={"eager": 10.0, "diffusers": 20.0} if cpu else {})
        yield _multistep(images, device, {"eager": 4.0, "diffusers": 12.0} if cpu else {}, share_goal=0.9)
        for shape in latents, images:
            for case in _ddpm, _ddim, _multistep:
                yield case(shape, device, dtype=torch.bfloat16)
        yield _guided(images, device)
        yield _histories(images, device)
        yield _points(device)
        yield _threshold(images, device, {"diffusers": 20.0} if cpu else {})
        yield _rescale(images, device, {"diffusers": 8.0} if cpu else {})
        yield _inpainting(images, device)


def _tensors(count, shape, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]


def _row(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device)


def _name(shape):
    return "[" + ",".join(map(str, shape)) + "]"


def _scheduler(name, x, m, **config):
    """A call of its `step` at the same point of the sampler each time, or why there is none."""
    try:
        import diffusers
    except ImportError:
        return "not installed"
    scheduler = getattr(diffusers, name)(**config)
    if name == "DDPMScheduler":
        return lambda: scheduler.step(m, _TIMESTEP, x).prev_sample
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


def _error(call, tensors, row, clip=None, history=(), uncond=None, guidance=1.0, z=None):
    """`call` against the same formula in float64."""

    def error():
        x, m, u, noise, *h = (None if t is None else t.double() for t in (*tensors, uncond, z, *history, *(None,) * 3))
        bound = float("inf") if clip is None else clip
        want = reference.diffusion.diffusion_step(x, m, row.double(), u, *h[:3], None, noise, None, guidance,
                                                  -bound, bound)[0]
        return ((call().double() - want).abs().max() / want.abs().max()).item()

    return error


def _in_float32(ours, *tensors):
    """A rival for half types: the same call with float32 tensors."""
    if tensors[0].dtype is torch.float32:
        return {}
    wide = [t.float() for t in tensors]
    return {"float32": lambda: ours(*wide)}


def _kind(dtype, goals):
    return {"dtype": str(dtype).removeprefix("torch."),
            "goals": goals or ({} if dtype is torch.float32 else {"float32": 1.0})}


def _ddpm(shape, device, dtype=torch.float32, goals=None):
    x, m = _tensors(2, shape, device, dtype)
    values = coefficients.ddpm(_A, _A_NEXT)
    row = _row(values, device)
    A, B, c0, c1, *_, s = values

    def eager():
        x0 = (A * x + B * m).clamp_(-1, 1)
        return x0.mul_(c0).add_(x, alpha=c1).add_(torch.randn_like(x), alpha=s)

    def ours(x=x, m=m):
        return ops.diffusion_step(x, m, row, clip=1.0, noise=True, seed=0, step=7)

    z = ops.philox_normal(shape, 0, 7, 2, device=device)
    return Case(
        "diffusion_step", f"DDPM with noise and clip {_name(shape)}", ours,
        {"eager": eager, "torch.compile": torch.compile(eager), "diffusers": _scheduler("DDPMScheduler", x, m),
         **_in_float32(ours, x, m)},
        bytes=3 * x.numel() * x.element_size(), normals=x.numel(), error=_error(ours, (x, m), row, 1.0, z=z),
        **_kind(dtype, goals),
    )


def _ddim(shape, device, dtype=torch.float32, share_goal=0.0, goals=None):
    x, m = _tensors(2, shape, device, dtype)
    out, theirs = torch.empty_like(x), torch.empty_like(x)
    values = coefficients.ddim(_A, _A_NEXT)
    row = _row(values, device)
    A, B, c0, c1 = values[:4]
    scale, shift = c0 * A + c1, c0 * B  # without a clip the step is scale x + shift m: what a good hand would write

    def eager():
        return torch.mul(x, scale, out=theirs).add_(m, alpha=shift)

    def lines():
        x0 = A * x + B * m
        return c0 * x0 + c1 * x

    def ours(x=x, m=m, out=out):
        return ops.diffusion_step(x, m, row, out=out)

    return Case(
        "diffusion_step", f"DDIM {_name(shape)}, out=", ours,
        {"eager": lines, "eager, folded": eager, "torch.compile": torch.compile(eager),
         "diffusers": _scheduler("DDIMScheduler", x, m, clip_sample=False), **_in_float32(ours, x, m, out)},
        bytes=3 * x.numel() * x.element_size(), error=_error(ours, (x, m), row), share_goal=share_goal,
        note="eager: as the formula is written; folded: one scale and one shift, in place", **_kind(dtype, goals),
    )


def _tiny(device):
    x, m = _tensors(2, (1, 4), device)
    row = _row(coefficients.ddpm(_A, _A_NEXT), device)
    return Case(
        "diffusion_step", "DDPM [1,4]: the cost of a call",
        lambda: ops.diffusion_step(x, m, row, clip=1.0, noise=True, seed=0),
        {"torch.add": lambda: torch.add(x, m, alpha=2.0), "diffusers": _scheduler("DDPMScheduler", x, m)},
        goals={"torch.add": 1 / 3} if torch.device(device).type == "cpu" else {},
        note="checks and allocation included",
    )


def _plan(device):
    x, m = _tensors(2, (1, 4), device)
    table = _row([coefficients.ddpm(_A, _A_NEXT)] * 50, device)
    plan = ops.DiffusionPlan(table, noise=True, seed=0, clip=1.0)
    return Case(
        "diffusion_step", "DDPM [1,4], a plan: the cost of a call", lambda: plan(x, m, 25),
        {"torch.add": lambda: torch.add(x, m, alpha=2.0), "diffusers": _scheduler("DDPMScheduler", x, m)},
        goals={"torch.add": 1 / 2} if torch.device(device).type == "cpu" else {},
        note="checks and allocation included",
    )


def _multistep(shape, device, goals=None, dtype=torch.float32, share_goal=0.0):
    x, m, h = _tensors(3, shape, device, dtype)
    out, x0 = torch.empty_like(x), torch.empty_like(x)
    values = coefficients.dpmpp_2m(_A, _A_NEXT, _A_BEFORE)
    row = _row(values, device)
    A, B, c0, c1, c2 = values[:5]

    def eager():
        now = (A * x).add_(m, alpha=B)
        return (c0 * now).add_(x, alpha=c1).add_(h, alpha=c2), now

    def lines():
        now = A * x + B * m
        return c0 * now + c1 * x + c2 * h, now

    def ours(x=x, m=m, h=h, out=out, x0=x0):
        return ops.diffusion_step(x, m, row, history=(h,), out=out, x0_out=x0)

    return Case(
        "diffusion_step", f"DPM-Solver++ 2M {_name(shape)}, out=", ours,
        {"eager": lines, "eager, folded": eager, "torch.compile": torch.compile(eager),
         "diffusers": _scheduler("DPMSolverMultistepScheduler", x, m), **_in_float32(ours, x, m, h, out, x0)},
        bytes=5 * x.numel() * x.element_size(), error=_error(ours, (x, m), row, history=(h,)),
        share_goal=share_goal, note="eager: as the formula is written; folded: in place", **_kind(dtype, goals),
    )


# Loops write a step's results where its inputs were. The model predicts a velocity there: the numbers come to rest, so
# that they stay ordinary ones however often the step is repeated.


def _ddim_loop(shape, device, goals):
    x, m = _tensors(2, shape, device)
    mine, theirs, last = x.clone(), x.clone(), [x]
    values = coefficients.ddim(_A, _A_NEXT, "v_prediction")
    row = _row(values, device)
    A, B, c0, c1 = values[:4]
    scale, shift = c0 * A + c1, c0 * B

    def folded():
        return theirs.mul_(scale).add_(m, alpha=shift)

    def lines():
        x = last[0]
        x0 = A * x + B * m
        last[0] = c0 * x0 + c1 * x

    def step(x):
        return ops.diffusion_step(x, m, row, out=x)

    return Case(
        "diffusion_step", f"DDIM {_name(shape)}, in place", lambda: step(mine),
        {"eager": lines, "eager, folded": folded, "torch.compile": torch.compile(folded),
         "diffusers": _scheduler("DDIMScheduler", x, m, clip_sample=False, prediction_type="v_prediction")},
        bytes=3 * x.numel() * x.element_size(), error=_error(lambda: step(x.clone()), (x, m), row), goals=goals,
        note="out=x; eager: as the formula is written; folded: one scale and one shift, in place",
    )


def _multistep_loop(shape, device, goals):
    x, m, h = _tensors(3, shape, device)
    mine, others, theirs, last = ([t.clone() for t in (x, h, m)] for _ in range(4))
    values = coefficients.dpmpp_2m(_A, _A_NEXT, _A_BEFORE, "v_prediction")
    row = _row(values, device)
    A, B, c0, c1, c2 = values[:5]

    def folded():
        x, h, now = theirs
        torch.mul(x, A, out=now).add_(m, alpha=B)
        x.mul_(c1).add_(now, alpha=c0).add_(h, alpha=c2)
        theirs[1:] = now, h

    @torch.compile
    def compiled(x, h):
        now = A * x + B * m
        x.copy_(c0 * now + c1 * x + c2 * h)
        h.copy_(now)

    def lines():
        x, h, _ = last
        now = A * x + B * m
        last[:2] = c0 * now + c1 * x + c2 * h, now

    def step(x, h):
        return ops.diffusion_step(x, m, row, history=(h,), out=x, x0_out=h)

    return Case(
        "diffusion_step", f"DPM-Solver++ 2M {_name(shape)}, in place", lambda: step(*mine[:2]),
        {"eager": lines, "eager, folded": folded, "torch.compile": lambda: compiled(*others[:2]),
         "diffusers": _scheduler("DPMSolverMultistepScheduler", x, m, prediction_type="v_prediction")},
        bytes=5 * x.numel() * x.element_size(), goals=goals,
        error=_error(lambda: step(x.clone(), h.clone()), (x, m), row, history=(h,)),
        note="out=x, x0_out=h; eager: as the formula is written; folded: in place",
    )


def _histories(shape, device):
    """All that is read without noise: guidance and three old results, with x0 written."""
    x, m, u, *old = _tensors(6, shape, device)
    out, x0, theirs = (torch.empty_like(x) for _ in range(3))
    values = *coefficients.dpmpp_2m(_A, _A_NEXT, _A_BEFORE)[:5], 0.2, -0.1, 0.0
    row = _row(values, device)
    A, B, c0, c1, *more = values[:7]
    guidance = 3.0

    def eager():
        now = torch.mul(x, A, out=theirs).add_(torch.lerp(u, m, guidance), alpha=B)
        result = (c0 * now).add_(x, alpha=c1)
        for h, c in zip(old, more, strict=True):
            result.add_(h, alpha=c)
        return result, now

    def ours():
        return ops.diffusion_step(x, m, row, uncond=u, guidance_scale=guidance, history=old, out=out, x0_out=x0)

    return Case(
        "diffusion_step", f"guidance and a history of three {_name(shape)}, out=", ours,
        {"eager, folded": eager, "torch.compile": torch.compile(eager)},
        bytes=8 * x.numel() * x.element_size(), share_goal=0.9,
        error=_error(ours, (x, m), row, history=old, uncond=u, guidance=guidance),
    )


def _guided(shape, device):
    x, m, u = _tensors(3, shape, device)
    out, theirs = torch.empty_like(x), torch.empty_like(x)
    values = coefficients.ddim(_A, _A_NEXT)
    row = _row(values, device)
    A, B, c0, c1 = values[:4]
    scale, shift, guidance = c0 * A + c1, c0 * B, 3.0

    def eager():
        return torch.mul(x, scale, out=theirs).add_(torch.lerp(u, m, guidance), alpha=shift)

    def ours():
        return ops.diffusion_step(x, m, row, uncond=u, guidance_scale=guidance, out=out)

    return Case(
        "diffusion_step", f"DDIM with guidance {_name(shape)}, out=", ours,
        {"eager": eager, "torch.compile": torch.compile(eager)},
        bytes=4 * x.numel() * x.element_size(), error=_error(ours, (x, m), row, uncond=u, guidance=guidance),
        share_goal=0.9,
    )


def _points(device):
    """Two-dimensional data, each point at its own time: a row of coefficients for every two numbers."""
    shape = (65536, 2)
    x, m = _tensors(2, shape, device)
    out, theirs = torch.empty_like(x), torch.empty_like(x)
    times = torch.linspace(0.1, 0.8, shape[0]).tolist()
    rows = _row([coefficients.ddim(a, a + 0.1) for a in times], device)
    A, B, c0, c1 = rows.unsqueeze(-1).unbind(1)[:4]
    scale, shift = c0 * A + c1, c0 * B

    def eager():
        return torch.addcmul(torch.mul(x, scale, out=theirs), m, shift, out=theirs)

    def ours():
        return ops.diffusion_step(x, m, rows, out=out)

    return Case(
        "diffusion_step", f"DDIM {_name(shape)}, coefficients per sample", ours,
        {"eager": eager, "torch.compile": torch.compile(eager)},
        bytes=3 * x.numel() * x.element_size() + rows.numel() * 4, error=_error(ours, (x, m), rows),
    )


def _threshold(shape, device, goals):
    """DDIM with the quantile of every sample."""
    x, m = _tensors(2, shape, device)
    values = coefficients.ddim(_A, _A_NEXT)
    row = _row(values, device)
    A, B, c0, c1 = values[:4]
    q, largest = 0.995, 100.0

    def eager():
        x0 = (A * x).add_(m, alpha=B)
        s = torch.quantile(x0.abs().flatten(1), q, dim=1).clamp_(1, largest).reshape(-1, *(1,) * (x.dim() - 1))
        x0 = torch.clamp(x0, -s, s).div_(s)
        return x0.mul_(c0).add_(x, alpha=c1)

    def ours():
        return ops.diffusion_step(x, m, row, dynamic_threshold=(q, largest))

    def error():
        a, b = x.double(), m.double()
        s = torch.quantile((A * a + B * b).abs().flatten(1), q, dim=1).clamp(1, largest).reshape(-1, 1, 1, 1)
        want = c0 * torch.clamp(A * a + B * b, -s, s) / s + c1 * a
        return ((ours().double() - want).abs().max() / want.abs().max()).item()

    return Case(
        "diffusion_step", f"DDIM with dynamic threshold {_name(shape)}", ours,
        {"eager": eager, "torch.compile": torch.compile(eager),
         "diffusers": _scheduler("DDIMScheduler", x, m, clip_sample=False, thresholding=True,
                                 sample_max_value=largest)},
        bytes=5 * x.numel() * x.element_size(), error=error, goals=goals, note="x and m are read twice",
    )


def _rescale(shape, device, goals):
    """DDIM with guidance, rescaled by the ratio of two standard deviations of every sample."""
    x, m, u = _tensors(3, shape, device)
    values = coefficients.ddim(_A, _A_NEXT)
    row = _row(values, device)
    A, B, c0, c1 = values[:4]
    guidance, phi = 7.5, 0.7
    step = _scheduler("DDIMScheduler", x, m, clip_sample=False)
    axes = tuple(range(1, x.dim()))

    def guided(m, u):
        g = u + guidance * (m - u)
        rescaled = g * (m.std(dim=axes, keepdim=True) / g.std(dim=axes, keepdim=True))
        return phi * rescaled + (1 - phi) * g

    def eager():
        return torch.mul(x, c0 * A + c1).add_(guided(m, u), alpha=c0 * B)

    def diffusers():
        guided(m, u)  # the lines of its pipelines; the scheduler's step costs the same for any output
        return step()

    def ours():
        return ops.diffusion_step(x, m, row, uncond=u, guidance_scale=guidance, guidance_rescale=phi)

    def error():
        a = x.double()
        want = (c0 * A + c1) * a + c0 * B * guided(m.double(), u.double())
        return ((ours().double() - want).abs().max() / want.abs().max()).item()

    return Case(
        "diffusion_step", f"DDIM with guidance rescale {_name(shape)}", ours,
        {"eager": eager, "torch.compile": torch.compile(eager),
         "diffusers": step if isinstance(step, str) else diffusers},
        bytes=6 * x.numel() * x.element_size(), error=error, goals=goals, note="model_output and uncond are read twice",
    )


def _inpainting(shape, device):
    """DDPM, and the known half of each image at the noise level of the next step."""
    x, m, known = _tensors(3, shape, device)
    mask = torch.zeros_like(x)
    mask[..., : shape[-1] // 2] = 1
    values = coefficients.ddpm(_A, _A_NEXT)
    row = _row(values, device)
    A, B, c0, c1, *_, s = values
    scale = _A_NEXT**0.5, (1 - _A_NEXT) ** 0.5

    def eager():
        x0 = (A * x + B * m).clamp_(-1, 1)
        y = x0.mul_(c0).add_(x, alpha=c1).add_(torch.randn_like(x), alpha=s)
        return mask * (scale[0] * known + scale[1] * torch.randn_like(x)) + (1 - mask) * y

    def ours():
        return ops.diffusion_step(x, m, row, clip=1.0, noise=True, seed=0, mask=mask, known=known, known_scale=scale)

    def error():
        wide = [t.double() for t in (x, m, row)]
        want = reference.diffusion.diffusion_step(*wide, noise=True, low=-1.0, high=1.0, mask=mask.double(),
                                                  known=known.double(), known_signal=scale[0], known_noise=scale[1])[0]
        return ((ours().double() - want).abs().max() / want.abs().max()).item()

    return Case(
        "diffusion_step", f"DDPM, half of it known {_name(shape)}", ours,
        {"eager": eager, "torch.compile": torch.compile(eager)},
        bytes=5 * x.numel() * x.element_size(), normals=2 * x.numel(), error=error,
    )
