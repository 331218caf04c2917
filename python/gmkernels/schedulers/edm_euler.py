"""Karras et al. 2022 with their preconditioning, first order."""

import diffusers
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput

from ._base import drop_in
from ._edm import Preconditioned, preconditioning
from ._euler import Euler


@drop_in
class EDMEulerScheduler(Preconditioned, Euler, diffusers.EDMEulerScheduler):
    """diffusers' :class:`EDMEulerScheduler` with one kernel call per step, two with churn (docs/schedulers.md)."""

    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0,
             generator=None, return_dict=True, pred_original_sample=None):
        result = None
        if pred_original_sample is None:
            result = self._fused_step(EDMEulerSchedulerOutput, model_output, timestep, sample,
                                      (s_churn, s_tmin, s_tmax, s_noise), generator, return_dict)
        else:
            self._begin(self._ready(), timestep)
        if result is None:
            return super().step(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                                return_dict, pred_original_sample)
        return result

    def _denoiser(self, sigma, hat):
        return preconditioning(self.config, hat)
