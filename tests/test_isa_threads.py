"""Every instruction set with 1, 2 and 8 threads, on the quick cases of every benchmark: sizes that use threads.

One instruction set: the same bits with any number of threads. Another one: the same bits for random numbers, else the
same within the self-test's tolerance. What a family's own tests do at the edges of its tiles, this does for all.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from gmkernels import _C
from gmkernels.bench import suite
from gmkernels.cli.selftest import TOLERANCE

THREADS = (1, 2, 8)
FAMILIES = sorted(set(suite.families()) - {"models"})  # a training step is torch's own convolutions and loss as well
EXACT = {"philox_normal", "philox_uniform"}
STEPS = {"schedulers": 10}  # of TOLERANCE: 50 steps, one after the other


def result(case, isa, threads):
    _C.set_isa(isa)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tensors = [t.detach().clone() for t in tree_leaves(case.ours()) if isinstance(t, torch.Tensor)]
    assert tensors, f"{case.op} {case.name} returns no tensor"
    return tensors


def bits(tensors):
    return [t.contiguous().view(-1).view(torch.uint8) for t in tensors]


def same_bits(got, want):
    return all(torch.equal(g, w) for g, w in zip(bits(got), bits(want), strict=True))


def distance(got, want):
    """Relative to the largest number of each tensor."""
    pairs = [(g.double(), w.double()) for g, w in zip(got, want, strict=True)]
    return max(((g - w).abs().max() / w.abs().max().clamp_min(1e-30)).item() for g, w in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_isa_and_thread_count(family):
    for case in suite.families()[family].cases(True, "cpu"):
        first = None
        for isa in _C.isas():
            one = result(case, isa, THREADS[0])
            for threads in THREADS[1:]:
                assert same_bits(result(case, isa, threads), one), f"{case.op} {case.name}: {isa}, {threads} threads"
            first = first or one
            if case.op in EXACT:
                assert same_bits(one, first), f"{case.op} {case.name}: {isa}"
            limit = STEPS.get(case.op, 1) * TOLERANCE
            assert distance(one, first) <= limit, f"{case.op} {case.name}: {isa}: {distance(one, first):.1e}"


def test_the_comparison_sees_one_bit():
    a = [torch.tensor([1.0, 0.0])]
    assert same_bits(a, [torch.tensor([1.0, 0.0])]) and not same_bits(a, [torch.tensor([1.0, -0.0])])
    assert distance([torch.tensor([1.0, 1e-4])], a) == pytest.approx(1e-4)
