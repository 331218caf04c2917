"""gmm_em_statistics(allow_tf32=True): one product of tf32 numbers in place of three."""

import pytest
import torch

import cases
from gmkernels import GaussianMixture, ops
from test_gmm import F32, F64, NAN, mixture
from test_gmm_em import PARTS, exact, weights_of


def relative(args, covariance_type, stat, weights):
    """The largest error of every part, of its largest number."""
    parts = zip(PARTS, exact(args, covariance_type, stat, weights), strict=True)
    return [((getattr(stat, name).cpu() - want).abs().max() / want.abs().max()).item() for name, want in parts]


@pytest.mark.parametrize("covariance_type", ["full", "tied"])
def test_fewer_digits(device, covariance_type):
    for n, d, k in [(200, 8, 5), (100, 24, 3), (90, 40, 3), (70, 72, 2)]:
        args = mixture(n, d, k, covariance_type, F32, device.torch)
        weights = weights_of(n, dtype=F32).to(device.torch)
        three = ops.gmm_em_statistics(*args, covariance_type, weights)
        one = ops.gmm_em_statistics(*args, covariance_type, weights, allow_tf32=True)
        again = ops.gmm_em_statistics(*args, covariance_type, weights, allow_tf32=True)
        assert torch.equal(one.sums, again.sums) and torch.equal(one.weight, three.weight)
        assert max(relative(args, covariance_type, three, weights)) < 1e-5
        errors = relative(args, covariance_type, one, weights)
        assert max(errors) < 2e-2
        if device.name == "cpu" or cases.rehearsal:  # no tensor cores
            assert torch.equal(one.sums, three.sums)
        else:
            assert max(errors) > 1e-5


def test_only_the_tensor_cores_heed_it(device):
    for covariance_type, dtype, d in [("diag", F32, 16), ("spherical", F32, 16), ("full", F64, 16), ("full", F32, 5)]:
        args = mixture(50, d, 3, covariance_type, dtype, device.torch)
        sums = [ops.gmm_em_statistics(*args, covariance_type, allow_tf32=allowed).sums for allowed in (False, True)]
        assert torch.equal(*sums)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_every_nan_survives(device, bits):
    """A GPU's own NaN has all bits set: rounding them to 11 would make it 0."""
    nan = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(F32)
    assert nan.isnan()
    for where in ("row", "mean", "factor"):
        x, lw, m, p = (t.clone() for t in mixture(40, 16, 3, "full", F32))
        if where == "row":
            x[7, 3] = nan
        elif where == "mean":
            m[1, 12] = nan
        else:
            p[1, 2, 9] = nan
        args = [t.to(device.torch) for t in (x, lw, m, p)]
        for allowed in (False, True):
            stat = ops.gmm_em_statistics(*args, "full", allow_tf32=allowed)
            assert stat.log_likelihood.isnan() and stat.nk.isnan().any()
            if where == "row":
                assert stat.s1.isnan().all() and stat.s2.isnan().all()


def test_estimator(device):
    x = torch.cat([torch.randn(60, 8, generator=torch.Generator().manual_seed(s)) + 4 * s for s in range(2)])
    x = x.to(device.torch)
    fits = [GaussianMixture(2, allow_tf32=allowed, random_state=0).fit(x) for allowed in (False, True)]
    assert abs(fits[0].means_ - fits[1].means_).max() < 1e-2
    assert device.name == "cpu" or cases.rehearsal or (fits[0].covariances_ != fits[1].covariances_).any()
    part = GaussianMixture(2, allow_tf32=True, random_state=0).partial_fit(x)
    assert abs(part.means_ - fits[0].means_).max() < 0.5
    x[3, 2] = NAN
    GaussianMixture(2, allow_tf32=True, random_state=0).fit(x)


def test_errors():
    args = mixture(5, 2, 2, "full", F32)
    with pytest.raises(TypeError, match="allow_tf32 must be a bool, got int"):
        ops.gmm_em_statistics(*args, "full", allow_tf32=1)
    with pytest.raises(ValueError, match="allow_tf32"):
        GaussianMixture(2, allow_tf32="yes").fit(torch.randn(9, 2))
