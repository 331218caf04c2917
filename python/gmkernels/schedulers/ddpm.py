"""Ho et al. 2020."""

import diffusers
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

from ._alphas import Alphas, cumulative_at, prediction
from ._base import Fused, drop_in, matched, output, x0_step
from ._table import Table

_LEARNED = ("learned", "learned_range")


@drop_in
class DDPMScheduler(Alphas, Fused, diffusers.DDPMScheduler):
    """diffusers' :class:`DDPMScheduler` with one kernel call per step (docs/schedulers.md)."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        plan = self._ready()
        if self.variance_type != self.config.variance_type:  # diffusers reads the one here and the other there
            return super().step(model_output, timestep, sample, generator, return_dict)
        log_variance = None
        if self.variance_type in _LEARNED:
            if model_output.dim() < 2 or model_output.shape[1] != 2 * sample.shape[1]:
                raise ValueError(f"model_output must have {2 * sample.shape[1]} channels for variance_type"
                                 f" {self.variance_type!r}, got shape {tuple(model_output.shape)}")
            model_output, log_variance = model_output.split(sample.shape[1], 1)
        x, m, *v = matched(sample, model_output, *(() if log_variance is None else (log_variance,)))
        t = plan.time(timestep)
        i = self._index(plan, t)
        table = self._table(plan)
        if not table.finite[i]:
            if log_variance is not None:
                model_output = torch.cat([model_output, log_variance], 1)
            return super().step(model_output, timestep, sample, generator, return_dict)
        noise, seed, variance = False, None, None
        if t > 0:
            noise, seed = plan.noise.take(self.noise, i, generator, model_output)
            if seed is None:
                noise = noise.to(x.dtype)
            if v:
                variance = v[0] if self.variance_type == "learned" else self._in_range(plan, i, v[0])
        prev, x0 = x0_step(plan, table, i, x, m, (), variance, noise, seed)
        return output(DDPMSchedulerOutput, prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _index(self, plan, t):
        indices = plan.tables.get("indices")
        if indices is None:
            indices = plan.tables["indices"] = {t: i for i, t in reversed(list(enumerate(self._times(plan))))}
        i = indices.get(t)
        if i is None:
            raise ValueError(f"timestep must be one of scheduler.timesteps, got {t}")
        return i

    def _times(self, plan):
        if self.custom_timesteps or self.num_inference_steps:
            return plan.times
        return list(range(self.config.num_train_timesteps - 1, -1, -1))  # set_timesteps was not called

    def _tables(self, plan):
        return [self._table(plan)]

    def _table(self, plan):
        table = plan.tables.get(self.variance_type)
        if table is not None:
            return table
        times = self._times(plan)
        before = [*times[1:], -1]
        real, kind = self._real(), self.variance_type
        one = torch.ones(1, device="cpu")
        a, a_next = (cumulative_at(self.alphas_cumprod, at, one, real) for at in (times, before))
        alpha = a / a_next
        beta = 1 - alpha
        small = ((1 - a_next) / (1 - a) * beta).clamp(min=1e-20)
        if kind == "fixed_small":
            s = small.sqrt()
        elif kind == "fixed_small_log":
            s = (0.5 * small.log()).exp()
        elif kind == "fixed_large":
            s = beta.sqrt()
        elif kind == "fixed_large_log":  # diffusers takes the root of the logarithm: not a number
            s = beta.sqrt() if self.corrected else beta.log().sqrt()
        elif kind in _LEARNED:
            s = torch.ones_like(beta)
            plan.tables["range"] = small.log().double().tolist(), beta.log().double().tolist()
        else:
            raise ValueError(f"variance_type must be fixed_small, fixed_small_log, fixed_large, fixed_large_log,"
                             f" learned or learned_range, got {kind!r}")
        s = torch.where(torch.tensor(times, device="cpu") > 0, s, 0.0)
        A, B = prediction(self.config.prediction_type, a, "DDPMScheduler")
        table = Table(len(times), A=A, B=B, c0=a_next.sqrt() * beta / (1 - a), c1=alpha.sqrt() * (1 - a_next) / (1 - a),
                      s=s)
        plan.tables[kind] = table
        return table

    @staticmethod
    def _in_range(plan, i, v):
        """Nichol & Dhariwal 2021, equation 15: between the two logarithms."""
        low, high = (logs[i] for logs in plan.tables["range"])
        return torch.exp((v + 1) * (0.5 * (high - low)) + low)
