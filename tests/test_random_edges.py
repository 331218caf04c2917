"""The normals where their formula changes branch: words that random tests do not meet.

Seeds whose first block has a word at k 2^29, or one below, found by a search over 2^32 seeds and more. An even word is
a radius: 0xC0000000 is where the logarithm changes its form, 0 and 0xFFFFFFFF are its ends. An odd word is an angle:
the quadrants change at 2^29, 3 2^29, ...
"""

import pytest
import torch

import cases
from gmkernels import ops, reference

WORDS = {  # word: (seed, which of the four words of block 0)
    "radius": {
        0x00000000: (627779616, 2), 0x1FFFFFFF: (6346056461, 2), 0x20000000: (1152709275, 2),
        0x3FFFFFFF: (43335768, 2), 0x40000000: (142524930, 0), 0x5FFFFFFF: (2547188565, 2),
        0x60000000: (4678996103, 2), 0x7FFFFFFF: (3003777325, 2), 0x80000000: (4552273489, 2),
        0x9FFFFFFF: (1761748711, 0), 0xA0000000: (768824174, 0), 0xBFFFFFFF: (1459600921, 2),
        0xC0000000: (3415393636, 2), 0xDFFFFFFF: (4016126569, 2), 0xE0000000: (391885580, 0),
        0xFFFFFFFF: (1352247272, 0),
    },
    "angle": {
        0x00000000: (1343428, 3), 0x1FFFFFFF: (992455683, 3), 0x20000000: (4324701634, 1),
        0x3FFFFFFF: (2985265716, 3), 0x40000000: (599368034, 3), 0x5FFFFFFF: (1510433453, 3),
        0x60000000: (4935799316, 1), 0x7FFFFFFF: (822691687, 3), 0x80000000: (3435937029, 3),
        0x9FFFFFFF: (902955985, 1), 0xA0000000: (1212462045, 3), 0xBFFFFFFF: (995596506, 1),
        0xC0000000: (182551708, 3), 0xDFFFFFFF: (3604960694, 1), 0xE0000000: (994107740, 3),
        0xFFFFFFFF: (454088803, 1),
    },
}


@pytest.mark.parametrize("kind", WORDS)
def test_edges(device, kind):
    seeds = torch.tensor([seed for seed, _ in WORDS[kind].values()])
    words = reference.random.philox_words(torch.tensor(0), 0, 0, seeds)
    for row, (word, (_, which)) in zip(words, WORDS[kind].items(), strict=True):
        assert row[which] == word
    z = ops.philox_normal((len(seeds), 4), seed=seeds.to(device.torch), device=device.torch).cpu()
    cases.close(z, reference.random._numbers(words, True), rtol=6e-7, atol=2e-9)
    with cases.cpu_kernels():
        assert torch.equal(z, ops.philox_normal((len(seeds), 4), seed=seeds))
