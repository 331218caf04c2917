"""Euler's step in the noise level, Karras et al. 2022, algorithm 2: with its churn, for any denoiser affine in x."""

import torch
from diffusers.utils import logging

from ._base import fused, matched, output
from ._sigmas import Scaled, float_time
from ._table import Table

_log = logging.get_logger(__name__)


def level_prediction(kind, sigma, name):
    """(A, B) of x0 = A x + B model_output where x = x0 + sigma n and the model saw x / sqrt(sigma^2 + 1)."""
    if kind == "epsilon":
        return torch.ones_like(sigma), -sigma
    if kind in ("sample", "original_sample"):
        return torch.zeros_like(sigma), torch.ones_like(sigma)
    if kind == "v_prediction":
        return 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5
    raise ValueError(f"prediction_type must be epsilon, sample or v_prediction for {name}, got {kind!r}")


def line(sigma, to):
    """{c0, c1} of the point at `to` on the line from x at `sigma` to x0 at 0."""
    ratio = (to - sigma).double() / sigma.double()
    return {"c0": -ratio, "c1": 1 + ratio}


class Euler(Scaled):
    """`step` for a parent with churn. A subclass has `_denoiser(sigma, hat)`: (A, B) at x of level hat."""

    def _fused_step(self, result, model_output, timestep, sample, churn, generator, return_dict):
        """None: there are no finite coefficients, and diffusers' own step has to do it."""
        float_time(timestep, type(self).__name__)
        x, m = matched(sample, model_output)
        self._warn_unscaled()
        plan = self._ready()
        i = self._begin(plan, timestep)
        table, push = self._churned(plan, churn)
        if not table.finite[i]:
            return None
        if push is not None and push.noisy[i]:  # also where s_noise is 0
            noise, seed = plan.noise.take(self.noise, i, generator, model_output)
            if seed is None:
                noise = noise.to(x.dtype)
            x = fused(push, i, x, m, noise=noise, seed=seed, x0=False)
        prev, x0 = fused(table, i, x, m)
        self._step_index = i + 1
        if prev.dtype is not model_output.dtype:
            prev = prev.to(model_output.dtype)
        return output(result, prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _warn_unscaled(self):
        if not self.is_scale_input_called:
            _log.warning("scale_model_input should be called before step: the model expects a scaled input.")

    def _tables(self, plan):
        return [self._churned(plan, (0.0, 0.0, float("inf"), 1.0))[0]]

    def _churned(self, plan, churn):
        """(the step's table, that of the noise before it or None) for (s_churn, s_tmin, s_tmax, s_noise)."""
        found = plan.tables.get(churn)
        if found is None:
            s_churn, low, high, s_noise = churn
            levels = self._levels()
            sigma, to = levels[:-1], levels[1:]
            gamma = torch.where((sigma >= low) & (sigma <= high), min(s_churn / (len(levels) - 1), 2**0.5 - 1), 0.0)
            hat = sigma * (gamma.double() + 1).to(sigma.dtype)
            A, B = self._denoiser(sigma, hat)
            push = None
            if s_churn > 0:
                spread = torch.where(gamma > 0, s_noise * (hat**2 - sigma**2) ** 0.5, 0.0)
                push = Table(len(sigma), c1=1.0, s=spread)
                push.noisy = (gamma > 0).tolist()
            found = plan.tables[churn] = Table(len(sigma), A=A, B=B, **line(hat, to)), push
        return found
