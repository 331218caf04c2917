"""DPM-Solver and DPM-Solver++, singlestep: a step of order k starts k - 1 times back; Lu et al. 2022."""

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from . import _dpm
from ._base import drop_in, matched, output, x0_step
from ._solver import Solver
from ._table import Table


@drop_in
class DPMSolverSinglestepScheduler(Solver, diffusers.DPMSolverSinglestepScheduler):
    """diffusers' :class:`DPMSolverSinglestepScheduler` with one kernel call per step (docs/schedulers.md)."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        plan = self._ready()
        i = self._begin(plan, timestep)
        config, outputs, m = self.config, self.model_outputs, model_output
        order = self.order_list[i]
        while order > 1 and outputs[1 - order] is None:
            order -= 1
        table = self._table(plan, order)
        to_noise = config.algorithm_type == "dpmsolver"
        if not table.finite[i] or (plan.threshold and to_noise):
            return super().step(model_output, timestep, sample, generator, return_dict)
        if m.shape != sample.shape and config.variance_type in ("learned", "learned_range"):
            if config.prediction_type == "epsilon":
                m = m[:, :3]  # diffusers: of the learned variances nothing is used
        history = [self.sample, *outputs[: -order : -1]] if order > 1 else []  # the start, m1, m2
        x, m, *history = matched(sample, m, *history)
        noise, seed = False, None
        if config.algorithm_type.startswith("sde"):
            noise, seed = plan.noise.take(self.noise, i, generator, m)
        prev, x0 = x0_step(plan, table, i, x, m, tuple(history), None, noise, seed)
        outputs.append(x0)
        del outputs[0]
        if order == 1:
            self.sample = sample
        self._step_index = i + 1
        return output(SchedulerOutput, prev_sample=prev) if return_dict else (prev,)

    def _table(self, plan, order):
        table = plan.tables.get(order)
        if table is None:
            config, count = self.config, len(plan.times)
            sigmas, levels = self._run_levels(plan)
            to, now = levels.at(slice(1, None)), levels.at(slice(0, -1))
            start = _dpm.shifted(levels, count, order - 1)
            x, m, s = _dpm.singlestep(config.algorithm_type, config.solver_type, order, to, now,
                                      _dpm.shifted(levels, count, 1), start)
            A, B = _dpm.conversion(config.prediction_type, config.algorithm_type == "dpmsolver", now, sigmas[:-1],
                                   "DPMSolverSinglestepScheduler")
            columns = {"c1": x} if order == 1 else {"c2": x}  # h1 is the sample of the start
            columns |= dict(zip(("c0", "c3", "c4"), m, strict=False))
            table = plan.tables[order] = Table(count, A=A, B=B, s=s, **columns)
        return table
