"""k-means beside scikit-learn's: k-means++, Lloyd's iterations from one start, and whole fits of mixtures on top."""

import warnings

import torch

from .. import ops
from ..ops.kmeans import local_trials
from .bench_gmm_em import _data
from .case import Case

OPS = ("kmeans", "kmeans_plus_plus")

_ITERATIONS = 5
# name, n, d, k; covariance and EM iterations of the whole fit (scikit-learn takes a minute and a half for C)
_ROWS = (("A", 100_000, 16, 32, "full", 50), ("C", 1_000_000, 16, 64, "diag", 50), ("D", 100_000, 64, 256, None, 0))


def cases(quick, device):
    cpu = torch.device(device).type == "cpu"
    for name, n, d, k, covariance_type, iterations in _ROWS:
        if quick and name != "A":
            continue
        x = _data(n, d, k, covariance_type or "diag")[0].float()
        size = f"{n // 1000}k x {d}" if n < 1_000_000 else f"{n // 1_000_000}M x {d}"
        yield _lloyd(x.to(device), k, f"{size}, {k} centres, {_ITERATIONS} iterations", cpu)
        yield _plus_plus(x.to(device), k, f"{size}, {k} centres", cpu)
        if covariance_type and not quick:
            yield _fit(x.numpy(), k, covariance_type, iterations, f"GaussianMixture.fit, {size}, {k} {covariance_type},"
                       f" k-means and {iterations} iterations", cpu)


def _peer(make, cpu):
    if not cpu:
        return "CPU only"
    try:
        import sklearn  # noqa: F401
    except ImportError:
        return "not installed"
    return make()


def _silent(call):
    def silent():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()

    return silent


def eager(x, centers):
    """The same iterations in plain torch: chunks, |c|^2 - 2 x c, one-hot free sums."""
    for _ in range(_ITERATIONS):
        half = centers.square().sum(1) / 2
        sums, count = torch.zeros_like(centers), centers.new_zeros(len(centers))
        for rows in x.split(8192):
            label = torch.addmm(half, rows, centers.T, alpha=-1).argmin(1)
            sums.index_add_(0, label, rows)
            count.index_add_(0, label, torch.ones_like(rows[:, 0]))
        centers = sums / count[:, None]
    return centers


def _lloyd(x, k, name, cpu):
    (n, d), start = x.shape, x[:k].clone()

    def scikit_learn():
        from sklearn.cluster import KMeans

        rows, init = x.numpy(), start.numpy()
        return _silent(lambda: KMeans(k, init=init, n_init=1, max_iter=_ITERATIONS, tol=0, algorithm="lloyd").fit(rows))

    def error(f):
        few, wide = x[:5000], ops.kmeans(x[:5000].double(), init=start.double(), max_iter=_ITERATIONS, tol=0.0).centers
        return ((f(few).double() - wide).abs().max() / wide.abs().max()).item()

    return Case(
        "kmeans",
        name,
        ours=lambda: ops.kmeans(x, init=start, max_iter=_ITERATIONS, tol=0.0),
        rivals={"eager": lambda: eager(x, start), "scikit-learn": _peer(scikit_learn, cpu)},
        bytes=4 * n * d * (_ITERATIONS + 1),
        flops=3 * n * k * d * (_ITERATIONS + 1),
        error=lambda: error(lambda few: ops.kmeans(few, init=start, max_iter=_ITERATIONS, tol=0.0).centers),
        note="labels of the last centres are one more pass; torch's form leaves it out",
    )


def _plus_plus(x, k, name, cpu):
    n, d = x.shape
    trials = local_trials(k)

    def scikit_learn():
        from sklearn.cluster import kmeans_plusplus

        rows = x.numpy()
        return lambda: kmeans_plusplus(rows, k, random_state=0)

    return Case(
        "kmeans_plus_plus",
        name,
        ours=lambda: ops.kmeans_plus_plus(x, k, seed=0),
        rivals={"scikit-learn": _peer(scikit_learn, cpu)},
        bytes=4 * n * d * k,
        flops=3 * n * d * (trials + 1) * k,
    )


def _fit(x, k, covariance_type, iterations, name, cpu):
    def fit(kind):
        return _silent(lambda: kind(k, covariance_type=covariance_type, max_iter=iterations, tol=0,
                                    random_state=0).fit(x))

    def scikit_learn():
        from sklearn.mixture import GaussianMixture

        return fit(GaussianMixture)

    def ours():
        from ..mixture import GaussianMixture

        return fit(GaussianMixture)()

    return Case("kmeans", name, ours=ours, rivals={"scikit-learn": _peer(scikit_learn, cpu)},
                goals={"scikit-learn": 10.0} if cpu else {})
