"""DPM-Solver++ with the preconditioning of Karras et al. 2022."""

import diffusers

from ._base import drop_in
from ._edm import Preconditioned, preconditioning
from ._multistep import Multistep
from ._sigmas import Scaled


@drop_in
class EDMDPMSolverMultistepScheduler(Preconditioned, Multistep, Scaled, diffusers.EDMDPMSolverMultistepScheduler):
    """diffusers' :class:`EDMDPMSolverMultistepScheduler` with one kernel call per step (docs/schedulers.md)."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        result = self._fused_step(model_output, timestep, sample, generator, None, None, return_dict)
        if result is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        return result

    def _kind(self):
        return "edm"

    def _conversion(self, now, sigma):
        return preconditioning(self.config, sigma)
