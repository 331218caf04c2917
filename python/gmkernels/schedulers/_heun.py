"""Heun's method: a step to the next level, then a step from the same start with the mean of both derivatives."""


class Heun:
    """The state of the first half is the parent's `sample` and `dt`, and `_half`: what its derivative is made of."""

    _half = None

    def _levels_of_halves(self):
        """(sigma, next) of the first half at each index, and of the second."""
        levels = self._levels()
        first = levels[:-1], levels[1:]
        before = levels.roll(1)[:-1]  # that of index 0 is not used
        return first, (before, levels[:-1])

    def _hand_over(self, derivative):
        """The parent's step follows: give it the derivative of the first half, if that was ours."""
        if self.dt is not None and self._half is not None:
            self.prev_derivative = derivative(self._half)
        self._half = None

    def _keep(self, i, sample, half):
        self.sample, self.dt, self._half = sample, self.sigmas[i + 1] - self.sigmas[i], half

    def _forget(self):
        self.prev_derivative = self.dt = self.sample = self._half = None
