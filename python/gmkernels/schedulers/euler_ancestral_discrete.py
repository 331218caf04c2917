"""Euler's method with ancestral noise, of k-diffusion."""

import diffusers
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput

from ._base import drop_in, fused, matched, output
from ._euler import level_prediction, line
from ._sigmas import Scaled, float_time
from ._table import Table


@drop_in
class EulerAncestralDiscreteScheduler(Scaled, diffusers.EulerAncestralDiscreteScheduler):
    """diffusers' :class:`EulerAncestralDiscreteScheduler` with one kernel call per step (docs/schedulers.md)."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        float_time(timestep, "EulerAncestralDiscreteScheduler")
        x, m = matched(sample, model_output)
        plan = self._ready()
        i = self._begin(plan, timestep)
        table = self._table(plan)
        if not table.finite[i]:
            return super().step(model_output, timestep, sample, generator, return_dict)
        noise, seed = plan.noise.take(self.noise, i, generator, model_output)
        if seed is None:
            noise = noise.to(x.dtype)
        prev, x0 = fused(table, i, x, m, noise=noise, seed=seed)
        self._step_index = i + 1
        if prev.dtype is not model_output.dtype:
            prev = prev.to(model_output.dtype)
        if return_dict:
            return output(EulerAncestralDiscreteSchedulerOutput, prev_sample=prev, pred_original_sample=x0)
        return prev, x0

    def _tables(self, plan):
        return [self._table(plan)]

    def _table(self, plan):
        table = plan.tables.get("step")
        if table is None:
            if self.config.prediction_type == "sample":
                raise NotImplementedError("prediction_type 'sample' is not known to EulerAncestralDiscreteScheduler")
            levels = self._levels()
            sigma, to = levels[:-1], levels[1:]
            up = (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5
            down = (to**2 - up**2) ** 0.5
            A, B = level_prediction(self.config.prediction_type, sigma, "EulerAncestralDiscreteScheduler")
            table = plan.tables["step"] = Table(len(sigma), A=A, B=B, s=up, **line(sigma, down))
        return table
