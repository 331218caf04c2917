"""diffusion_step beside hand-written eager torch, its torch.compile, and the scheduler of diffusers."""

import torch

from .. import ops
from ..ops import diffusion_coefficients as coefficients
from . import diffusion_options
from . import diffusion_rows as common
from .case import Case

OPS = ("diffusion_step",)


def cases(quick, device):
    cpu = torch.device(device).type == "cpu"
    latents, images = (16, 3, 32, 32), (8, 3, 256, 256) if cpu else (128, 3, 256, 256)
    yield _ddpm(latents, device, goals={"eager": 8.0, "torch.compile": 30.0, "diffusers": 12.0} if cpu else {})
    yield _ddim(images, device, share_goal=0.9)
    yield _tiny(device)
    yield _plan(device)
    yield _multistep(latents, device, {"eager": 7.0, "torch.compile": 4.0} if cpu else {})
    if not quick:
        yield _multistep_loop(latents, device, {"eager": 7.0, "torch.compile": 4.0} if cpu else {})
        yield _ddim_loop(latents, device, {"eager": 3.0, "torch.compile": 4.0} if cpu else {})
        yield _ddim_loop(images, device, {})
        yield _multistep_loop(images, device, {"eager": 4.0, "diffusers": 12.0} if cpu else {})
        yield _ddim(latents, device, goals={"eager": 3.0, "torch.compile": 4.0} if cpu else {})
        yield _ddpm(images, device, goals={"eager": 10.0, "diffusers": 20.0} if cpu else {})
        yield _multistep(images, device, {"eager": 4.0, "diffusers": 12.0} if cpu else {}, share_goal=0.9)
        for shape in latents, images:
            for case in _ddpm, _ddim, _multistep:
                yield case(shape, device, dtype=torch.bfloat16)
        yield from diffusion_options.cases(images, device)


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
    x, m = common.tensors(2, shape, device, dtype)
    values = coefficients.ddpm(common.ALPHA, common.ALPHA_NEXT)
    row = common.row(values, device)
    A, B, c0, c1, *_, s = values

    def eager():
        x0 = (A * x + B * m).clamp_(-1, 1)
        return x0.mul_(c0).add_(x, alpha=c1).add_(torch.randn_like(x), alpha=s)

    def ours(x=x, m=m):
        return ops.diffusion_step(x, m, row, clip=1.0, noise=True, seed=0, step=7)

    z = ops.philox_normal(shape, 0, 7, 2, device=device)
    return Case(
        "diffusion_step", f"DDPM with noise and clip {common.name(shape)}", ours,
        {"eager": eager, "torch.compile": torch.compile(eager), "diffusers": common.scheduler("DDPMScheduler", x, m),
         **_in_float32(ours, x, m)},
        bytes=3 * x.numel() * x.element_size(), normals=x.numel(), error=common.error(ours, (x, m), row, 1.0, z=z),
        **_kind(dtype, goals),
    )


def _ddim(shape, device, dtype=torch.float32, share_goal=0.0, goals=None):
    x, m = common.tensors(2, shape, device, dtype)
    out, theirs = torch.empty_like(x), torch.empty_like(x)
    values = coefficients.ddim(common.ALPHA, common.ALPHA_NEXT)
    row = common.row(values, device)
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
        "diffusion_step", f"DDIM {common.name(shape)}, out=", ours,
        {"eager": lines, "eager, folded": eager, "torch.compile": torch.compile(eager),
         "diffusers": common.scheduler("DDIMScheduler", x, m, clip_sample=False), **_in_float32(ours, x, m, out)},
        bytes=3 * x.numel() * x.element_size(), error=common.error(ours, (x, m), row), share_goal=share_goal,
        note="eager: as the formula is written; folded: one scale and one shift, in place", **_kind(dtype, goals),
    )


def _tiny(device):
    x, m = common.tensors(2, (1, 4), device)
    row = common.row(coefficients.ddpm(common.ALPHA, common.ALPHA_NEXT), device)
    return Case(
        "diffusion_step", "DDPM [1,4]: the cost of a call",
        lambda: ops.diffusion_step(x, m, row, clip=1.0, noise=True, seed=0),
        {"torch.add": lambda: torch.add(x, m, alpha=2.0), "diffusers": common.scheduler("DDPMScheduler", x, m)},
        goals={"torch.add": 1 / 3} if torch.device(device).type == "cpu" else {},
        note="checks and allocation included",
    )


def _plan(device):
    x, m = common.tensors(2, (1, 4), device)
    table = common.row([coefficients.ddpm(common.ALPHA, common.ALPHA_NEXT)] * 50, device)
    plan = ops.DiffusionPlan(table, noise=True, seed=0, clip=1.0)
    return Case(
        "diffusion_step", "DDPM [1,4], a plan: the cost of a call", lambda: plan(x, m, 25),
        {"torch.add": lambda: torch.add(x, m, alpha=2.0), "diffusers": common.scheduler("DDPMScheduler", x, m)},
        goals={"torch.add": 1 / 2} if torch.device(device).type == "cpu" else {},
        note="checks and allocation included",
    )


def _multistep(shape, device, goals=None, dtype=torch.float32, share_goal=0.0):
    x, m, h = common.tensors(3, shape, device, dtype)
    out, x0 = torch.empty_like(x), torch.empty_like(x)
    values = coefficients.dpmpp_2m(common.ALPHA, common.ALPHA_NEXT, common.ALPHA_BEFORE)
    row = common.row(values, device)
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
        "diffusion_step", f"DPM-Solver++ 2M {common.name(shape)}, out=", ours,
        {"eager": lines, "eager, folded": eager, "torch.compile": torch.compile(eager),
         "diffusers": common.scheduler("DPMSolverMultistepScheduler", x, m), **_in_float32(ours, x, m, h, out, x0)},
        bytes=5 * x.numel() * x.element_size(), error=common.error(ours, (x, m), row, history=(h,)),
        share_goal=share_goal, note="eager: as the formula is written; folded: in place", **_kind(dtype, goals),
    )


# Loops write a step's results where its inputs were. The model predicts a velocity there: the numbers come to rest, so
# that they stay ordinary ones however often the step is repeated.


def _ddim_loop(shape, device, goals):
    x, m = common.tensors(2, shape, device)
    mine, theirs, last = x.clone(), x.clone(), [x]
    values = coefficients.ddim(common.ALPHA, common.ALPHA_NEXT, "v_prediction")
    row = common.row(values, device)
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
        "diffusion_step", f"DDIM {common.name(shape)}, in place", lambda: step(mine),
        {"eager": lines, "eager, folded": folded, "torch.compile": torch.compile(folded),
         "diffusers": common.scheduler("DDIMScheduler", x, m, clip_sample=False, prediction_type="v_prediction")},
        bytes=3 * x.numel() * x.element_size(), error=common.error(lambda: step(x.clone()), (x, m), row), goals=goals,
        note="out=x; copy_: as many bytes, of more memory; eager: as the formula is written; folded: in place",
    )


def _multistep_loop(shape, device, goals):
    x, m, h = common.tensors(3, shape, device)
    mine, others, theirs, last = ([t.clone() for t in (x, h, m)] for _ in range(4))
    values = coefficients.dpmpp_2m(common.ALPHA, common.ALPHA_NEXT, common.ALPHA_BEFORE, "v_prediction")
    row = common.row(values, device)
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
        "diffusion_step", f"DPM-Solver++ 2M {common.name(shape)}, in place", lambda: step(*mine[:2]),
        {"eager": lines, "eager, folded": folded, "torch.compile": lambda: compiled(*others[:2]),
         "diffusers": common.scheduler("DPMSolverMultistepScheduler", x, m, prediction_type="v_prediction")},
        bytes=5 * x.numel() * x.element_size(), goals=goals,
        error=common.error(lambda: step(x.clone(), h.clone()), (x, m), row, history=(h,)),
        note="out=x, x0_out=h; copy_: as many bytes, of more memory; eager: as the formula is written",
    )
