"""Expectation maximisation over rows in memory and over streams."""

import collections
import dataclasses
import math

import torch

from .. import _patterns, ops
from . import _missing


class Memory:
    """Rows in memory. Those that lack entries are grouped by pattern once; those without any entry count nowhere."""

    def __init__(self, x, weights, allow_tf32=False):
        self.dtype, self.ahead, self.allow_tf32 = x.dtype, int(x.is_cuda), bool(allow_tf32)
        self.x, self.weights, self.patterns, self.pattern_weights = x, weights, None, None
        if bool(x.sum().isfinite()):  # no NaN
            self.x = x.contiguous()
            return
        missing = x.isnan()
        some, nothing = missing.any(1), missing.all(1)
        rows = some & ~nothing
        self.x = x[~some]
        self.weights = None if weights is None else weights[~some]
        if bool(rows.any()):
            self.patterns = _patterns.Patterns(x[rows])
            self.pattern_weights = None if weights is None else weights[rows]

    def statistics(self, parameters, initial=None):
        stat = ops.gmm_em_statistics(self.x, parameters.log_weights, parameters.means, parameters.precisions_cholesky,
                                     parameters.covariance_type, sample_weight=self.weights, initial=initial,
                                     allow_tf32=self.allow_tf32)
        if self.patterns is not None:
            stat = stat + _missing.statistics(self.patterns, self.pattern_weights, parameters, stat.shift)
        return stat


class Blocks:
    """A stream of rows: every E-step reads it from the start."""

    ahead = 0  # reading it once in vain costs more than waiting

    def __init__(self, stream, allow_tf32=False):
        self.stream, self.dtype, self.allow_tf32 = stream, stream.dtype, bool(allow_tf32)

    def statistics(self, parameters):
        stat = None
        for rows, weights in self.stream.blocks():
            stat = Memory(rows, weights, self.allow_tf32).statistics(parameters, stat)
        return stat


@dataclasses.dataclass
class Fit:
    parameters: ops.GmmParameters
    lower_bounds: list
    converged: bool
    stopped: bool = False  # by the callback

    @property
    def lower_bound(self):
        return self.lower_bounds[-1] if self.lower_bounds else -math.inf


def run(rows, parameters, *, tol, max_iter, reg_covar, lower_bound=-math.inf, report=None, callback=None):
    """EM from ``parameters`` until the mean log-likelihood changes by less than tol: scikit-learn's loop."""
    fit = Fit(parameters, [], False)
    for n_iter, (fit.parameters, numbers) in enumerate(_iterations(rows, parameters, reg_covar, max_iter), 1):
        before = lower_bound
        lower_bound, failed = numbers()
        if failed or not math.isfinite(lower_bound):
            raise ValueError(NOT_FINITE)
        fit.lower_bounds.append(lower_bound)
        if report:
            report.iteration(n_iter, lower_bound - before)
        fit.stopped = callback is not None and bool(callback(n_iter, lower_bound, lower_bound - before))
        if abs(lower_bound - before) < tol:
            fit.converged = True
            break
        if fit.stopped:
            break
    return fit


def _iterations(rows, parameters, reg_covar, max_iter):
    """Of each iteration: parameters, and a function that waits for its mean log-likelihood and whether it failed.

    A GPU is given rows.ahead iterations more before that, so that it has work while the host decides whether to go on;
    if not, nobody asks for theirs.
    """
    begun = collections.deque()
    for _ in range(max_iter):
        stat = rows.statistics(parameters)
        parameters = ops.gmm_m_step(stat, reg_covar=reg_covar, dtype=rows.dtype)
        failed = (parameters.status == 3).any()
        begun.append((parameters, _reader(torch.stack([stat.log_likelihood / stat.weight, failed.double()]))))
        if len(begun) > rows.ahead:
            yield begun.popleft()
    yield from begun


def _reader(numbers):
    """A function that waits for these numbers, and not for what the GPU is given after them."""
    if not numbers.is_cuda:
        return numbers.tolist
    copy, done = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record(torch.cuda.current_stream(numbers.device))

    def read():
        done.synchronize()
        return copy.tolist()

    return read


NOT_FINITE = ("Fitting the mixture model failed because the likelihood is not finite: the values of X are too large for"
               " their dtype. Scale the input data.")


def to(parameters, device, dtype):
    """The same on another device, in another dtype."""
    tensors = {name: getattr(parameters, name).to(device=device, dtype=dtype)
               for name in ("weights", "log_weights", "means", "covariances", "precisions_cholesky")}
    return dataclasses.replace(parameters, status=parameters.status.to(device), **tensors)


def blend(parameters, stat, step, reg_covar, lower_bound):
    """Stepwise EM: the statistics that ``parameters`` are the M-step of, moved a step towards the new ones.

    Both per unit of weight. So parameters are all the state there is.
    """
    kind, d = parameters.covariance_type, parameters.means.shape[1]
    w, delta = parameters.weights.double(), parameters.means.double() - stat.shift
    covariance = parameters.covariances.double()
    if kind in ("full", "tied"):
        covariance = covariance - reg_covar * torch.eye(d).to(covariance)
        outer = delta[:, :, None] * delta[:, None, :] * w[:, None, None]
        s2 = covariance * w[:, None, None] + outer if kind == "full" else covariance * w.sum() + outer.sum(0)
    elif kind == "diag":
        s2 = w[:, None] * (covariance - reg_covar + delta**2)
    else:
        s2 = w * (d * (covariance - reg_covar) + (delta**2).sum(1))
    old = ops.GmmStatistics.of(w, w[:, None] * delta, s2, w.new_tensor(lower_bound), w.sum(), stat.shift, kind)
    return old * (1 - step) + stat * (step / stat.weight)
