"""Luo et al. 2023, latent consistency models."""

import diffusers
import torch
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput

from ._alphas import Alphas, cumulative_at, prediction
from ._base import Fused, drop_in, fused, matched, output, x0_step
from ._sigmas import Sigmas
from ._table import Table


@drop_in
class LCMScheduler(Alphas, Sigmas, diffusers.LCMScheduler):
    """diffusers' :class:`LCMScheduler` with two kernel calls per step, one in the last (docs/schedulers.md)."""

    _source_name = Fused._source_name  # there are no sigmas
    _must_be_set = True

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        x, m = matched(sample, model_output)
        plan = self._ready()
        i = self._begin(plan, timestep)
        denoise, renoise = self._both(plan)
        if not denoise.finite[i] or not renoise.finite[i] or plan.time(timestep) != plan.times[i]:
            return super().step(model_output, timestep, sample, generator, return_dict)
        denoised = x0_step(plan, denoise, i, x, m)[0]
        prev = denoised
        if i != self.num_inference_steps - 1:
            noise, seed = plan.noise.take(self.noise, i, generator, denoised)
            prev = fused(renoise, i, denoised, denoised, noise=noise, seed=seed, x0=False)
        self._step_index = i + 1
        return output(LCMSchedulerOutput, prev_sample=prev, denoised=denoised) if return_dict else (prev, denoised)

    def _tables(self, plan):
        return self._both(plan)

    def _both(self, plan):
        """(the denoised sample, noise at the next time on it)"""
        tables = plan.tables.get("step")
        if tables is None:
            times, real = plan.times, self._real()
            a, a_next = (cumulative_at(self.alphas_cumprod, at, self.final_alpha_cumprod, real)
                         for at in (times, [*times[1:], times[-1]]))
            scaled = torch.tensor(times, dtype=real, device="cpu") * self.config.timestep_scaling
            skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
            A, B = prediction(self.config.prediction_type, a, "LCMScheduler")
            tables = plan.tables["step"] = (Table(len(times), A=A, B=B, c0=out, c1=skip),
                                            Table(len(times), c1=a_next.sqrt(), s=(1 - a_next).sqrt()))
        return tables
