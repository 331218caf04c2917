"""gmm_log_prob and its gradients past 2^31: the last block of each launch, in the emulator. An index that loses its
high bits is out of bounds, or finds other numbers."""

import pytest
import torch

import cases
from gmkernels import ops, reference
from gmkernels.ops import gmm as gmm_module

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge
FLOAT = torch.float32
needs_room = pytest.mark.skipif(not huge.torch_can_allocate(10 << 30), reason="no 10 GB of address space")


def mixture(b, k, d, covariance_type):
    """Parameters of `b` mixtures, in which every component has a part."""
    shape = {"full": (b, k, d, d), "tied": (b, d, d), "diag": (b, k, d), "spherical": (b, k)}[covariance_type]
    p = cases.data(*shape, dtype=FLOAT, seed=1) * 0.1
    if covariance_type in ("full", "tied"):
        p = p.triu(1) + torch.eye(d)
    else:
        p = p + 1.0
    return cases.data(b, k, dtype=FLOAT, seed=2).log_softmax(-1), cases.data(b, k, d, dtype=FLOAT, seed=3) * 0.1, p


@pytest.mark.parametrize("covariance_type, k, d", [("full", 2, 4), ("full", 1, 8), ("diag", 1, 64), ("diag", 1, 260)])
def test_x_simt(covariance_type, k, d):
    n = 2**31 // d + 2**20
    x, out = huge.periodic((n, d), FLOAT), huge.empty((n,), FLOAT)
    parameters = [t[0] for t in mixture(1, k, d, covariance_type)]
    with backend.running(blocks=[-1]):
        ops.gmm_log_prob(x, *parameters, covariance_type, out=out)
        at = backend.written(out)
    at = torch.cat([at[::97], at[-100:]])
    assert at[-1] * d >= 2**31
    want = reference.gmm.gmm_log_prob(x[at].double(), *(t.double() for t in parameters), covariance_type)
    cases.close(out[at], want, rtol=1e-5, atol=1e-4)


def test_mixtures_simt():
    b, n, d = 2**10, 2**15 + 2**10, 64
    x, out = huge.periodic((b, n, d), FLOAT), huge.empty((b, n), FLOAT)
    parameters = mixture(b, 1, d, "diag")
    with backend.running(blocks=[-1]):
        ops.gmm_log_prob(x, *parameters, "diag", out=out)
        at = backend.written(out)
    at = torch.cat([at[::97], at[-100:]])
    assert at[-1] * d >= 2**31
    own = (t[at // n].double() for t in parameters)
    want = reference.gmm.gmm_log_prob(x.view(-1, 1, d)[at].double(), *own, "diag")[:, 0]
    cases.close(out.flatten()[at], want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("covariance_type, parameters", [
    ("diag", [t[0] for t in mixture(1, 2, 1, "diag")]),
    ("tied", [torch.zeros(1), torch.ones(1, 1), torch.full((1, 1), 2.0)]),
], ids=["diag", "tied"])
def test_rows_simt(covariance_type, parameters):
    n = 2**31 + 2**23
    x, out = huge.periodic((n, 1), FLOAT), huge.empty((n,), FLOAT)
    with backend.running(blocks=[-1]):
        ops.gmm_log_prob(x, *parameters, covariance_type, out=out)
        at = backend.written(out)
    at = torch.cat([at[::997], at[-100:]])
    assert at[-1] >= 2**31
    want = reference.gmm.gmm_log_prob(x[at].double(), *(t.double() for t in parameters), covariance_type)
    cases.close(out[at], want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("d", [2**23, 2**24])
def test_features_simt(d):
    """64 rows of 2^31 and 2^32 bytes: no block takes shared memory for them. The launch alone, no block is run."""
    x, out = huge.periodic((1, d), FLOAT), huge.empty((1,), FLOAT)
    with backend.running(blocks=[1]):
        ops.gmm_log_prob(x, torch.zeros(1), x, x, "diag", out=out)
        assert len(backend.written(out)) == 0


def test_precisions_simt():
    """k d d past 2^31: all components but the last have no weight."""
    d = 256
    k = 2**31 // d**2 + 8
    x, means, p = cases.data(3, d, dtype=FLOAT), cases.data(k, d, dtype=FLOAT), huge.periodic((k, d, d), FLOAT)
    log_weights = torch.full((k,), -torch.inf)
    log_weights[-1] = 0.0
    with backend.running(blocks=[-1]):
        got = ops.gmm_log_prob(x, log_weights, means, p, "full")
    last = (t[-1:].double() for t in (log_weights, means, p))
    cases.close(got, reference.gmm.gmm_log_prob(x.double(), *last, "full"), rtol=1e-5, atol=1e-4)


@needs_room
@pytest.mark.parametrize("covariance_type, b, n, d", [("diag", 2**10, 2**15 + 2**10, 66),
                                                      ("diag", 2**8, 2**15 + 2**10, 260),
                                                      ("tied", 2**13, 2**15 + 2**10, 8)])
def test_backward_simt(covariance_type, b, n, d, monkeypatch):
    # Plain path: the last block alone prepares nothing that the last block of the next launch reads.
    monkeypatch.setattr(gmm_module, "_MATRIX_FEATURES", (1, 0))
    x, parameters = huge.periodic((b, n, d), FLOAT), mixture(b, 1, d, covariance_type)
    parameters[0].add_(1.5 * d)  # so that densities are of the size of 1
    grad, log_prob = huge.periodic((b, n), FLOAT, seed=5), huge.periodic((b, n), FLOAT, seed=6)
    with backend.running(blocks=[-1]):
        grads = torch.ops.gmkernels.gmm_log_prob_backward(grad, log_prob, x, *parameters, covariance_type, True, True)
        at = backend.written(grads[0])
    at = torch.cat([at[::997], at[-400:]])
    assert at[-1] >= 2**31
    rows, at_d = at // d, at % d
    i = rows // n
    xs, means = x.view(-1, d)[rows].double(), parameters[1][i, 0].double()
    p = parameters[2].double()
    if covariance_type == "diag":
        y = (xs - means) * p[i, 0]
        pull, log_det = y * p[i, 0], p[i, 0].abs().log().sum(-1)
    else:
        y = torch.einsum("rd,rde->re", xs - means, p[i])
        pull, log_det = torch.einsum("re,rde->rd", y, p[i]), p[i].diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    lp = parameters[0][i, 0] + log_det - 0.5 * y.square().sum(-1) - 0.91893853320467274 * d
    weight = grad.flatten()[rows].double() * (lp - log_prob.flatten()[rows].double()).exp()
    want = -weight[:, None] * pull
    want = want.gather(1, at_d[:, None])[:, 0]
    scale = 1 / want.abs().max()
    assert scale < 1e30
    cases.close(grads[0].flatten()[at] * scale, want * scale, rtol=1e-3, atol=1e-4)
