"""philox_fill past 2^31: its last block, in the emulator. An index that loses its high bits is out of bounds, or finds
another counter."""

import pytest
import torch

import cases
from gmkernels import ops, reference

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge


@pytest.mark.parametrize("normal", [True, False], ids=["normal", "uniform"])
def test_more_than_2_31_blocks_of_four_simt(normal):
    most = 2**33 if normal else 2**34  # 2^32 blocks: a counter of more than one word
    out = huge.empty((most + 2**23 + 3,), torch.float16)
    with backend.running(blocks=[-1]):
        (ops.philox_normal if normal else ops.philox_uniform)(out.shape, seed=5, step=3, dtype=out.dtype, out=out)
        at = backend.written(out)
    at = torch.cat([at[::997], at[-400:]])
    assert at[-1] >= most
    words = reference.random.philox_words(at // 4, 3, 0 if normal else 1, torch.tensor(5))
    want = reference.random._numbers(words, normal).gather(-1, (at % 4)[:, None])[:, 0]
    cases.close(out[at], want, atol=1e-3)


def test_more_than_2_31_samples_simt():
    out, seeds = huge.empty((2**31 + 2**23, 1), torch.float32), huge.periodic((2**31 + 2**23,), torch.int64)
    with backend.running(blocks=[-1]):
        ops.philox_normal(out.shape, seed=seeds, dtype=out.dtype, out=out)
        at = backend.written(out)
    at = torch.cat([at[::997], at[-400:]])
    assert at[-1] >= 2**31
    words = reference.random.philox_words(torch.zeros_like(at), 0, 0, seeds[at])
    cases.close(out[at, 0], reference.random._numbers(words, True)[:, 0])
