"""Heun's method for flow matching."""

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteSchedulerOutput

from ._base import alike, check, drop_in, fused, output
from ._heun import Heun
from ._sigmas import Sigmas, float_time
from ._table import Table


@drop_in
class FlowMatchHeunDiscreteScheduler(Heun, Sigmas, diffusers.FlowMatchHeunDiscreteScheduler):
    """diffusers' :class:`FlowMatchHeunDiscreteScheduler` with one kernel call per step (docs/schedulers.md)."""

    _must_be_set = True

    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0,
             generator=None, return_dict=True):
        float_time(timestep, "FlowMatchHeunDiscreteScheduler")
        check(model_output, sample)
        plan = self._ready()
        i = self._begin(plan, timestep)
        second = self.dt is not None
        table = self._halves(plan)[second]
        if s_churn > 0 or not table.finite[i] or (second and self._half is None):
            self._hand_over(lambda velocity: velocity)
            return super().step(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                                return_dict)
        start, half = (self.sample, self._half) if second else (sample, None)
        x, m, half = alike(start, model_output, half)
        prev = fused(table, i, x, m, (half,) if second else (), x0=False)
        if second:
            self._forget()
        else:
            self._keep(i, sample if sample.dtype is torch.float64 else sample.float(), model_output)
        self._step_index = i + 1
        if prev.dtype is not model_output.dtype:
            prev = prev.to(model_output.dtype)
        return output(FlowMatchHeunDiscreteSchedulerOutput, prev_sample=prev) if return_dict else (prev,)

    def _tables(self, plan):
        return self._halves(plan)

    def _halves(self, plan):
        tables = plan.tables.get("halves")
        if tables is None:
            (sigma, to), (start, at) = self._levels_of_halves()
            half = (at - start).double() / 2  # x the sample of the first half, h1 its velocity
            tables = plan.tables["halves"] = (Table(len(sigma), B=1.0, c0=to - sigma, c1=1.0),
                                              Table(len(at), B=1.0, c0=half, c1=1.0, c2=half))
        return tables
