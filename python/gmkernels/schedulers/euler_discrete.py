"""Karras et al. 2022, algorithm 2, first order."""

import diffusers
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput

from .. import ops
from ._base import alike, check, drop_in
from ._euler import Euler, level_prediction
from ._sigmas import float_time


@drop_in
class EulerDiscreteScheduler(Euler, diffusers.EulerDiscreteScheduler):
    """diffusers' :class:`EulerDiscreteScheduler` with one kernel call per step, two with churn (docs/schedulers.md)."""

    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0,
             generator=None, return_dict=True):
        result = self._fused_step(EulerDiscreteSchedulerOutput, model_output, timestep, sample,
                                  (s_churn, s_tmin, s_tmax, s_noise), generator, return_dict)
        if result is None:
            return super().step(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                                return_dict)
        return result

    def _denoiser(self, sigma, hat):
        kind = self.config.prediction_type
        return level_prediction(kind, hat if kind == "epsilon" else sigma, "EulerDiscreteScheduler")

    def get_velocity(self, sample, noise, timesteps):
        """As diffusers: `alphas_cumprod` is read at the index of the step, not at its time."""
        float_time(timesteps, "EulerDiscreteScheduler")
        check(noise, sample)
        sample, noise = alike(sample, noise)
        plan = self._ready()
        at = torch.tensor([self._index_of(plan, t) for t in timesteps.tolist()], device=sample.device)
        a = self.alphas_cumprod.to(sample)[at].to(torch.promote_types(sample.dtype, torch.float32))
        half = sample.dtype in (torch.bfloat16, torch.float16)
        signal, spread = ((a.to(sample.dtype) if half else a) ** 0.5, (1 - (a.to(sample.dtype) if half else a)) ** 0.5)
        rows = torch.zeros(len(at), 8, dtype=a.dtype, device=sample.device)
        rows[:, 1], rows[:, 2], rows[:, 3] = 1.0, signal, -spread
        return ops.diffusion_step(sample, noise, rows[0] if len(at) == 1 else rows)
