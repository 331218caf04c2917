"""Distributions with the habits of torch.distributions."""

import torch
from torch.distributions import Distribution, constraints
from torch.distributions.utils import lazy_property

from . import ops
from ._call import check_same_dtype
from ._factors import cholesky_of_precisions, covariances_of, factors_of_scale_tril
from .reference.gmm import gmm_component_log_prob

__all__ = ["GaussianMixture"]


_CONSTRAINTS = {
    "scale": constraints.independent(constraints.positive, 2),
    "covariance_matrix": constraints.independent(constraints.positive_definite, 1),
    "scale_tril": constraints.independent(constraints.lower_cholesky, 1),
    "precision_matrix": constraints.independent(constraints.positive_definite, 1),
}


class GaussianMixture(Distribution):
    r"""A mixture of k Gaussians on R^d: ``p(x) = sum_k softmax(logits)_k N(x; loc_k, Sigma_k)``.

    ``log_prob`` is :func:`gmkernels.ops.gmm_log_prob`: one kernel, nothing of size ``n x k`` in memory, derivatives
    of any order for the value and all parameters. The torch form of it is
    ``MixtureSameFamily(Categorical(...), MultivariateNormal(...))``.

    Args:
        logits: unnormalised log weights ``[..., k]``; ``-inf`` leaves a component out.
        loc: means ``[..., k, d]``.
        scale: standard deviations ``[..., k, d]``, or ``[..., k, 1]``: the same for every feature.
        covariance_matrix, scale_tril, precision_matrix: ``[..., k, d, d]``, Sigma_k, L with ``L L^T = Sigma_k``, or
            Sigma_k^-1; ``[..., 1, d, d]`` is one for all components.
        precisions_cholesky, covariance_type: as in :func:`gmkernels.ops.gmm_log_prob`, for a fitted
            ``GaussianMixture`` of scikit-learn. Give exactly one of these five.

    Leading dimensions broadcast to ``batch_shape``; ``event_shape`` is ``[d]``. ``sample`` takes ``seed=`` beside
    torch's own generator, and gives the same numbers on every device. Samples carry no gradient (``has_rsample`` is
    False: the component is discrete).

    Errors: ``ValueError`` for shapes, for none or several parametrisations, and (``validate_args``, on by default until
    the first ``torch.compile`` of the process turns torch's default off) for values outside their domain.

    >>> mixture = GaussianMixture(torch.zeros(3), torch.randn(3, 2), scale=torch.ones(3, 2))
    >>> mixture.log_prob(mixture.sample((5,))).shape
    torch.Size([5])
    """

    support = constraints.real_vector
    has_rsample = False

    def __init__(self, logits, loc, scale=None, *, covariance_matrix=None, scale_tril=None, precision_matrix=None,
                 precisions_cholesky=None, covariance_type=None, validate_args=None):
        forms = {"scale": scale, "covariance_matrix": covariance_matrix, "scale_tril": scale_tril,
                 "precision_matrix": precision_matrix, "precisions_cholesky": precisions_cholesky}
        given = [name for name, value in forms.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(forms)}, got {', '.join(given) or 'none'}")
        if (covariance_type is None) != (precisions_cholesky is None):
            raise ValueError("covariance_type goes with precisions_cholesky, and only with it")
        for name, value in (("logits", logits), ("loc", loc), (given[0], forms[given[0]])):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if loc.dim() < 2:
            raise ValueError(f"loc must be [..., k, d], got {tuple(loc.shape)}")
        k, d = loc.shape[-2:]
        self._form = given[0]
        form = forms[self._form]
        expected = {"scale": [(k, d), (k, 1)], "precisions_cholesky": None}.get(self._form, [(k, d, d), (1, d, d)])
        if expected and not any(tuple(form.shape[-len(e) :]) == e for e in expected):
            shapes = " or ".join(f"[..., {str(e)[1:-1]}]" for e in expected)
            raise ValueError(
                f"{self._form} must be {shapes} for loc of shape {tuple(loc.shape)}, got {tuple(form.shape)}"
            )
        check_same_dtype("loc", loc, logits=logits, **{self._form: form})
        self.logits, self.loc = logits, loc
        if self._form != "precisions_cholesky":
            setattr(self, self._form, form)
        self._covariance_type, self._precisions = self._precisions_of(form, covariance_type, d)
        x = loc[..., :0, :]  # the checks of shapes and dtypes are those of the op
        batch = ops.gmm._batch(x, logits, loc, self._precisions, self._covariance_type)
        super().__init__(torch.Size(batch), loc.shape[-1:], validate_args=validate_args)

    def _precisions_of(self, form, covariance_type, d):
        """(covariance_type, precisions_cholesky) of the parametrisation that was given."""
        if self._form == "precisions_cholesky":
            return covariance_type, form
        if self._form == "scale":
            spherical = form.shape[-1] == 1 and d != 1
            return ("spherical", form[..., 0].reciprocal()) if spherical else ("diag", form.reciprocal())
        if self._form == "precision_matrix":
            p = cholesky_of_precisions(form, "full")
        else:
            p = factors_of_scale_tril(torch.linalg.cholesky(form) if self._form == "covariance_matrix" else form)
        tied = form.shape[-3] == 1 and self.loc.shape[-2] != 1
        return ("tied", p[..., 0, :, :]) if tied else ("full", p)

    @property
    def arg_constraints(self):
        real = {"logits": constraints.real_vector, "loc": constraints.independent(constraints.real, 2)}
        return real | {name: c for name, c in _CONSTRAINTS.items() if name == self._form}

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(GaussianMixture, _instance)
        batch_shape = torch.Size(batch_shape)
        trailing = ops.gmm._TRAILING[self._covariance_type]

        def grown(t, event):
            return t.expand(*batch_shape, *t.shape[t.dim() - event :])

        new._form, new._covariance_type = self._form, self._covariance_type
        new.logits, new.loc = grown(self.logits, 1), grown(self.loc, 2)
        if self._form != "precisions_cholesky":
            setattr(new, self._form, grown(getattr(self, self._form), 2 if self._form == "scale" else 3))
        new._precisions = grown(self._precisions, trailing)
        super(GaussianMixture, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _rows(self, value):
        """value [sample, batch, d] as rows [batch, n, d] of each mixture, and how to bring a result of rows back."""
        if self._validate_args:
            self._validate_sample(value)
        lead = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        samples = len(lead) - len(self.batch_shape)
        rows = value.expand(*lead, value.shape[-1])
        rows = rows.movedim(tuple(range(samples)), tuple(range(-1 - samples, -1))) if samples else rows[..., None, :]
        shape = rows.shape[len(self.batch_shape) : -1]
        rows = rows.reshape(*self.batch_shape, shape.numel(), value.shape[-1])

        def back(result, event):
            result = result.reshape((*self.batch_shape, *shape, *result.shape[result.dim() - event :]))
            first = len(self.batch_shape)
            if not samples:
                return result.squeeze(first)
            return result.movedim(tuple(range(first, first + samples)), tuple(range(samples)))

        return rows, back

    @property
    def _parameters(self):
        return self.logits.log_softmax(-1), self.loc, self._precisions, self._covariance_type

    def log_prob(self, value):
        """log p(value): ``[sample, batch]`` for a value ``[sample, batch, d]``."""
        rows, back = self._rows(value)
        return back(ops.gmm_log_prob(rows, *self._parameters), 0)

    def score(self, value):
        """grad of log p at value: ``[sample, batch, d]``, in closed form (:func:`gmkernels.ops.gmm_score`)."""
        rows, back = self._rows(value)
        return back(ops.gmm_score(rows, *self._parameters), 1)

    def posterior_mean(self, value, noise_std):
        """E[x | x + noise_std * normal = value], :func:`gmkernels.ops.gmm_posterior_mean`: ``[sample, batch, d]``."""
        rows, back = self._rows(value)
        return back(ops.gmm_posterior_mean(rows, *self._parameters, noise_std=noise_std), 1)

    def component_probs(self, value):
        """p(component | value): ``[sample, batch, k]``, in plain torch."""
        rows, back = self._rows(value)
        return back(gmm_component_log_prob(rows, *self._parameters).softmax(-1), 1)

    def sample(self, sample_shape=(), *, seed=None):
        """Samples ``[sample, batch, d]``. ``seed=None`` draws one from torch's default generator."""
        return self.sample_with_component(sample_shape, seed=seed)[0]

    def sample_with_component(self, sample_shape=(), *, seed=None):
        """(samples ``[sample, batch, d]``, components ``[sample, batch]`` int64)."""
        sample_shape = torch.Size(sample_shape)
        with torch.no_grad():
            lw, loc, p, kind = self._parameters
            lw = lw.expand(*self.batch_shape, lw.shape[-1])
            x, component = ops.gmm_sample(sample_shape.numel(), lw, loc, p, kind, seed=seed)
        first = len(self.batch_shape)
        x = x.reshape((*self.batch_shape, *sample_shape, x.shape[-1]))
        component = component.reshape((*self.batch_shape, *sample_shape))
        places = tuple(range(first, first + len(sample_shape))), tuple(range(len(sample_shape)))
        return x.movedim(*places).contiguous(), component.movedim(*places).contiguous()

    @lazy_property
    def probs(self):
        """Weights ``[..., k]``."""
        return self.logits.softmax(-1)

    @lazy_property
    def _covariances(self):
        """[..., k, d, d]"""
        covariances, d = covariances_of(self._precisions, self._covariance_type), self.event_shape[0]
        if self._covariance_type == "full":
            return covariances
        if self._covariance_type == "tied":
            return covariances[..., None, :, :]
        if self._covariance_type == "spherical":
            covariances = covariances[..., None].expand(*covariances.shape, d)
        return torch.diag_embed(covariances)

    @property
    def mean(self):
        return torch.einsum("...k,...kd->...d", self.probs, self.loc).expand(self.batch_shape + self.event_shape)

    @property
    def covariance(self):
        """[..., d, d]: covariances within the components and between their means."""
        apart = self.loc - self.mean[..., None, :]
        each = self._covariances + apart[..., :, None] * apart[..., None, :]
        d = self.event_shape[0]
        return (self.probs[..., None, None] * each).sum(-3).expand(*self.batch_shape, d, d)

    @property
    def variance(self):
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    def entropy(self):
        raise NotImplementedError("the entropy of a mixture has no closed form; average -log_prob over samples")
