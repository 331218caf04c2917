"""The coefficients of known samplers, against diffusers' own step: one step with the same noise."""

import math
from functools import partial

import pytest
import torch

import cases
from gmkernels import ops
from gmkernels.ops import diffusion_coefficients as co


def relative(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def in_float64(scheduler):
    """diffusers with its scalars in float64: in float32 its 1 - alpha at small t is off by 3e-5 of the step."""
    for name in ("alphas_cumprod", "one", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def sample_pair(seed=0):
    return tuple(cases.data(2, 3, 8, 8, dtype=torch.float32, seed=seed + i) for i in range(3))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_is_diffusers(monkeypatch, prediction_type, clip, variance_type):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_ddpm

    s = in_float64(
        diffusers.DDPMScheduler(prediction_type=prediction_type, clip_sample=clip, variance_type=variance_type)
    )
    x, m, z = sample_pair()
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: z)
    for t in (999, 500, 1, 0):
        a, a_next = s.alphas_cumprod[t].item(), s.alphas_cumprod[t - 1].item() if t else 1.0
        want = s.step(m, t, x)
        c = torch.tensor(co.ddpm(a, a_next, prediction_type, variance_type))
        out, x0 = ops.diffusion_step(x, m, c, clip=1.0 if clip else None, noise=z, return_x0=True)
        assert relative(out, want.prev_sample) < 2e-6 and relative(x0, want.pred_original_sample) < 2e-6


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_diffusers(prediction_type, eta):
    diffusers = pytest.importorskip("diffusers")
    s = in_float64(diffusers.DDIMScheduler(prediction_type=prediction_type, clip_sample=eta > 0))
    s.set_timesteps(20)
    x, m, z = sample_pair()
    for t in s.timesteps.tolist()[:1] + s.timesteps.tolist()[5::7]:
        before = t - 1000 // 20
        a, a_next = s.alphas_cumprod[t].item(), s.alphas_cumprod[before].item() if before >= 0 else 1.0
        want = s.step(m, t, x, eta=eta, use_clipped_model_output=True, variance_noise=z if eta else None)
        c = torch.tensor(co.ddim(a, a_next, prediction_type, eta))
        out = ops.diffusion_step(x, m, c, clip=1.0 if eta else None, noise=z)
        assert relative(out, want.prev_sample) < 2e-6


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_dpmpp_2m_is_diffusers(prediction_type):
    diffusers = pytest.importorskip("diffusers")
    s = diffusers.DPMSolverMultistepScheduler(prediction_type=prediction_type, final_sigmas_type="zero")
    s.set_timesteps(10)
    x, m, _ = sample_pair()
    alphas = [1.0 / (1.0 + sigma**2) for sigma in s.sigmas.double().tolist()]
    h1 = torch.full_like(x, math.nan)
    for i, t in enumerate(s.timesteps):
        want = s.step(m, t, x).prev_sample
        c = torch.tensor(co.dpmpp_2m(alphas[i], alphas[i + 1], alphas[i - 1] if i else None, prediction_type))
        out, h1 = ops.diffusion_step(x, m, c, history=(h1,), return_x0=True)
        assert relative(out, want) < 2e-6
        x, m = want, torch.sin(want + i)


def test_euler_and_flow_matching_are_diffusers():
    diffusers = pytest.importorskip("diffusers")
    x, m, z = sample_pair()
    v = {"prediction_type": "v_prediction"}
    for s, rule in [
        (diffusers.EulerDiscreteScheduler(), co.euler),
        (diffusers.EulerDiscreteScheduler(**v), partial(co.euler, **v)),
        (diffusers.FlowMatchEulerDiscreteScheduler(), co.flow_euler),
    ]:
        s.set_timesteps(10)
        y = x * s.sigmas[0]
        for i, t in enumerate(s.timesteps):
            want = s.step(m, t, y).prev_sample
            c = torch.tensor(rule(s.sigmas[i].item(), s.sigmas[i + 1].item()))
            assert relative(ops.diffusion_step(y, m, c), want) < 2e-6
            y = want


def test_ancestral_euler_is_diffusers(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as module

    x, m, z = sample_pair()
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: z)
    s = diffusers.EulerAncestralDiscreteScheduler()
    s.set_timesteps(10)
    y = x * s.sigmas[0]
    for i, t in enumerate(s.timesteps):
        want = s.step(m, t, y).prev_sample
        c = torch.tensor(co.euler(s.sigmas[i].item(), s.sigmas[i + 1].item(), eta=1.0))
        assert relative(ops.diffusion_step(y, m, c, noise=z), want) < 2e-6
        y = want


def test_coefficient_rules_name_what_they_know():
    for rule in (partial(co.ddpm, 0.5, 0.6), partial(co.ddim, 0.5, 0.6), partial(co.euler, 2.0, 1.0)):
        with pytest.raises(ValueError, match="prediction_type must be"):
            rule(prediction_type="noise")
    with pytest.raises(ValueError, match="variance_type must be"):
        co.ddpm(0.5, 0.6, variance_type="learned")
