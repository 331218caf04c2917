"""Euler's method for flow matching; Lipman et al. 2022, with the shifted times of Esser et al. 2024."""

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

from ._base import alike, drop_in, fused, matched, output
from ._sigmas import Sigmas, float_time
from ._table import Table


@drop_in
class FlowMatchEulerDiscreteScheduler(Sigmas, diffusers.FlowMatchEulerDiscreteScheduler):
    """diffusers' :class:`FlowMatchEulerDiscreteScheduler` with one kernel call per step (docs/schedulers.md)."""

    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0,
             generator=None, per_token_timesteps=None, return_dict=True):
        float_time(timestep, "FlowMatchEulerDiscreteScheduler")
        x, m = matched(sample, model_output)
        plan = self._ready()
        i = self._begin(plan, timestep)
        table = self._table(plan)
        if per_token_timesteps is not None or not table.finite[i]:
            return super().step(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                                per_token_timesteps, return_dict)
        noise, seed = False, None
        if self.config.stochastic_sampling:
            noise, seed = plan.noise.take(self.noise, i, generator, x, torch.float32)
            if seed is None:
                x, m, noise = alike(x, m, noise)
        prev = fused(table, i, x, m, noise=noise, seed=seed, x0=False)
        self._step_index = i + 1
        if prev.dtype is not model_output.dtype:
            prev = prev.to(model_output.dtype)
        return output(FlowMatchEulerDiscreteSchedulerOutput, prev_sample=prev) if return_dict else (prev,)

    def _tables(self, plan):
        return [self._table(plan)]

    def _table(self, plan):
        table = plan.tables.get("step")
        if table is None:
            levels = self._levels()
            sigma, to = levels[:-1], levels[1:]
            if self.config.stochastic_sampling:
                table = Table(len(sigma), A=1.0, B=-sigma, c0=1 - to, s=to)
            else:
                table = Table(len(sigma), B=1.0, c0=to - sigma, c1=1.0)
            plan.tables["step"] = table
        return table

    def _signal_and_noise(self, sigma):
        return 1.0 - sigma, sigma

    def scale_noise(self, sample, timestep, noise=None):
        return self._mixed(sample, noise, timestep)
