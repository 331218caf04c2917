"""The coefficients of every step of a run, made once on the host, and given out as tensors on the device that asks."""

from functools import cached_property

import torch

from ..ops.diffusion import COEFFICIENTS


class Table:
    """`count` rows ``(A, B, c0, c1, c2, c3, c4, s)`` of :func:`gmkernels.ops.diffusion_step`, float64.

    Each column is a float or a tensor [count] on the CPU; one that is not given is 0.
    """

    def __init__(self, count, **columns):
        self.rows = torch.zeros(count, len(COEFFICIENTS), dtype=torch.float64, device="cpu")
        for name, column in columns.items():
            self.rows[:, COEFFICIENTS.index(name)] = column if isinstance(column, float) else column.double()
        self.finite = self.rows.float().isfinite().all(1).tolist()  # as the kernel would read them
        self._on = {}
        self._parts = None

    def stacked(self, device, dtype):
        """All rows [count, 8] on `device`, fit for x of `dtype`. The first call for a device copies."""
        return self._given(device, dtype)[0]

    def row(self, i, x):
        """Row i as a tensor [8], fit for x."""
        return self._given(x.device, x.dtype)[1][i]

    @cached_property
    def narrow(self):
        """The rows on the CPU, fit for all but float64."""
        return self._given(torch.device("cpu"), torch.float32)[1]

    @cached_property
    def wide(self):
        return self._given(torch.device("cpu"), torch.float64)[1]

    def _given(self, device, dtype):
        wide = dtype is torch.float64
        given = self._on.get((device, wide))
        if given is None:
            with torch.inference_mode(False):  # a schedule that was made for inference may be used with gradients
                stacked = self.rows.to(device, torch.float64 if wide else torch.float32, copy=True)
            given = self._on[device, wide] = stacked, stacked.unbind()
        return given

    def prepare(self, device):
        """What the steps on `device` will need, so that none of them copies."""
        self._given(torch.device(device), torch.float32)

    def parts(self):
        """(x0 alone, the step from a given x0): for an x0 that something changes which the kernel cannot do."""
        if self._parts is None:
            columns = dict(zip(COEFFICIENTS, self.rows.unbind(1), strict=True))
            count = len(self.rows)
            self._parts = (Table(count, A=columns["A"], B=columns["B"], c0=1.0),
                           Table(count, **columns | {"A": 0.0, "B": 1.0}))
        return self._parts
