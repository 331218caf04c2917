"""What the schedulers that count their steps share: the index, `add_noise` by noise levels, the input's scale."""

import numpy as np
import torch

from .. import ops
from ._base import Fused, broadcast
from ._table import Table


class Sigmas(Fused):
    """For schedulers with `sigmas` and `step_index`."""

    _must_be_set = False  # is a step before set_timesteps an error, or one on the training schedule
    _absent_is_last = False  # index_for_timestep of a time that is not in the schedule: the last index, or an error

    _source_name = "sigmas"

    def index_for_timestep(self, timestep, schedule_timesteps=None):
        """Without a read from the device if `timestep` is a view of `scheduler.timesteps`, or a number."""
        if schedule_timesteps is not None and schedule_timesteps is not self.timesteps:
            return super().index_for_timestep(timestep, schedule_timesteps)
        plan = self._ready()
        return self._index_of(plan, plan.time(timestep))

    def _index_of(self, plan, t):
        i = plan.indices().get(float(np.float32(t)) if plan.single else t)
        if i is not None:
            return i
        if self._absent_is_last:
            return len(plan.times) - 1
        raise IndexError(f"timestep must be one of scheduler.timesteps, got {t}")

    def _begin(self, plan, timestep):
        """The index of this step. The first one of a run finds it, the others count."""
        if self._must_be_set and getattr(self, "num_inference_steps", None) is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        i = self._step_index
        if i is None:
            i = self._begin_index
            if i is None:
                i = self._index_of(plan, plan.time(timestep))
            self._step_index = i
        if not 0 <= i < len(plan.times):
            raise IndexError(f"the schedule has {len(plan.times)} steps and all are done: call set_timesteps")
        return i

    def _levels(self):
        """The noise levels on the CPU, in the precision of the coefficients."""
        return self.sigmas.cpu().to(self._real())

    def _signal_and_noise(self, sigma):
        """x = signal x0 + noise n at `sigma`."""
        return torch.ones_like(sigma), sigma

    def _mixed(self, original, noise, timesteps):
        original, noise = broadcast(timesteps.numel(), original, noise)
        plan = self._ready()
        dtype = original.dtype
        table = plan.tables.get(("noise", dtype))
        if table is None:  # diffusers rounds the levels to the dtype of the samples first
            sigma = self.sigmas.cpu().to(torch.float64 if self.corrected else dtype)
            signal, level = self._signal_and_noise(sigma)
            table = plan.tables["noise", dtype] = Table(len(sigma), B=1.0, c0=level, c1=signal)
        if self._begin_index is None:
            at = [self._index_of(plan, t) for t in timesteps.flatten().tolist()]
        else:
            at = [self._begin_index if self._step_index is None else self._step_index]
        if len(set(at)) == 1:
            rows = table.row(at[0], original)
        else:
            rows = table.stacked(original.device, dtype)[torch.tensor(at, device=original.device)]
        return ops.diffusion_step(original, noise, rows)


class Noised(Sigmas):
    """For those that have `add_noise`; the flow matching ones have `scale_noise`."""

    def add_noise(self, original_samples, noise, timesteps):
        return self._mixed(original_samples, noise, timesteps)


class Scaled(Noised):
    """For those whose model sees ``sample / sqrt(sigma^2 + 1)``."""

    def _input_scales(self):
        sigma = self.sigmas.cpu().to(self._real())
        return ((sigma**2 + 1) ** 0.5).tolist()

    def _scale_index(self, plan, timestep):
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self._index_of(plan, plan.time(timestep)) if begin is None else begin
        return self._step_index

    def _scales(self, plan):
        scales = plan.tables.get("input")
        if scales is None:
            scales = plan.tables["input"] = self._input_scales()
        return scales

    def scale_model_input(self, sample, timestep):
        plan = self._ready()
        i = self._scale_index(plan, timestep)
        self.is_scale_input_called = True
        return sample / self._scales(plan)[i]


def float_time(timestep, name):
    if type(timestep) is int or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
        raise ValueError(f"timestep of {name}.step must be one of scheduler.timesteps, got an integer;"
                         " an index, as from enumerate(timesteps), is not a timestep")
