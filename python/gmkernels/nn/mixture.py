"""Gaussian mixtures as modules: of free parameters, and as the output of a network."""

import torch
from torch import nn

from ..distributions import GaussianMixture as MixtureDistribution
from ..ops.gmm import check_covariance_type
from ..reference.gmm import covariance_shape


class _Precisions:
    """Unconstrained numbers <-> precisions_cholesky: the diagonal of P is an exponential, the rest is free."""

    def __init__(self, k, d, covariance_type):
        check_covariance_type(covariance_type)
        for name, size in (("n_components", k), ("n_features", d)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be a positive int, got {size!r}")
        self.k, self.d, self.type = k, d, covariance_type
        self.matrix = covariance_type in ("full", "tied")
        self.shape = covariance_shape(covariance_type, k, d)
        self.free = d * (d - 1) // 2 if self.matrix else 0
        self.matrices = {"full": k, "tied": 1}.get(covariance_type, 0)
        self.numbers = self.matrices * (d + self.free) or torch.Size(self.shape).numel()

    def __call__(self, raw):
        """raw [..., numbers] -> precisions_cholesky [..., *shape]."""
        if not self.matrix:
            return raw.exp().reshape(*raw.shape[:-1], *self.shape)
        raw = raw.reshape(*raw.shape[:-1], self.matrices, self.d + self.free)
        p = torch.diag_embed(raw[..., : self.d].exp())
        rows, columns = torch.triu_indices(self.d, self.d, 1, device=raw.device)
        upper = torch.zeros_like(p)
        upper[..., rows, columns] = raw[..., self.d :]
        p = p + upper
        return p if self.type == "full" else p[..., 0, :, :]


class GaussianMixture(nn.Module):
    r"""A Gaussian mixture of k components on R^d with free parameters: for any optimiser, or as a part of a model.

    ``forward(x [..., d])`` is the log-density ``[...]``; ``distribution()`` is the
    :class:`gmkernels.distributions.GaussianMixture` of the present parameters. With ``P P^T = Sigma^-1``, P upper
    triangular, the parameters are ``logits [k]``, ``loc [k, d]`` and ``raw_precisions``: the logarithms of the diagonal
    of P, then, for "full" and "tied", what lies above it. Any real numbers are a valid mixture.

    Args:
        n_components, n_features: k and d.
        covariance_type: "full", "tied", "diag" or "spherical".
        x: rows ``[n, d]``, n >= 1, to begin with: means at random rows, every covariance that of ``x`` (its diagonal).
            Without it means are standard normal and covariances are 1.

    >>> mixture = GaussianMixture(3, 2)
    >>> (-mixture(torch.randn(100, 2)).mean()).backward()
    """

    def __init__(self, n_components, n_features, covariance_type="full", x=None):
        super().__init__()
        self._precisions = _Precisions(n_components, n_features, covariance_type)
        self.logits = nn.Parameter(torch.zeros(n_components))
        self.loc = nn.Parameter(torch.randn(n_components, n_features))
        self.raw_precisions = nn.Parameter(torch.zeros(self._precisions.numbers))
        if x is not None:
            self._start(x)

    @torch.no_grad()
    def _start(self, x):
        d = self._precisions.d
        if not isinstance(x, torch.Tensor) or x.dim() != 2 or x.shape[1] != d or not len(x):
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"x must be a tensor of rows [n, {d}] with n >= 1, got {got}")
        k, kind = self._precisions.k, self._precisions.type
        rows = torch.randperm(len(x))[:k] if len(x) >= k else torch.randint(len(x), (k,))
        self.loc.copy_(x[rows.to(x.device)])
        variance = x.double().var(0, correction=0).clamp_min(1e-12)
        log_diagonal = -0.5 * (variance.log() if kind != "spherical" else variance.mean().log())
        if self._precisions.matrix:
            raw = self.raw_precisions.view(self._precisions.matrices, -1)
            raw[:, :d] = log_diagonal.to(raw)
        else:
            self.raw_precisions.view(k, -1).copy_(log_diagonal.to(self.raw_precisions))

    def distribution(self):
        return MixtureDistribution(self.logits, self.loc, precisions_cholesky=self._precisions(self.raw_precisions),
                                   covariance_type=self._precisions.type, validate_args=False)

    def forward(self, x):
        return self.distribution().log_prob(x)

    def extra_repr(self):
        return f"n_components={self._precisions.k}, n_features={self._precisions.d}, {self._precisions.type!r}"


class MixtureDensity(nn.Module):
    r"""The last layer of a mixture density network: features to a Gaussian mixture for every row.

    ``forward(h [..., in_features])`` is a :class:`gmkernels.distributions.GaussianMixture` of batch shape ``[...]`` on
    R^d; ``-layer(h).log_prob(y).mean()`` is the loss. One linear layer makes logits, means, and the precisions by the
    same free parametrisation as :class:`GaussianMixture`.

    Args:
        in_features: size of h.
        n_components, n_features: k and d.
        covariance_type: "full", "diag" (default) or "spherical"; "tied": one for the components of a row.

    Source: Bishop, "Mixture density networks", 1994; Williams, "Using neural networks to model conditional multivariate
    densities", 1996, for the Cholesky factor of the precision.

    >>> y = torch.randn(8, 2)
    >>> loss = -MixtureDensity(16, 5, 2)(torch.randn(8, 16)).log_prob(y).mean()
    """

    def __init__(self, in_features, n_components, n_features, covariance_type="diag"):
        super().__init__()
        self._precisions = _Precisions(n_components, n_features, covariance_type)
        self._sizes = n_components, n_components * n_features, self._precisions.numbers
        self.linear = nn.Linear(in_features, sum(self._sizes))
        with torch.no_grad():  # begin with spread means and unit covariances, whatever h is
            self.linear.bias[n_components : n_components + self._sizes[1]].normal_()

    def forward(self, h):
        logits, loc, raw = self.linear(h).split(self._sizes, -1)
        p = self._precisions
        return MixtureDistribution(logits, loc.unflatten(-1, (p.k, p.d)), precisions_cholesky=p(raw),
                                   covariance_type=p.type, validate_args=False)

    def extra_repr(self):
        return f"n_components={self._precisions.k}, n_features={self._precisions.d}, {self._precisions.type!r}"
