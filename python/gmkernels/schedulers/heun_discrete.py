"""Heun's method in the noise level; Karras et al. 2022, algorithm 1."""

import diffusers
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput

from ._base import alike, check, drop_in, fused, output
from ._euler import level_prediction, line
from ._heun import Heun
from ._sigmas import Scaled
from ._table import Table


@drop_in
class HeunDiscreteScheduler(Heun, Scaled, diffusers.HeunDiscreteScheduler):
    """diffusers' :class:`HeunDiscreteScheduler` with one kernel call per step (docs/schedulers.md)."""

    def step(self, model_output, timestep, sample, return_dict=True):
        check(model_output, sample)
        plan = self._ready()
        i = self._begin(plan, timestep)
        second = self.dt is not None
        table = self._halves(plan)[second]
        if not table.finite[i] or (second and self._half is None):
            self._hand_over(lambda x0: (self.sample - x0) / self.sigmas[i - 1])
            return super().step(model_output, timestep, sample, return_dict)
        x, m = alike(sample, model_output)
        history = (self.sample.to(x.dtype), self._half.to(x.dtype)) if second else ()
        prev, x0 = fused(table, i, x, m, history, clip=plan.clip)
        if second:
            self._forget()
        else:
            self._keep(i, sample, x0)
        self._step_index = i + 1
        if return_dict:
            return output(HeunDiscreteSchedulerOutput, prev_sample=prev, pred_original_sample=x0)
        return prev, x0

    def _tables(self, plan):
        return self._halves(plan)

    def _halves(self, plan):
        tables = plan.tables.get("halves")
        if tables is None:
            kind, name = self.config.prediction_type, "HeunDiscreteScheduler"
            (sigma, to), (start, at) = self._levels_of_halves()
            A, B = level_prediction(kind, sigma, name)
            first = Table(len(sigma), A=A, B=B, **line(sigma, to))
            # sample + dt / 2 ((sample - h2) / start + (x - x0) / at), h1 the sample of the first half, h2 its x0
            A, B = level_prediction(kind, at, name)
            half = (at - start).double() / 2
            now, then = half / at.double(), half / start.double()
            tables = plan.tables["halves"] = first, Table(len(at), A=A, B=B, c0=-now, c1=now, c2=1 + then, c3=-then)
        return tables
