"""What the tests of k-means share."""

import numpy as np
import torch

import cases
from gmkernels.ops.kmeans import local_trials

F32, F64 = torch.float32, torch.float64


def clusters(n, d, seed=0, dtype=F64, batch=(), spread=2.0):
    """Overlapping clusters, away from the origin."""
    x = cases.data(*batch, n, d, seed=seed)
    centres = spread * cases.data(4, d, seed=seed + 1)
    return (x + centres[torch.arange(n) % 4] + 5.0).to(dtype)


def weights_of(*shape, seed=11, dtype=F64):
    return cases.data(*shape, seed=seed).abs().to(dtype)


def uniforms_of(k, seed, *batch):
    return torch.from_numpy(np.random.RandomState(seed).random_sample((*batch, 1 + (k - 1) * local_trials(k))))
