"""DPM-Solver and DPM-Solver++, multistep, ODE and SDE; Lu et al. 2022."""

import diffusers
import torch

from . import _dpm
from ._base import drop_in
from ._multistep import Multistep


@drop_in
class DPMSolverMultistepScheduler(Multistep, diffusers.DPMSolverMultistepScheduler):
    """diffusers' :class:`DPMSolverMultistepScheduler` with one kernel call per step (docs/schedulers.md)."""

    def step(self, model_output, timestep, sample, generator=None, variance_noise=None, return_dict=True):
        m, config = model_output, self.config
        if config.variance_type in ("learned", "learned_range") and m.shape != sample.shape:
            if config.prediction_type == "epsilon":
                m = m[:, :3]  # diffusers: of the learned variances nothing is used
        result = self._fused_step(m, timestep, sample, generator, variance_noise, torch.float32, return_dict)
        if result is None:
            return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)
        return result

    def _conversion(self, now, sigma):
        return _dpm.conversion(self.config.prediction_type, self._to_noise(), now, sigma, "DPMSolverMultistepScheduler")
