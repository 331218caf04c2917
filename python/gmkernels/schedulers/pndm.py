"""Pseudo linear multistep methods; Liu et al. 2022."""

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from .. import ops
from ._alphas import Alphas, cumulative_at
from ._base import Fused, alike, check, drop_in, output
from ._table import Table

_WEIGHTS = {  # of the outputs, newest first; Adams and Bashforth's, after a first step that is done twice
    "first": (1.0,),
    "again": (1 / 2, 1 / 2),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@drop_in
class PNDMScheduler(Alphas, Fused, diffusers.PNDMScheduler):
    """diffusers' :class:`PNDMScheduler` with one kernel call per linear multistep (docs/schedulers.md).

    The Runge-Kutta steps of ``skip_prk_steps=False`` are diffusers' own.
    """

    def step(self, model_output, timestep, sample, return_dict=True):
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        check(model_output, sample)
        return super().step(model_output, timestep, sample, return_dict)

    def step_plms(self, model_output, timestep, sample, return_dict=True):
        plan = self._ready()
        t = plan.time(timestep)
        again = self.counter == 1
        earlier = self.ets[::-1] if again else self.ets[-3:][::-1]
        phase = "again" if again and len(self.ets) == 1 else "first" if self.counter == 0 else len(earlier) + 1
        i = self._indices(plan).get(t)
        table = self._table(plan, phase) if phase in _WEIGHTS else None
        early = not self.config.skip_prk_steps and len(self.ets) < 3  # diffusers says so
        if (i is None or table is None or not table.finite[i] or early
                or (phase == "again" and self.cur_sample is None)):  # fmt: skip
            return super().step_plms(model_output, timestep, sample, return_dict)
        x, m, *earlier = alike(self.cur_sample if phase == "again" else sample, model_output, *earlier)
        prev = ops.diffusion_step(x, m, table.row(i, x), history=tuple(earlier))
        if not again:
            self.ets = [*self.ets[-3:], model_output]
        if phase in ("first", "again"):
            self.cur_sample = sample if phase == "first" else None
        self.counter += 1
        return output(SchedulerOutput, prev_sample=prev) if return_dict else (prev,)

    def _indices(self, plan):
        if "indices" not in plan.tables:
            plan.tables["indices"] = {t: i for i, t in reversed(list(enumerate(plan.times)))}
        return plan.tables["indices"]

    def _tables(self, plan):
        return [self._table(plan, phase) for phase in _WEIGHTS]

    def _table(self, plan, phase):
        table = plan.tables.get(phase)
        if table is None:
            stride = self.config.num_train_timesteps // self.num_inference_steps
            start = [t + stride for t in plan.times] if phase == "again" else plan.times
            a, a_next = (cumulative_at(self.alphas_cumprod, at, self.final_alpha_cumprod, self._real())
                         for at in (start, [t - stride for t in start]))
            x = ((a_next / a) ** 0.5).double()
            below = a * (1 - a_next) ** 0.5 + (a * (1 - a) * a_next) ** 0.5
            out = -(a_next - a).double() / below.double()
            if self.config.prediction_type == "v_prediction":
                x, out = x + out * (1 - a).sqrt().double(), out * a.sqrt().double()
            elif self.config.prediction_type != "epsilon":
                raise ValueError("prediction_type must be epsilon or v_prediction for PNDMScheduler,"
                                 f" got {self.config.prediction_type!r}")
            columns = {name: out * w for name, w in zip(("c0", "c2", "c3", "c4"), _WEIGHTS[phase], strict=False)}
            table = plan.tables[phase] = Table(len(start), B=1.0, c1=x, **columns)
        return table
