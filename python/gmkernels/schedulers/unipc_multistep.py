"""UniPC: predictor and corrector; Zhao et al. 2023."""

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from .. import ops
from . import _dpm, _unipc
from ._base import attempt_twice, drop_in, fused, fused_twice, matched, output
from ._solver import Solver
from ._table import Table


@drop_in
class UniPCMultistepScheduler(Solver, diffusers.UniPCMultistepScheduler):
    """diffusers' :class:`UniPCMultistepScheduler` with one kernel call per step, corrector and
    predictor in one; three of order 3 (docs/schedulers.md)."""

    def step(self, model_output, timestep, sample, return_dict=True):
        plan = self._ready()
        i = self._begin(plan, timestep)
        outputs, lower = self.model_outputs, self.lower_order_nums
        highest, solver_order = plan.tables.get("facts") or self._facts(plan)
        order = min(highest[i], lower + 1)
        correct = self.last_sample is not None and i > 0 and i - 1 not in self.disable_corrector
        route = (order, self.this_order if correct else 0)
        possible, predict, mend = plan.tables.get(route) or self._route(plan, route)
        if not possible[i] or self.solver_p is not None or (plan.threshold and not self.predict_x0):
            return super().step(model_output, timestep, sample, return_dict)
        result = None
        if 0 < route[1] < 3 and not plan.threshold:
            # x the sample, h1 the last one, h2 and h3 its m0 and m1
            history = (self.last_sample, *outputs[:-3:-1])
            result = attempt_twice(mend, predict.parts()[1], i, sample, model_output, history, history[1:order])
        prev, x, m = result or self._any_step(plan, i, order, mend, predict, model_output, sample)
        for history, newest in ((outputs, m), (self.timestep_list, timestep)):
            history.append(newest)
            del history[0]
        self.this_order, self.last_sample = order, x
        if lower < solver_order:
            self.lower_order_nums = lower + 1
        self._step_index = i + 1
        return output(SchedulerOutput, prev_sample=prev) if return_dict else (prev,)

    def _any_step(self, plan, i, order, mend, predict, model_output, sample):
        """(next sample, corrected sample, converted output); `mend`: the corrector or None"""
        # m0, m1, m2 of the step before
        x, m, last, *earlier = matched(sample, model_output, self.last_sample, *self.model_outputs[::-1])
        before, after = tuple(earlier[: order - 1]), predict.parts()[1]
        if plan.threshold:
            convert = self._predictor(plan, 1).parts()[0].row(i, x)
            m = ops.diffusion_step(x, m, convert, dynamic_threshold=plan.threshold)
            mend = mend and mend.parts()[1]
        if mend and self.this_order < 3:
            prev, x, m = fused_twice(mend, after, i, x, m, (last, *earlier[:2]), before)
        elif mend:
            x, m = fused(mend, i, x, m, tuple(earlier[:3]))
            x = ops.diffusion_step(x, last, plan.tables["last"].row(i, x), out=None if x.requires_grad else x)
            prev = fused(after, i, x, m, before, x0=False)
        elif plan.threshold:
            prev = fused(after, i, x, m, before, x0=False)
        else:
            prev, m = fused(predict, i, x, m, before)
        return (prev, x, m) if prev.dtype is sample.dtype else (prev.to(sample.dtype), x.to(sample.dtype), m)

    def _route(self, plan, route):
        """(is there a fused form, by step; the predictor; the corrector or None)"""
        order, last_order = route
        if order > 3 or last_order > 3:
            return plan.tables.setdefault(route, ([False] * len(plan.times), None, None))
        predict, mend = self._predictor(plan, order), self._corrector(plan, last_order) if last_order else None
        possible = [a and (mend is None or b) for a, b in zip(predict.finite, (mend or predict).finite, strict=True)]
        return plan.tables.setdefault(route, (possible, predict, mend))

    def _facts(self, plan):
        """(the order of each step where the history is long enough, solver_order)"""
        most, count = self.config.solver_order, len(plan.times)
        highest = [min(most, count - i) if self.config.lower_order_final else most for i in range(count)]
        facts = plan.tables["facts"] = highest, most
        return facts

    def _tables(self, plan):
        tables = []
        for order in range(1, min(self.config.solver_order, 3) + 1):
            for table in (self._predictor(plan, order), self._corrector(plan, order)):
                tables += (table, table.parts()[1])
        return tables + [plan.tables[name] for name in ("last",) if name in plan.tables]

    def _common(self, plan):
        found = plan.tables.get("levels")
        if found is None:
            sigmas, levels = self._run_levels(plan)
            A, B = _dpm.conversion(self.config.prediction_type, not self.predict_x0, levels.at(slice(0, -1)),
                                   sigmas[:-1], "UniPCMultistepScheduler")
            found = plan.tables["levels"] = levels, A, B
        return found

    def _predictor(self, plan, order):
        table = plan.tables.get(("predictor", order))
        if table is None:
            levels, A, B = self._common(plan)
            count = len(plan.times)
            x, m = _unipc.predictor(levels, count, order, self.config.solver_type, self.predict_x0,
                                   self.corrected)
            columns = dict(zip(("c0", "c2", "c3"), m, strict=False))
            table = plan.tables["predictor", order] = Table(count, A=A, B=B, c1=x, **columns)
        return table

    def _corrector(self, plan, order):
        """history: the last sample, m0, m1. Of order 3: m0, m1, m2, and a call of its own adds the last sample."""
        table = plan.tables.get(("corrector", order))
        if table is None:
            levels, A, B = self._common(plan)
            count = len(plan.times)
            x, m, new = _unipc.corrector(levels, count, order, self.config.solver_type, self.predict_x0)
            if order == 3:
                plan.tables["last"] = Table(count, B=1.0, c0=x, c1=1.0)
            weights = m if order == 3 else [x, *m]
            columns = dict(zip(("c2", "c3", "c4"), weights, strict=False))
            table = plan.tables["corrector", order] = Table(count, A=A, B=B, c0=new, **columns)
        return table
