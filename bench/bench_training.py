"""The training side of diffusion and flow models, beside eager torch, its torch.compile, and the lines of diffusers."""

import torch

from .. import ops, reference
from ..reference.noising import STREAM_ADD_NOISE, TARGETS
from .case import Case

OPS = ("add_noise", "denoising_loss", "flow_pair", "ema_update_")

_TIMES = 1000


def cases(quick, device):
    cpu = torch.device(device).type == "cpu"
    latents, images = (16, 3, 32, 32), (8, 3, 256, 256) if cpu else (128, 3, 256, 256)
    yield _add(latents if quick else images, device)
    yield _loss(latents if quick else images, device,
                {"diffusers": 8.0, "torch.compile": 20.0} if cpu and not quick else {})
    yield _flow(latents if quick else images, device)
    if not quick:
        yield _loss(latents, device, {})
        yield _add((65536, 2), device)
        yield _loss((65536, 2), device, {})
        yield _flow((65536, 2), device)
    cpu_goals = cpu and not quick
    yield _ema([(200,)] * 600, "600 tensors of 200", device, {"_foreach_lerp_": 8.0} if cpu_goals else {})
    if not quick:
        yield _ema([(224, 224)] * 400, "400 tensors of 50k", device, {"_foreach_lerp_": 2.5} if cpu_goals else {})


def _name(shape):
    return "[" + ",".join(map(str, shape)) + "]"


def _data(shape, device, count):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(device) for _ in range(count)]
    t = torch.randint(0, _TIMES, (shape[0],), generator=generator).to(device)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, _TIMES, dtype=torch.float64), 0)
    schedule = torch.stack((alphas.sqrt(), (1 - alphas).sqrt()), -1).float().to(device)
    return *made, t, schedule


def _scheduler(device):
    """diffusers' DDPMScheduler, with its table where the data are; or None."""
    try:
        import diffusers
    except ImportError:
        return None
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    return scheduler


def _pair(schedule, t, x):
    rows = schedule[t].reshape(-1, 2, *(1,) * (x.dim() - 1))
    return rows[:, 0], rows[:, 1]


def _error(got, want):
    return max(((g.double() - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True))


def _add(shape, device):
    x0, t, schedule = _data(shape, device, 1)
    scheduler = _scheduler(device)

    def eager():
        alpha, sigma = _pair(schedule, t, x0)
        z = torch.randn_like(x0)
        return alpha * x0 + sigma * z, alpha * z - sigma * x0

    def diffusers():
        z = torch.randn_like(x0)
        return scheduler.add_noise(x0, z, t), scheduler.get_velocity(x0, z, t)

    def ours():
        return ops.add_noise(x0, t, schedule, seed=0, target="v")

    def error():
        z = ops.philox_normal(shape, 0, 0, STREAM_ADD_NOISE, device=device).double()
        args = (x0.double(), t, schedule.double(), z, None, TARGETS.index("v"))
        return _error(ours(), reference.noising.add_noise_target(*args))

    return Case(
        "add_noise", f"x_t and v {_name(shape)}", ours,
        {"eager": eager, "torch.compile": torch.compile(eager),
         "diffusers": diffusers if scheduler else "not installed"},
        bytes=3 * x0.numel() * 4, normals=x0.numel(), error=error,
    )


def _loss(shape, device, goals):
    """What a training step does around its model: x_t, then the loss and its gradient for the model's output."""
    x0, pred, t, schedule = _data(shape, device, 2)
    pred.requires_grad_()
    scheduler = _scheduler(device)

    def lines(pred):
        alpha, sigma = _pair(schedule, t, x0)
        z = torch.randn_like(x0)
        return alpha * x0 + sigma * z, torch.nn.functional.mse_loss(pred, alpha * z - sigma * x0)

    compiled = torch.compile(lines)

    def step(lines):
        xt, loss = lines(pred)
        return xt, loss.detach(), *torch.autograd.grad(loss, pred)

    def of_diffusers(pred):
        z = torch.randn_like(x0)
        xt = scheduler.add_noise(x0, z, t)
        return xt, torch.nn.functional.mse_loss(pred, scheduler.get_velocity(x0, z, t))

    def fused(pred):
        return ops.add_noise(x0, t, schedule, seed=0), ops.denoising_loss(pred, x0, t, schedule, 0, target="v")

    def error():
        z = ops.philox_normal(shape, 0, 0, STREAM_ADD_NOISE, device=device).double()
        args = (x0.double(), t, schedule.double(), z, None, TARGETS.index("v"))
        xt, v = reference.noising.add_noise_target(*args)
        d = pred.detach().double() - v
        return _error(step(fused), (xt, d.square().mean(), d * (2 / d.numel())))

    return Case(
        "denoising_loss", f"x_t, v loss and its gradient {_name(shape)}", lambda: step(fused),
        {"eager": lambda: step(lines), "torch.compile": lambda: step(compiled),
         "diffusers": (lambda: step(of_diffusers)) if scheduler else "not installed"},
        bytes=5 * x0.numel() * 4, normals=2 * x0.numel(), error=error, goals=goals,
        note="the noise is made twice: for x_t, and for the loss with its gradient",
    )


def _flow(shape, device):
    x0, x1, _, _ = _data(shape, device, 2)
    t = torch.linspace(0, 1, shape[0], device=device)

    def eager():
        s = t.reshape(-1, *(1,) * (x0.dim() - 1))
        return torch.lerp(x0, x1, s), x1 - x0

    def ours():
        return ops.flow_pair(x0, x1, t)

    def error():
        return _error(ours(), reference.noising.flow_pair(x0.double(), x1.double(), t.double()))

    return Case("flow_pair", f"x_t and u {_name(shape)}", ours, {"eager": eager, "torch.compile": torch.compile(eager)},
                bytes=4 * x0.numel() * 4, error=error)


def _ema(shapes, name, device, goals):
    values = [torch.randn(s, generator=torch.Generator().manual_seed(i)).to(device) for i, s in enumerate(shapes)]
    # Each way moves its own. Equal to the values, they stay as they are: every call does the same.
    decay, (own, foreach, compiled, peer) = 0.999, [[v.clone() for v in values] for _ in range(4)]

    def lerp(ema):
        torch._foreach_lerp_(ema, values, 1 - decay)

    def ours():
        ops.ema_update_(own, values, decay)
        return own

    def error():
        ema = [torch.zeros_like(v) for v in values]
        ops.ema_update_(ema, values, decay)
        return max(((e.double() - (1 - decay) * v.double()).abs().max() / v.abs().max()).item()
                   for e, v in zip(ema, values, strict=True))

    try:
        from diffusers.training_utils import EMAModel
    except ImportError:
        of_diffusers = "not installed"
    else:
        model = EMAModel(values, decay=decay)
        model.shadow_params, model.get_decay = peer, lambda _: decay

        def of_diffusers():
            model.step(values)

    together = torch.compile(lerp)
    return Case("ema_update_", f"{name} parameters", ours,
                {"_foreach_lerp_": lambda: lerp(foreach), "torch.compile": lambda: together(compiled),
                 "diffusers": of_diffusers},
                bytes=3 * 4 * sum(v.numel() for v in values), error=error, goals=goals)
