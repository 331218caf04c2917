"""Sizes past 2^31 on the plain path of gmm_log_prob, in the emulator."""

import pytest
import torch

import cases
from gmkernels import ops, reference

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
FLOAT = torch.float32


def test_rows_simt():
    n = 2**31 + 2**23
    x, out = huge.periodic((n, 1), FLOAT), huge.empty((n,), FLOAT)
    parameters = torch.zeros(1), torch.ones(1, 1), torch.full((1, 1), 2.0)
    with backend.running(blocks=[-1]):
        ops.gmm_log_prob(x, *parameters, "tied", out=out)
        at = backend.written(out)
    at = torch.cat([at[::997], at[-100:]])
    assert at[-1] >= 2**31
    want = reference.gmm.gmm_log_prob(x[at].double(), *(t.double() for t in parameters), "tied")
    cases.close(out[at], want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("d", [2**23, 2**24])
def test_features_simt(d):
    """64 rows of 2^31 and 2^32 bytes: no block takes shared memory for them. The launch alone, no block is run."""
    x, out = huge.periodic((1, d), FLOAT), huge.empty((1,), FLOAT)
    with backend.running(blocks=[1]):
        ops.gmm_log_prob(x, torch.zeros(1), x, x, "diag", out=out)
        assert len(backend.written(out)) == 0
