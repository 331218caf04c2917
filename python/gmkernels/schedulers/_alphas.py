"""What the schedulers with `alphas_cumprod` share: their prediction types, `add_noise` and `get_velocity`."""

import torch

from .. import ops
from ._base import broadcast
from ._table import Table


def prediction(kind, a, name):
    """(A, B) of x0 = A x + B model_output where x = sqrt(a) x0 + sqrt(1 - a) noise; a is a tensor."""
    alpha, sigma = a.sqrt().double(), (1 - a).sqrt().double()
    if kind == "epsilon":
        return 1 / alpha, -sigma / alpha
    if kind == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "v_prediction":
        return alpha, -sigma
    raise ValueError(f"prediction_type must be epsilon, sample or v_prediction for {name}, got {kind!r}")


def cumulative_at(alphas, times, end, real):
    """The cumulative alphas at `times`; `end` before the first one, NaN beyond the last one."""
    known = torch.cat([alphas.cpu(), end.cpu().reshape(1), torch.full((1,), torch.nan, device="cpu")]).to(real)
    return known[[len(alphas) if t < 0 else t if t < len(alphas) else -1 for t in times]]


class Alphas:
    """`add_noise` and `get_velocity` by a table over all training times, read on the device."""

    def _mixed(self, what, original, noise, timesteps):
        original, noise = broadcast(timesteps.numel(), original, noise)
        table = self._training_table(what, original.dtype)
        rows = table.stacked(original.device, original.dtype)[timesteps.to(original.device).flatten()]
        if rows.shape[0] == 1:
            rows = rows[0]
        return ops.diffusion_step(original, noise, rows)

    def _training_table(self, what, dtype):
        plan = self._ready()
        if self.corrected and dtype in (torch.bfloat16, torch.float16):
            dtype = torch.float32
        table = plan.tables.get((what, dtype))
        if table is None:
            # diffusers rounds alphas_cumprod to the dtype of the samples: in bfloat16 the first ones become 1, and no
            # noise is added at all (PR #9004). Corrected: float64 whatever the dtype.
            a = self.alphas_cumprod.cpu().to(torch.float64 if self.corrected else dtype)
            signal, spread = a.sqrt().double(), (1 - a).sqrt().double()
            columns = {"c0": spread, "c1": signal} if what == "noise" else {"c0": signal, "c1": -spread}
            table = plan.tables[what, dtype] = Table(len(a), B=1.0, **columns)
        return table

    def add_noise(self, original_samples, noise, timesteps):
        return self._mixed("noise", original_samples, noise, timesteps)

    def get_velocity(self, sample, noise, timesteps):
        return self._mixed("velocity", sample, noise, timesteps)
