"""`GaussianMixture.fit`: which rows count, where EM starts, which of its runs is kept."""

import dataclasses
import math
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state

from . import _em, _ranks, _rows, _sklearn, _start


@dataclasses.dataclass(frozen=True)
class Progress:
    """What ``fit(callback=...)`` is told after every EM iteration."""

    init: int  # which of the n_init
    n_iter: int
    lower_bound: float  # mean log-likelihood of a row
    change: float


@dataclasses.dataclass
class Data:
    rows: object  # what an E-step reads: _em.Memory, _em.Blocks or _ranks.Shared
    x: torch.Tensor  # what the start works on: the rows that count, or a sample of them
    weights: torch.Tensor | None
    known: torch.Tensor  # [d]: the features that have an entry
    counted: int
    n: int  # rows, also those that do not count
    device: torch.device
    random_state: np.random.RandomState


def counted(x, weights):
    """The rows that count, weight above 0 and at least one entry; their weights; the features they have entries of."""
    counts = None if weights is None or bool((weights > 0).all()) else weights > 0
    known = None
    if not bool(x.sum().isfinite()):
        known = ~x.isnan()
        if counts is not None:
            known &= counts[:, None]
        counts, known = known.any(1), known.any(0)
    if counts is not None and not bool(counts.all()):
        x, weights = x[counts], None if weights is None else weights[counts]
    return x, weights, torch.full((x.shape[1],), len(x) > 0) if known is None else known.cpu()


def check_counted(known, counted, n_components):
    empty = (~known).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"Input X has features without any observed value: {empty}. Drop these columns.")
    if counted < n_components:
        raise ValueError(f"Expected n_samples >= n_components but got n_components = {n_components}, "
                         f"n_samples = {counted}")


def read(estimator, X, sample_weight, *, reset, part):
    """`Data` of the rows of this process; ``part``: there are others, so that here may be few."""
    _sklearn.check_parameters(estimator)
    random_state = check_random_state(estimator.random_state)
    if _rows.is_stream(X):
        stream = _rows.Stream(estimator, X, sample_weight, reset=reset, part=part)
        x, weights, known = counted(*stream.open(random_state))
        blocks = _em.Blocks(stream, estimator.allow_tf32)
        return Data(blocks, x, weights, known, len(x), stream.n, stream.device, random_state)
    x = _rows.check_rows(estimator, X, reset=reset, least_rows=0 if part else 2)
    n, weights = len(x), _rows.check_weights(sample_weight, len(x), x.dtype, x.device, part)
    x, weights, known = counted(x, weights)
    return Data(_em.Memory(x, weights, estimator.allow_tf32), x, weights, known, len(x), n, x.device, random_state)


def fit(estimator, X, sample_weight, callback, process_group):
    e = estimator
    warm = e.warm_start and hasattr(e, "converged_")
    before = e.lower_bound_ if warm else -math.inf

    def rows_here():
        return read(e, X, sample_weight, reset=not warm, part=process_group is not False)

    def start():
        if warm:
            return e._parameters(data.device, data.rows.dtype)
        return e._start(data.x, data.weights, data.random_state, data.device)

    ask, begin = callback, start
    if process_group is False:
        data = rows_here()
    else:
        ranks = _ranks.Ranks(process_group)
        data, before, asked = ranks.read(e, rows_here, warm, before, callback is not None)

        def begin():
            made = ranks.from_first(lambda: _em.to(start(), "cpu", data.rows.dtype))
            return _em.to(made, data.device, data.rows.dtype)

        if asked:
            def ask(progress):
                return any(ranks.exchange(lambda: callback is not None and bool(callback(progress))))
    check_counted(data.known, data.counted, e.n_components)

    report, best = _sklearn.Report(e), None
    for init in range(1 if warm else e.n_init):
        report.begin(init)
        told = ask and (lambda *now, init=init: ask(Progress(init, *now)))
        run = _em.run(data.rows, begin(), tol=e.tol, max_iter=e.max_iter, reg_covar=e.reg_covar, lower_bound=before,
                      report=report, callback=told)
        if e.max_iter:
            report.end(run.lower_bound, run.converged)
        if best is None or run.lower_bound > best.lower_bound or best.lower_bound == -math.inf:
            best = run
        if run.stopped:
            break
    if not best.converged and not best.stopped and e.max_iter > 0:
        warnings.warn("Best performing initialization did not converge. Try different init parameters, or increase"
                      " max_iter, tol, or check for degenerate data.", ConvergenceWarning, stacklevel=3)
    if not e.max_iter and e.weights_init is None:
        best.parameters = _start.normalised(best.parameters)
    e._keep(best.parameters, X)
    e.converged_, e.n_iter_ = best.converged, len(best.lower_bounds)
    e.lower_bound_, e.lower_bounds_ = best.lower_bound, best.lower_bounds
    for name in ("threshold_", "contamination_"):
        e.__dict__.pop(name, None)
