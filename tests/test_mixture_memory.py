"""GaussianMixture.fit: what it holds beyond the data."""

import subprocess
import sys

import pytest

_PEAK = """
import resource, sys, torch, warnings
from gmkernels import GaussianMixture
warnings.simplefilter("ignore")
torch.set_num_threads(2)
n, d, k, dtype = 10_000_000, 16, 64, getattr(torch, sys.argv[1])
make = torch.Generator().manual_seed(0)
fit = lambda x, k: GaussianMixture(k, covariance_type="diag", max_iter=1, random_state=0, init_params=sys.argv[2]).fit(x)
fit(torch.randn(3000, d, dtype=dtype, generator=make), 4)
x = torch.empty(n, d, dtype=dtype)
for part in x.split(100_000):
    part.normal_(generator=make)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fit(x, k)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ten_million_rows(dtype):
    """10M x 16, k=64, k-means++ and an iteration: below 64 MB. (Lloyd's iterations before it hold the same per row.)"""
    done = subprocess.run([sys.executable, "-c", _PEAK, dtype, "k-means++"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 20
