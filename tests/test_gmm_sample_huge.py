"""gmm_sample past 2^31, in the emulator: rows and normals by the last block, components by all. The launch is called
without the op, which would allocate what huge.empty only reserves."""

import pytest
import torch

import cases
from gmkernels import reference
from gmkernels.ops.gmm_inference import _sample_launch

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
FLOAT, SEED = torch.float32, 7


def words(at, stream):
    return reference.random.philox_words(at // 4, 0, stream, torch.tensor(SEED)), (at % 4)[:, None]


def normals(at):
    block, which = words(at, 4)
    return reference.random._numbers(block, True).gather(-1, which)[:, 0].double()


def uniforms(rows):
    block, which = words(rows, 3)
    return (block.gather(-1, which)[:, 0].double() + 0.5) * 2.0**-32


def test_rows_simt():
    n = 2**31 + 2**23
    x, component = huge.empty((n, 1), FLOAT), huge.empty((n,), torch.int64)
    means, p, cdf = torch.tensor([[-5.0], [5.0]]), torch.tensor([[2.0], [4.0]]), torch.tensor([0.25, 1.0]).double()
    with backend.running(blocks=[-1]):
        _sample_launch((x, component), means, p, cdf, None, n, SEED, "diag")
        at = backend.written(x)
        assert torch.equal(backend.written(component), at)
    at = torch.cat([at[::97], at[-400:]])
    assert at[-1] >= 2**31
    c = (uniforms(at) >= 0.25).long()
    assert torch.equal(component[at], c)
    cases.close(x[at, 0], means[c, 0].double() + normals(at) / p[c, 0])


def test_normals_simt():
    """More than 2^34: a counter of more than one word."""
    n = 2111 * 128 + 1  # one row in the last block
    d = 2**34 // n + 1
    x, component = huge.empty((n, d), FLOAT), huge.empty((n,), torch.int64)
    means, p = cases.data(1, d, dtype=FLOAT), 1 + cases.data(1, d, dtype=FLOAT, seed=1).abs()
    with backend.running(blocks=[-1]):
        _sample_launch((x, component), means, p, torch.ones(1).double(), None, n, SEED, "diag")
        at = backend.written(x)
    assert len(at) == d and at[-1] == n * d - 1 >= 2**34
    cases.close(x[-1], means[0].double() + normals(at) / p[0])


def test_components_simt():
    n, k = 64, 3 * 2**30
    cdf, c = huge.periodic((k,), torch.float64), torch.empty(n, dtype=torch.int64)
    with backend.running():
        _sample_launch((torch.empty(n, 0), c), torch.empty(k, 0), torch.empty(0, 0), cdf, None, n, SEED, "tied")
    assert c.min() > 0 and 2**31 <= c.max() < k
    u = uniforms(torch.arange(n))
    assert (cdf[c] > u).all() and (cdf[c - 1] <= u).all()


def test_precisions_simt():
    """k d d past 2^31, and the last component drawn alone."""
    d = 16
    k = 2**31 // d**2 + 8
    x, c = torch.empty(2, d).double(), torch.empty(2, dtype=torch.int64)
    means, p = huge.periodic((k, d), torch.float64), huge.periodic((k, d, d), torch.float64)
    cdf = torch.zeros(k, dtype=torch.float64)
    cdf[-1] = 1.0
    with backend.running():
        _sample_launch((x, c), means, p, cdf, None, 2, SEED, "full")
    assert (c == k - 1).all()
    z = normals(torch.arange(2 * d)).view(2, d)
    want = means[-1] + torch.linalg.solve_triangular(p[-1].triu(), z, upper=True, left=False)
    cases.close(x, want, rtol=1e-4)


def test_seeds_simt():
    """A row of each of b mixtures, every one with its own seed."""
    b = 2**31 + 2**23
    c, seeds = huge.empty((b, 1), torch.int64), huge.periodic((b,), torch.int64)
    cdf = torch.tensor([0.25, 1.0]).double()
    with backend.running(blocks=[-1]):
        _sample_launch((torch.empty(b, 1, 0), c), torch.empty(2, 0), torch.empty(0, 0), cdf, seeds, 1, 0, "tied")
        at = backend.written(c)
    at = torch.cat([at[::97], at[-400:]])
    assert at[-1] >= 2**31
    u = (reference.random.philox_words(torch.zeros_like(at), 0, 3, seeds[at])[:, 0].double() + 0.5) * 2.0**-32
    assert torch.equal(c[at, 0], (u >= 0.25).long())
