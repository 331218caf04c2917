"""k-means past 2^31, in the emulator: the last rows, by the last block of each launch. The launches are called without
the ops, which would look at every number first."""

import pytest
import torch

import cases
from gmkernels import _call

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
FLOAT = torch.float32


def test_assign_simt():
    """2^31 numbers; the last slab has three rows."""
    slabs, d = 1056, 16
    n = (slabs - 1) * 127232 + 3  # 127232 is a multiple of the 256 rows of a tile
    assert n * d > 2**31 and -(-n // slabs) > 127232 - 256
    x, labels = huge.periodic((n, d), FLOAT), huge.empty((1, n), torch.int32)
    centers = cases.data(2, d, dtype=FLOAT)
    made = torch.empty(1, 2, d), labels, torch.empty(1).double(), torch.empty(1, dtype=torch.int64)
    scratch = (huge.empty((slabs * (2 * (d + 1) + 2),), torch.float64), torch.empty(8 * d),
               torch.empty(6, dtype=torch.int64))
    with backend.running(blocks=[-1]):
        _call.Kernel.backend("kmeans", (*made, *scratch), (x, centers, None),
                             (slabs, (0, 0, 0), 1, n, 2, d, 0, 0, 0.0))
        at = backend.written(labels)
    assert at.tolist() == [n - 3, n - 2, n - 1]
    want = (x[-3:, None].double() - centers.double()).square().sum(-1).argmin(-1)
    assert labels[0, -3:].tolist() == want.tolist()


def test_k_means_plus_plus_simt():
    """2^31 numbers; the last group has three rows, and the first centre is the last row."""
    n, d = 2**20 + 3, 2048
    groups = -(-n // 2048)
    x, closest = huge.periodic((n, d), FLOAT), huge.empty((n,), FLOAT)
    left, candidates = torch.empty(2 * groups).double(), torch.empty(2, dtype=torch.int64)
    made = torch.empty(1, 2, d), torch.empty(1, 2, dtype=torch.int64)
    u = torch.tensor([(n - 0.5) / n, 0.5], dtype=torch.float64)
    with backend.running(blocks=[-1]):
        _call.Kernel.backend("kmeans_plus_plus", (*made, closest, left, candidates), (x, u, None),
                             ((0, 0, 0), 1, n, 2, d, 0, 1))
        at = backend.written(closest)
    assert at.tolist() == [n - 3, n - 2, n - 1] and made[1][0, 0] == n - 1
    cases.close(closest[-3:], (x[-3:].double() - x[-1].double()).square().sum(-1), rtol=1e-5)
