"""Song et al. 2021."""

import diffusers
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from ._alphas import Alphas, cumulative_at, prediction
from ._base import Fused, drop_in, matched, output, x0_step
from ._table import Table


@drop_in
class DDIMScheduler(Alphas, Fused, diffusers.DDIMScheduler):
    """diffusers' :class:`DDIMScheduler` with one kernel call per step (docs/schedulers.md)."""

    def step(self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False, generator=None,
             variance_noise=None, return_dict=True):
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        x, m = matched(sample, model_output)
        if eta > 0 and variance_noise is not None and generator is not None:
            raise ValueError("only one of generator and variance_noise may be given")
        plan = self._ready()
        i = self._index(plan, plan.time(timestep))
        table = self._table(plan, float(eta), bool(use_clipped_model_output))
        if not table.finite[i]:
            return super().step(model_output, timestep, sample, eta, use_clipped_model_output, generator,
                                variance_noise, return_dict)
        noise, seed = False, None
        if eta > 0:
            if variance_noise is None:
                noise, seed = plan.noise.take(self.noise, i, generator, model_output)
            else:
                noise = variance_noise.to(sample.device)
        if not isinstance(noise, bool) and noise.dtype is not x.dtype:
            noise = noise.to(x.dtype)
        prev, x0 = x0_step(plan, table, i, x, m, () if use_clipped_model_output else (m,), None, noise, seed)
        return output(DDIMSchedulerOutput, prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _index(self, plan, t):
        """Any training time has a step, also one that is not in the schedule: its row is appended."""
        if "indices" not in plan.tables:
            plan.tables["times"] = list(plan.times)
            plan.tables["indices"] = {t: i for i, t in reversed(list(enumerate(plan.times)))}
        times, indices = plan.tables["times"], plan.tables["indices"]
        i = indices.get(t)
        if i is None:
            if not 0 <= t < self.config.num_train_timesteps or t != int(t):
                raise ValueError(f"timestep must be an integer below {self.config.num_train_timesteps}, got {t}")
            i = indices[t] = len(times)
            times.append(int(t))
            plan.tables.pop("step", None)
        return i

    def _tables(self, plan):
        return [self._table(plan, 0.0, False)]

    def _table(self, plan, eta, clipped):
        tables = plan.tables.setdefault("step", {})
        table = tables.get((eta, clipped))
        if table is None:
            table = tables[eta, clipped] = self._make(plan, eta, clipped)
        return table

    def _make(self, plan, eta, clipped):
        times = plan.tables.get("times", plan.times)
        before = [t - self.config.num_train_timesteps // self.num_inference_steps for t in times]
        if self.corrected:  # the schedule's own next time; the difference is that of "leading" only (issue #11347)
            before[: len(plan.times)] = [*plan.times[1:], -1]
        a, a_next = (cumulative_at(self.alphas_cumprod, at, self.final_alpha_cumprod, self._real())
                     for at in (times, before))
        variance = (1 - a_next) / (1 - a) * (1 - a / a_next)
        s = eta * variance.sqrt()
        direction = (1 - a_next - s**2).sqrt().double()  # of the noise that the model sees
        alpha, sigma = a.sqrt().double(), (1 - a).sqrt().double()
        A, B = prediction(self.config.prediction_type, a, "DDIMScheduler")
        c0 = a_next.sqrt().double()
        if clipped:  # that noise from the clipped x0
            columns = {"c0": c0 - direction * alpha / sigma, "c1": direction / sigma}
        elif self.config.prediction_type == "epsilon":  # from the model; h1 is its output
            columns = {"c0": c0, "c2": direction}
        elif self.config.prediction_type == "sample":
            columns = {"c0": c0, "c1": direction / sigma, "c2": -direction * alpha / sigma}
        else:
            columns = {"c0": c0, "c1": direction * sigma, "c2": direction * alpha}
        return Table(len(times), A=A, B=B, s=s, **columns)
