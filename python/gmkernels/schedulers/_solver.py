"""What the solvers in log signal-to-noise ratio share (DPM-Solver, UniPC): the levels of a run."""

from . import _dpm
from ._sigmas import Noised


class Solver(Noised):
    """A subclass has `_table(plan, order)`, or `_tables` of its own."""

    _absent_is_last = True
    _must_be_set = True

    def _kind(self):
        return "flow" if self.config.use_flow_sigmas else "vp"

    def _signal_and_noise(self, sigma):
        return _dpm.signal_and_noise(sigma, self._kind())

    def _run_levels(self, plan):
        """(the noise levels of the run, one more than its steps, and what they are as signal and noise)"""
        sigmas, count = self._levels(), len(plan.times)
        if len(sigmas) != count + 1:
            raise ValueError(f"sigmas must be one more than the {count} timesteps, got {len(sigmas)}")
        return sigmas, _dpm.Levels(sigmas, self._kind())

    def _tables(self, plan):
        return [self._table(plan, order) for order in range(1, self.config.solver_order + 1)]
