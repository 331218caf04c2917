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
        def parent_step():
            return super(DPMSolverMultistepScheduler, self).step(model_output, timestep, sample, generator,
                                                                 variance_noise, return_dict)

        m = model_output
        if m.shape != sample.shape and self.config.variance_type in ("learned", "learned_range"):
            if self.config.prediction_type == "epsilon":
                m = m[:, :3]  # diffusers: of the learned variances nothing is used
        return self._fused_step(parent_step, m, timestep, sample, generator, variance_noise, torch.float32, return_dict)

    def _kind(self):
        return "flow" if self.config.use_flow_sigmas else "vp"

    def _conversion(self, now, sigma):
        return _dpm.conversion(self.config.prediction_type, self._to_noise(), now, sigma, "DPMSolverMultistepScheduler")
