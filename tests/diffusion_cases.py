"""Tensors, options and the float64 oracle that the tests of ops.diffusion_step share."""

import torch

import cases
from gmkernels import ops, reference
from gmkernels.ops import diffusion

F64 = torch.float64
FULL = (1.2, -0.5, 0.6, 0.4, 0.3, -0.2, 0.1, 0.7)  # every stream is live
DDIM = (1.2, -0.5, 0.6, 0.4, 0.0, 0.0, 0.0, 0.0)
OPTIONS = {  # name: (names of the tensors, other arguments)
    "plain": ((), {}),
    "guided": (("uncond",), {"guidance_scale": 3.0}),
    "clip": ((), {"clip": 0.8}),
    "pair": ((), {"clip": (-0.1, 1.5)}),
    "history1": (("h1",), {}),
    "history2": (("h1", "h2"), {"clip": 1.0}),
    "history3": (("h1", "h2", "h3"), {}),
    "drawn": ((), {"noise": True, "seed": 5, "step": 3}),
    "given": (("z",), {}),
    "learned": (("variance",), {"noise": True, "seed": -1, "step": 2**32 - 1}),
    "everything": (("uncond", "h1", "h2", "h3", "variance"),
                   {"guidance_scale": 2.0, "clip": 1.0, "noise": True, "seed": 2**64 - 1, "step": 1}),
}


def tensors(shape, names, dtype=torch.float32, device="cpu", grad=False):
    made = {}
    for seed, name in enumerate(("x", "model_output", *names)):
        t = cases.data(*shape, seed=seed)
        made[name] = (t.abs() + 0.1 if name == "variance" else t).to(device, dtype).requires_grad_(grad)
    return made


def coefficients(values=FULL, dtype=torch.float32, device="cpu", grad=False):
    return torch.tensor(values, dtype=dtype, device=device, requires_grad=grad)


def call(made, c, **options):
    """ops.diffusion_step of the tensors by name."""
    history = tuple(made[h] for h in ("h1", "h2", "h3") if h in made)
    more = {k: made[k] for k in ("uncond", "variance") if k in made}
    if "z" in made:
        options["noise"] = made["z"]
    return ops.diffusion_step(made["x"], made["model_output"], c, history=history, **more, **options)


def oracle(made, c, guidance_scale=1.0, clip=None, noise=False, seed=None, step=0, **_):
    """(out, x0) by the reference, in float64, with the same normal numbers."""
    d = {k: t.detach().cpu().double() for k, t in made.items()}
    z = d.get("z")
    if noise:
        shape = d["x"].shape
        z = ops.philox_normal(shape, seed=seed.cpu() if isinstance(seed, torch.Tensor) else seed, step=step, stream=2)
    low, high = diffusion._clip_range(clip)
    return reference.diffusion.diffusion_step(
        d["x"], d["model_output"], c.detach().cpu().double(), d.get("uncond"), d.get("h1"), d.get("h2"), d.get("h3"),
        d.get("variance"), z, None, guidance_scale, low, high,
    )


def close(got, want):
    cases.close(got, want, atol=None if got.dtype is F64 else 5e-6 if got.dtype is torch.float32 else 1e-4)
