"""`step` of the DPM-Solver multistep family. The history is diffusers' own `model_outputs`."""

from diffusers.schedulers.scheduling_utils import SchedulerOutput

from . import _dpm
from ._base import alike, attempt, matched, output, x0_step
from ._solver import Solver
from ._table import Table


class Multistep(Solver):
    """A subclass has `_conversion(levels)`: (A, B) of the converted output."""

    def _fused_step(self, model_output, timestep, sample, generator, noise, noise_dtype, return_dict):
        """None: diffusers' own step has to do it. `noise`: a tensor that was given, or None; `noise_dtype`: in which
        diffusers draws it."""
        plan = self._ready()
        i = self._begin(plan, timestep)
        outputs = self.model_outputs
        highest, stochastic, solver_order = plan.tables.get("facts") or self._facts(plan)
        order = min(highest[i], self.lower_order_nums + 1)
        table = plan.tables.get(order) or self._table(plan, order)
        if not table.finite[i] or (plan.threshold and self._to_noise()):
            return None
        result = None
        if not stochastic and plan.threshold is None:
            result = attempt(table, i, sample, model_output, tuple(outputs[-1 : -order : -1]), None, plan.clip)
        if result is None:
            result = self._any_step(plan, table, i, order, model_output, sample, generator, noise, noise_dtype)
        prev, x0 = result
        outputs.append(x0)
        del outputs[0]
        if self.lower_order_nums < solver_order:
            self.lower_order_nums += 1
        self._step_index = i + 1
        return output(SchedulerOutput, prev_sample=prev) if return_dict else (prev,)

    def _any_step(self, plan, table, i, order, model_output, sample, generator, noise, noise_dtype):
        outputs, stochastic = self.model_outputs, plan.tables["facts"][1]
        x, m, *history = matched(sample, model_output, *outputs[-1 : -order : -1])  # m1, m2
        dtype, seed = x.dtype, None
        if not stochastic:
            noise = False
        elif noise is None:
            noise, seed = plan.noise.take(self.noise, i, generator, m, noise_dtype)
        else:
            noise = noise.to(m.device, noise_dtype or noise.dtype)
        if noise is not False and noise is not True and noise.dtype is not dtype:
            x, m, noise, *history = alike(x, m, noise, *history)
        prev, x0 = x0_step(plan, table, i, x, m, tuple(history), None, noise, seed)
        return (prev, x0) if prev.dtype is dtype else (prev.to(dtype), x0.to(dtype))

    def _to_noise(self):
        """Is the converted output the noise? Then a threshold, which is for x0, needs more than the table holds."""
        return self.config.algorithm_type in ("dpmsolver", "sde-dpmsolver")

    def _facts(self, plan):
        """(the order of each step where the history is long enough, is there noise, solver_order)"""
        config, count = self.config, len(plan.times)
        short = config.lower_order_final and count < 15
        highest = [config.solver_order] * count
        if short and count > 1:
            highest[-2] = min(highest[-2], 2)
        if config.euler_at_final or short or config.final_sigmas_type == "zero":
            highest[-1:] = [1]
        facts = plan.tables["facts"] = highest, config.algorithm_type.startswith("sde"), config.solver_order
        return facts

    def _table(self, plan, order):
        table = plan.tables.get(order)
        if table is None:
            config, count = self.config, len(plan.times)
            sigmas, levels = self._run_levels(plan)
            now, before, before2 = (_dpm.shifted(levels, count, by) for by in range(3))
            to = levels.at(slice(1, None))
            c1, m, s = _dpm.multistep(config.algorithm_type, config.solver_type, order, to, now, before, before2)
            A, B = self._conversion(now, sigmas[:-1])
            table = Table(count, A=A, B=B, c1=c1, s=s, **dict(zip(("c0", "c2", "c3"), m, strict=False)))
            plan.tables[order] = table
        return table
