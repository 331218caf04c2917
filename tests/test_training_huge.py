"""add_noise past 2^31: its last block, in the emulator. An index that loses its high bits is out of bounds, or finds
other numbers."""

import pytest
import torch

import cases
from gmkernels import ops, reference
from noising_cases import schedule

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
huge = backend.huge


def test_two_samples_of_more_than_2_31_simt(monkeypatch):
    shape = (2, 2**31 + 2**20)
    xt, y = huge.empty(shape, torch.float16), huge.empty(shape, torch.float16)
    given = iter((xt, y))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: next(given))
    x0, pairs = huge.periodic(shape, torch.float16, seed=1), schedule()
    t = torch.tensor([3, 7])
    with backend.running(blocks=[-1]):
        ops.add_noise(x0, t, pairs, seed=5, step=3, target="v")
        at = backend.written(xt)
        assert torch.equal(at, backend.written(y))
    at = torch.cat([at[::997], at[-400:]])
    assert at[-1] >= 2**31
    words = reference.random.philox_words(at // 4, 3, 8, torch.tensor(5))
    z = reference.random._numbers(words, True).gather(-1, (at % 4)[:, None])
    rows = t[at // shape[1]]
    want = reference.noising.add_noise_target(x0.flatten()[at][:, None].double(), rows, pairs.double(), z, None, 2)
    for got, w in zip((xt, y), want, strict=True):
        cases.close(got.flatten()[at], w[:, 0], atol=2e-3)
