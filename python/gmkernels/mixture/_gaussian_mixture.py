"""`GaussianMixture`: scikit-learn's estimator on the fused kernels, with weights, missing values and streams."""

import math
import numbers
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from .. import _patterns, ops
from . import _derived, _em, _file, _fit, _rows, _sklearn, _start

_RESPONSIBILITIES = 1 << 22  # numbers of a block of them


class GaussianMixture(_sklearn.Parent):
    """Gaussian mixture: `sklearn.mixture.GaussianMixture` with its parameters, attributes and results, and

    - EM on fused kernels: nothing of size rows x components in memory, float64 sums about a centre, for float32 too;
    - ``sample_weight`` in ``fit`` and ``score``;
    - NaN everywhere: exact EM in ``fit``, the density of what is observed in ``score_samples``, ``impute``;
    - ``partial_fit``, and ``fit`` on batches and on memory-mapped files larger than memory;
    - ``condition`` and ``marginal``, ``anomaly_score`` and ``predict_outlier``, ``save`` and ``load``.

    Rows come as numpy arrays, pandas tables, lists or torch tensors. Tensors give tensors on their device; everything
    else numpy arrays, as in scikit-learn (``impute`` gives a table for a table). Fitted attributes are numpy arrays of
    the dtype of the rows: float32 stays float32, integers become float64.

    Parameters beyond scikit-learn's
    --------------------------------
    device : str, default="auto"
        "cpu", "cuda", "cuda:N". "auto": where a tensor is; for the rest a GPU if this build and torch have one.
    allow_tf32 : bool, default=False
        On a GPU, float32 and "full" or "tied": fewer digits for more speed in ``fit``. See `ops.gmm_em_statistics`.

    Attributes beyond scikit-learn's
    --------------------------------
    component_status_ : ndarray of shape (n_components,)
        0: healthy. Where scikit-learn raises "ill-defined empirical covariance" a component is recovered in every
        iteration, and a ``ConvergenceWarning`` says so when the last iteration did it: 1, dead (moved beside the
        heaviest component); 2, singular (a ridge on its covariance). See `gmkernels.ops.gmm_m_step`.
    threshold_, contamination_ : float
        After ``fit_threshold``.

    Differences from scikit-learn: no error for singular components, as above; with ``max_iter=0`` the weights sum to 1
    and ``covariances_`` is always there; ``sample`` keeps float32.

    >>> import numpy as np
    >>> X = np.array([[1.0, 2], [1, 4], [1, np.nan], [10, 2], [10, np.nan], [10, 0]])
    >>> gm = GaussianMixture(n_components=2, random_state=0).fit(X)
    >>> gm.predict([[0, 0], [12, 3]]).shape
    (2,)
    """

    _parameter_constraints = {**_sklearn.Parent._parameter_constraints, "device": [str], "allow_tf32": ["boolean"]}

    def __init__(self, n_components=1, *, covariance_type="full", tol=1e-3, reg_covar=1e-6, max_iter=100, n_init=1,
                 init_params="kmeans", weights_init=None, means_init=None, precisions_init=None, random_state=None,
                 warm_start=False, verbose=0, verbose_interval=10, device="auto", allow_tf32=False):
        super().__init__(n_components, covariance_type=covariance_type, tol=tol, reg_covar=reg_covar,
                         max_iter=max_iter, n_init=n_init, init_params=init_params, weights_init=weights_init,
                         means_init=means_init, precisions_init=precisions_init, random_state=random_state,
                         warm_start=warm_start, verbose=verbose, verbose_interval=verbose_interval)
        self.device, self.allow_tf32 = device, allow_tf32

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.array_api_support = False  # tensors are taken as they are, without array_api_dispatch
        return tags

    # fit --------------------------------------------------------------------------------------------------------------

    def fit(self, X, y=None, sample_weight=None, *, callback=None, process_group=False):
        """Estimates the parameters by EM: `n_init` times, the best likelihood is kept.

        Parameters
        ----------
        X : array-like or tensor of shape (n_samples, n_features), np.memmap, or batches
            NaN are entries that are not known; a row that has no entry counts nowhere. Batches are a DataLoader or any
            object whose ``iter`` starts again: every EM iteration reads them once, a block of rows at a time. The first
            pass over batches and memory-mapped files keeps a seeded sample of 100,000 rows, on which the initialisation
            works; from the same start the result is that of the rows in memory, whatever the batches.
        y : ignored
        sample_weight : array-like of shape (n_samples,), default=None
            Not negative. A row of weight 2 counts as two rows, one of weight 0 as none.
        callback : callable, default=None
            Called with a `Progress` after every iteration; a true result stops the iterations.
        process_group : torch.distributed.ProcessGroup or None, default=False
            Every process of the group calls ``fit`` with rows of its own (an array of shape (0, n_features) where it
            has none), and all get the fit of the rows together. None is the default group, as everywhere in torch.
            False: all rows are here.

        Returns
        -------
        self
        """
        _fit.fit(self, X, sample_weight, callback, process_group)
        return self

    def fit_predict(self, X, y=None, sample_weight=None):
        """``fit``, then ``predict`` of the same rows (not for batches)."""
        if _rows.is_stream(X) and not isinstance(X, np.memmap):
            raise TypeError("fit_predict takes an array; for batches use fit, then predict of every batch.")
        return self.fit(X, sample_weight=sample_weight).predict(X)

    def _start(self, x, weights, random_state, device):
        given = _sklearn.check_start(self, x.shape[1], np.float64)
        if any(part is None for part in given) and not bool(x.sum().isfinite()):
            x = _start.filled(x, weights, self.reg_covar)
        return _em.to(_start.start(self, x, weights, random_state, given), device, x.dtype)

    def partial_fit(self, X, y=None, sample_weight=None):
        """One step of stepwise EM on a batch of rows; the first batch also gives the start.

        The sufficient statistics s move towards those of the batch, both per row: ``s += step (s_batch - s)`` with
        ``step = (t + 2)^-0.6``, t the steps so far (``n_iter_``; iterations of ``fit`` count); then follows an M-step.
        The first step on an estimator that was not fitted is 1. Batches should have about the same number of rows, many
        times n_components. ``lower_bound_`` is the running mean of the log-likelihood of batches before their step.

        Source: Cappe and Moulines, "On-line expectation-maximization algorithm for latent data models", 2009.

        Parameters
        ----------
        X, y, sample_weight
            As in ``fit``, in memory.

        Returns
        -------
        self
        """
        _sklearn.check_parameters(self)
        first = not hasattr(self, "converged_")
        x = _rows.check_rows(self, X, reset=first)
        weights = _rows.check_weights(sample_weight, len(x), x.dtype, x.device)
        if first:
            x, weights, known = _fit.counted(x, weights)
            _fit.check_counted(known, len(x), self.n_components)
            before, t = self._start(x, weights, check_random_state(self.random_state), x.device), 0
        else:
            before, t = self._parameters(x.device, x.dtype), self.n_iter_
        stat = _em.Memory(x, weights, self.allow_tf32).statistics(before)
        if not bool(stat.sums.isfinite().all()):
            raise ValueError(_em.NOT_FINITE)
        if not first and float(stat.weight) == 0:
            return self  # nothing but rows without any entry
        if not first:
            stat = _em.blend(before, stat, (t + 2) ** -0.6, self.reg_covar, self.lower_bound_)
        self._keep(ops.gmm_m_step(stat, reg_covar=self.reg_covar, dtype=x.dtype), X)
        self.converged_, self.n_iter_ = False, t + 1
        self.lower_bound_ = float(stat.log_likelihood / stat.weight)
        self.lower_bounds_ = [self.lower_bound_]
        return self

    def _keep(self, parameters, X):
        """Parameters as scikit-learn's attributes."""
        factors = parameters.precisions_cholesky
        full = self.covariance_type in ("full", "tied")
        self.weights_, self.means_ = parameters.weights.cpu().numpy(), parameters.means.cpu().numpy()
        self.covariances_ = parameters.covariances.cpu().numpy()
        self.precisions_cholesky_ = factors.cpu().numpy()
        self.precisions_ = (factors @ factors.mT if full else factors**2).cpu().numpy()
        self.component_status_ = parameters.status.cpu().numpy()
        self._torch_device = str(X.device) if isinstance(X, torch.Tensor) else None
        if self.component_status_.any():
            which = ", ".join(f"{i} ({('', 'dead', 'singular')[s]})" for i, s in enumerate(self.component_status_) if s)
            warnings.warn(f"Components with an ill-defined empirical covariance (for instance caused by singleton or"
                          f" collapsed samples) were recovered: {which}. See component_status_. Try to decrease the"
                          " number of components, increase reg_covar, or scale the input data.",
                          ConvergenceWarning, stacklevel=4)

    def _parameters(self, device, dtype):
        def put(array):
            return torch.tensor(np.asarray(array), dtype=dtype, device=device)

        status = torch.zeros(len(self.weights_), dtype=torch.uint8, device=device)
        w = torch.tensor(self.weights_, dtype=torch.float64, device=device)
        return ops.GmmParameters(put(self.weights_), w.log().to(dtype), put(self.means_), put(self.covariances_),
                                 put(self.precisions_cholesky_), status, self.covariance_type)

    # use --------------------------------------------------------------------------------------------------------------

    def _rows(self, X):
        """X on the device in the common dtype of rows and parameters, parameters, rows with NaN (a mask) or None."""
        check_is_fitted(self)
        x = _rows.check_rows(self, X)
        dtype = torch.promote_types(x.dtype, torch.float32 if self.means_.dtype == np.float32 else torch.float64)
        x = x.to(dtype)
        missing = None if bool(x.sum().isfinite()) else x.isnan().any(1)
        return x, self._parameters(x.device, dtype), missing if missing is not None and bool(missing.any()) else None

    def score_samples(self, X):
        """Log-density of every row, of what is known of it: NaN are integrated out.

        Densities of rows that know different features are not comparable. A row of NaN only has 0.
        """
        x, p, missing = self._rows(X)
        out = ops.gmm_log_prob(x, p.log_weights, p.means, p.precisions_cholesky, p.covariance_type)
        if missing is not None:
            out[missing] = _patterns.log_prob(x[missing], _patterns.Mixture.of(p))
        return _rows.give_back(out, X)

    def score(self, X, y=None, sample_weight=None):
        """Mean of ``score_samples``, weighted by ``sample_weight``."""
        scores = self.score_samples(X)
        scores = scores.double().cpu().numpy() if isinstance(scores, torch.Tensor) else scores.astype(np.float64)
        weights = _rows.check_weights(sample_weight, len(scores), torch.float64, "cpu")
        return float(np.average(scores, weights=None if weights is None else weights.numpy()))

    def predict_proba(self, X):
        """Posterior probability of every component for every row, given what is known of it."""
        x, p, missing = self._rows(X)
        out = ops.gmm_responsibilities(x, p.log_weights, p.means, p.precisions_cholesky, p.covariance_type)
        if missing is not None:
            out[missing] = _patterns.responsibilities(x[missing], _patterns.Mixture.of(p))
        return _rows.give_back(out, X)

    def predict(self, X):
        """The likeliest component of every row, given what is known of it."""
        x, p, missing = self._rows(X)
        size = max(1, _RESPONSIBILITIES // len(self.weights_))
        labels = torch.cat([
            ops.gmm_responsibilities(block, p.log_weights, p.means, p.precisions_cholesky, p.covariance_type).argmax(1)
            for block in x.split(size)
        ])
        if missing is not None:
            labels[missing] = _patterns.responsibilities(x[missing], _patterns.Mixture.of(p)).argmax(1)
        return _rows.give_back(labels, X)

    def sample(self, n_samples=1):
        """Rows drawn from the mixture, and their components: scikit-learn's numbers for the same ``random_state``.

        In the dtype of the fit; tensors when it was fitted on tensors.
        """
        check_is_fitted(self)
        if n_samples < 1:
            raise ValueError(f"Invalid value for 'n_samples': {n_samples} . The sampling requires at least one sample.")
        rng = check_random_state(self.random_state)
        weights = self.weights_.astype(np.float64)
        counts = rng.multinomial(n_samples, weights if weights.sum() == 1 else weights / weights.sum())
        means, covariances = self.means_.astype(np.float64), self.covariances_.astype(np.float64)
        rows = []
        for c, count in enumerate(counts):
            covariance = covariances if self.covariance_type == "tied" else covariances[c]
            if self.covariance_type in ("full", "tied"):
                rows.append(rng.multivariate_normal(means[c], covariance, int(count)))
            else:
                rows.append(means[c] + rng.standard_normal(size=(count, means.shape[1])) * np.sqrt(covariance))
        X, y = np.vstack(rows).astype(self.means_.dtype), np.repeat(np.arange(len(counts)), counts)
        if self._torch_device is None:
            return X, y
        return torch.from_numpy(X).to(self._torch_device), torch.from_numpy(y).to(self._torch_device)

    # missing values ---------------------------------------------------------------------------------------------------

    def impute(self, X, n_draws=None):
        """X with its NaN replaced.

        Parameters
        ----------
        X : array-like, table or tensor of shape (n_samples, n_features)
            A row of NaN only gets the mean of the mixture.
        n_draws : int, default=None
            None: conditional expectations. An int: that many draws from the distribution of what is missing given what
            is known (multiple imputation), seeded by ``random_state``.

        Returns
        -------
        Of the kind of X: shape (n_samples, n_features), or with n_draws (n_draws, n_samples, n_features), for a table a
        list of n_draws tables.
        """
        if n_draws is not None and (not isinstance(n_draws, numbers.Integral) or n_draws < 1):
            raise ValueError(f"n_draws must be None or an int of at least 1, got {n_draws!r}")
        x, p, missing = self._rows(X)
        out = x.clone() if n_draws is None else x.repeat(n_draws, 1, 1)
        if missing is not None and n_draws is None:
            out[missing] = _patterns.impute(x[missing], _patterns.Mixture.of(p))
        elif missing is not None:
            out[:, missing] = _patterns.draw(x[missing], _patterns.Mixture.of(p), n_draws,
                                              check_random_state(self.random_state))
        out = _rows.give_back(out, X)
        if not (hasattr(X, "columns") and hasattr(X, "index")):
            return out
        tables = [type(X)(part, columns=X.columns, index=X.index) for part in (out[None] if n_draws is None else out)]
        return tables[0] if n_draws is None else tables

    # derived mixtures -------------------------------------------------------------------------------------------------

    def condition(self, values):
        """The mixture of the other features, given some: ``gm.condition({0: 1.5, "age": 40}).sample(10)``.

        values : dict of feature (number or name) to a finite number. Features keep their order. Returns a fitted
        `GaussianMixture` of the same covariance type.
        """
        check_is_fitted(self)
        return _derived.condition(self, values)

    def marginal(self, features):
        """The mixture of these features (numbers or names), in this order, whatever the others are."""
        check_is_fitted(self)
        return _derived.marginal(self, features)

    # anomalies --------------------------------------------------------------------------------------------------------

    def anomaly_score(self, X):
        """``-score_samples(X)``: higher is stranger (scikit-learn's outlier detectors score the other way round)."""
        return -self.score_samples(X)

    def fit_threshold(self, X, contamination=0.01):
        """Sets ``threshold_`` for `predict_outlier` from rows that are normal.

        Of rows like X, at most the share ``contamination`` is taken for outliers, on average over samples X: the
        threshold is the score that ``floor(contamination (n_samples + 1))`` rows of X reach. That holds for rows that
        ``fit`` has not seen; rows of the fit score too low. (Split conformal prediction.)

        Returns self. Errors: ``ValueError`` where X has fewer than ``1 / contamination - 1`` rows.
        """
        if not isinstance(contamination, numbers.Real) or not 0 < contamination < 1:
            raise ValueError(f"contamination must be a number between 0 and 1, got {contamination!r}")
        scores = np.sort(np.asarray(torch.as_tensor(self.anomaly_score(X)).cpu(), dtype=np.float64))[::-1]
        rank = math.floor(contamination * (len(scores) + 1) + 1e-9)
        if rank < 1:
            raise ValueError(f"contamination={contamination} needs at least {math.ceil(1 / contamination - 1 - 1e-9)}"
                             f" rows, got {len(scores)}")
        self.threshold_, self.contamination_ = float(scores[rank - 1]), float(contamination)
        return self

    def predict_outlier(self, X):
        """-1 for rows whose `anomaly_score` is above ``threshold_``, 1 for the others."""
        check_is_fitted(self, "threshold_")
        scores = torch.as_tensor(self.anomaly_score(X))
        return _rows.give_back(torch.where(scores > self.threshold_, -1, 1), X)

    # files ------------------------------------------------------------------------------------------------------------

    def save(self, path):
        """Writes parameters and fitted attributes to one safetensors file (JSON in its header; no pickle)."""
        check_is_fitted(self)
        _file.save(self, path)

    @classmethod
    def load(cls, path):
        """What `save` wrote, bit by bit."""
        return _file.load(cls, path)
