"""philox_normal and philox_uniform: the contract of docs/random-numbers.md."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import cases
from gmkernels import _C, ops, reference
from gmkernels.ops.random import STREAM_NORMAL, STREAM_UNIFORM

OPS = {"normal": (ops.philox_normal, reference.random.philox_normal),
       "uniform": (ops.philox_uniform, reference.random.philox_uniform)}
both = pytest.mark.parametrize("kind", OPS)


def fill(kind, *args, **kwargs):
    return OPS[kind][0](*args, **kwargs)


# the contract ---------------------------------------------------------------------------------------------------------

KNOWN = [  # counter, key -> words: Random123's published vectors for philox4x32-10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers(counter, key, words):
    block = counter[0] | counter[1] << 32
    seed = key[0] | key[1] << 32
    signed = torch.tensor([block, seed], dtype=torch.uint64).view(torch.int64)
    got = reference.random.philox_words(signed[:1], counter[2], counter[3], signed[1:])
    assert tuple(got.flatten().tolist()) == words


@pytest.mark.parametrize("tensor", [False, True])
def test_the_kernel_uses_step_stream_and_both_seed_words(device, tensor):
    seed = 0x299F31D0A4093822
    argument = torch.tensor([seed], device=device.torch) if tensor else seed
    shape = (1, 8) if tensor else 8
    got = ops.philox_uniform(shape, seed=argument, step=0x13198A2E, stream=0x03707344, device=device.torch)
    words = reference.random.philox_words(torch.arange(2), 0x13198A2E, 0x03707344, torch.tensor([seed]))
    assert torch.equal(got.cpu().flatten(), (words.flatten() >> 8).float() * 2.0**-24)


def test_values_of_version_1():
    """The public contract: these values must never change within a version."""
    normal = ops.philox_normal(6, seed=0)
    uniform = ops.philox_uniform(6, seed=0, step=3)
    assert [v.hex() for v in normal.tolist()] == NORMALS
    assert [v.hex() for v in uniform.tolist()] == UNIFORMS


NORMALS = ["0x1.fb76660000000p-1", "-0x1.d96d600000000p-1", "-0x1.3c37400000000p-1", "-0x1.eda3660000000p-2",
           "-0x1.3aa6ae0000000p-3", "0x1.7254da0000000p-3"]
UNIFORMS = ["0x1.d7098c0000000p-1", "0x1.5cb8880000000p-3", "0x1.acd2260000000p-1", "0x1.991cf80000000p-2",
            "0x1.5a02400000000p-6", "0x1.b1c4b20000000p-1"]


@both
@pytest.mark.parametrize("size", [*cases.SIZES, 255, 256, 257, 1000])
def test_matches_the_reference(device, kind, size):
    got = fill(kind, size, seed=11, step=5, device=device.torch)
    want = OPS[kind][1](size if isinstance(size, tuple) else (size,), seed=11, step=5)
    assert got.shape == (size,) and got.dtype is torch.float32
    if kind == "uniform":
        assert torch.equal(got.cpu(), want.float())
    else:
        cases.close(got, want, rtol=6e-7, atol=1e-7)


@both
def test_the_same_bits_on_every_device(device, kind):
    for dtype in cases.ALL_FLOATS:
        got = fill(kind, (3, 333), seed=-1, step=2**32 - 1, stream=7, dtype=dtype, device=device.torch).cpu()
        with cases.cpu_kernels():
            want = fill(kind, (3, 333), seed=2**64 - 1, step=2**32 - 1, stream=7)
        assert torch.equal(got, want.to(dtype)), dtype


@both
def test_the_same_bits_on_every_instruction_set(kind):
    got = {}
    for isa in _C.isas():
        _C.set_isa(isa)
        got[isa] = fill(kind, 100_003, seed=3)
    assert len(got) >= 1 and all(torch.equal(g, got["base"]) for g in got.values())


@both
def test_the_same_bits_on_every_thread_count(kind):
    got = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        got.append(fill(kind, (7, 40_001), seed=3))
    assert all(torch.equal(g, got[0]) for g in got)


@both
def test_an_element_depends_on_its_position_only(kind):
    long = fill(kind, 5000, seed=4)
    for size in (1, 5, 257, 4096):
        assert torch.equal(fill(kind, size, seed=4), long[:size])
    assert torch.equal(fill(kind, (50, 100), seed=4).flatten(), long)


# seeds ----------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("size", [1, 3, 32, 33, 300])
def test_seeds_per_sample(device, kind, size):
    seeds = torch.tensor([5, -6, 2**40, 5], device=device.torch)
    got = fill(kind, (4, size), seed=seeds).cpu()
    for row, seed in zip(got, seeds.tolist(), strict=True):
        assert torch.equal(row, fill(kind, size, seed=seed))  # whatever batch it is in
    assert torch.equal(got[0], got[3])


@both
def test_a_seed_tensor_without_dimension_is_an_int(device, kind):
    seed = torch.tensor(12, device=device.torch)
    assert torch.equal(fill(kind, (4, 9), seed=seed).cpu(), fill(kind, (4, 9), seed=12))


def test_seeds_may_be_strided():
    seeds = torch.arange(8)[::2]
    assert torch.equal(ops.philox_normal((4, 3), seed=seeds), ops.philox_normal((4, 3), seed=seeds.clone()))


def test_no_seed_follows_torch_manual_seed():
    torch.manual_seed(0)
    a = ops.philox_normal(10)
    b = ops.philox_normal(10)
    torch.manual_seed(0)
    assert torch.equal(ops.philox_normal(10), a) and not torch.equal(a, b)


def test_streams_and_steps_share_nothing():
    seen = [ops.philox_normal(64, seed=1, **kw) for kw in ({}, {"step": 1}, {"stream": 1}, {"stream": 300})]
    seen += [ops.philox_normal(64, seed=2), ops.philox_normal(64, seed=2**32 + 1)]
    values = torch.cat(seen)
    assert values.unique().numel() == values.numel()
    assert STREAM_NORMAL != STREAM_UNIFORM


# quality --------------------------------------------------------------------------------------------------------------

COUNT = 1 << 20
ALPHA = 1e-4  # with fixed seeds: passes for ever, once it passes


def test_normals_are_normal():
    z = ops.philox_normal(COUNT, seed=2024).double().numpy()
    assert stats.kstest(z, "norm").pvalue > ALPHA
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = math.sqrt((math.prod(range(1, 2 * power, 2)) - moment**2) / COUNT)
        assert abs((z**power).mean() - moment) < 4.5 * spread, power
    for cut in (3.0, 4.0):  # tails
        expected = COUNT * 2 * stats.norm.sf(cut)
        assert abs((np.abs(z) > cut).sum() - expected) < 4.5 * math.sqrt(expected)
    for lag in (1, 2, 3, 4, 256):
        assert abs((z[:-lag] * z[lag:]).mean()) < 4.5 / math.sqrt(COUNT), lag


def test_uniforms_are_uniform():
    u = ops.philox_uniform(COUNT, seed=2024).double().numpy()
    assert u.min() >= 0 and u.max() < 1
    counts = np.bincount((u * 1024).astype(int), minlength=1024)
    assert stats.chisquare(counts).pvalue > ALPHA
    pairs = np.bincount((u[0::2] * 32).astype(int) * 32 + (u[1::2] * 32).astype(int), minlength=1024)
    assert stats.chisquare(pairs).pvalue > ALPHA


def test_accuracy_of_the_normals_over_the_whole_range():
    """Against float64 Box-Muller: also where the radius is tiny (u near 1) and in the far tail."""
    z = ops.philox_normal(1 << 18, seed=8)
    want = reference.random.philox_normal((1 << 18,), seed=8)
    assert ((z - want).abs() / want.abs().clamp_min(1e-3)).max() < 1e-6


# torch ----------------------------------------------------------------------------------------------------------------


@both
def test_out_and_memory(device, kind):
    out = torch.full((3, 5), math.nan, device=device.torch)
    assert fill(kind, (3, 5), seed=1, out=out) is out
    assert torch.equal(out.cpu(), fill(kind, (3, 5), seed=1))
    storage = torch.full((40,), 7.0, device=device.torch)
    view = storage[3:18].view(3, 5)  # an odd offset: no aligned vector stores
    fill(kind, (3, 5), seed=1, out=view)
    assert torch.equal(view, out) and (storage[:3] == 7).all() and (storage[18:] == 7).all()
    for offset in range(9):  # of 2-byte numbers: every alignment that a vector store may meet
        storage = torch.full((90,), 7.0, dtype=torch.bfloat16, device=device.torch)
        view = storage[offset : offset + 80]
        fill(kind, 80, seed=1, out=view)
        assert torch.equal(view, fill(kind, 80, seed=1, dtype=torch.bfloat16, device=device.torch))
        assert (storage[:offset] == 7).all() and (storage[offset + 80 :] == 7).all()


@both
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), 4, [2, 2], torch.Size([1, 1, 3])])
def test_shapes(kind, shape):
    got = fill(kind, shape, seed=1)
    assert got.shape == torch.Size([shape] if isinstance(shape, int) else shape)


def test_empty_samples_with_seeds():
    assert ops.philox_normal((0, 3), seed=torch.empty(0, dtype=torch.int64)).shape == (0, 3)
    assert ops.philox_normal((2, 0), seed=torch.tensor([1, 2])).shape == (2, 0)


@both
def test_opcheck_and_compile(kind):
    from gmkernels.ops.random import _op

    args = (None, [3, 5], 7, 0, 0, kind == "normal", torch.float32, torch.device("cpu"))
    assert set(torch.library.opcheck(_op.op, args).values()) == {"SUCCESS"}
    f = torch.compile(lambda x: x + fill(kind, x.shape, seed=7, device=x.device), fullgraph=True)
    x = torch.zeros(4, 6)
    assert torch.equal(f(x), fill(kind, x.shape, seed=7))
    drawn = torch.compile(lambda x: x + fill(kind, x.shape, device=x.device), fullgraph=True)
    assert not torch.equal(drawn(x), drawn(x))


def test_under_vmap_and_fake_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert ops.philox_normal((2, 3), seed=1).shape == (2, 3)
    assert ops.philox_normal((2, 3), seed=1, device="meta").is_meta
    got = torch.func.vmap(lambda x: x + ops.philox_normal((3,), seed=1))(torch.zeros(2, 3))
    cases.close(got[0], ops.philox_normal(3, seed=1), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 9), max_size=4), seed=st.integers(-(2**63), 2**64 - 1),
       step=st.integers(0, 2**32 - 1), dtype=st.sampled_from(cases.ALL_FLOATS))
def test_any_shape_and_seed(shape, seed, step, dtype):
    want = reference.random.philox_uniform(shape, seed=seed, step=step)
    assert torch.equal(ops.philox_uniform(shape, seed=seed, step=step, dtype=dtype), want.float().to(dtype))


# bad input ------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kwargs, error, message", [
    ({"shape": (2, -1)}, ValueError, "shape must have no negative size, got (2, -1)"),
    ({"shape": 2.5}, TypeError, "shape must be an int or a sequence of ints, got float"),
    ({"shape": (2, 2.5)}, TypeError, "shape must be an int or a sequence of ints"),
    ({"shape": (2**40, 2**40)}, ValueError, "elements, more than"),
    ({"dtype": torch.int32}, TypeError, "dtype must be one of torch.float32"),
    ({"dtype": torch.complex64}, TypeError, "dtype must be one of torch.float32"),
    ({"seed": 1.5}, TypeError, "seed must be an integer, got float"),
    ({"seed": True}, TypeError, "seed must be an integer, got bool"),
    ({"seed": 2**64}, ValueError, "seed must be in [-9223372036854775808, 18446744073709551616), got 1844"),
    ({"seed": torch.tensor([1, 2, 3])}, ValueError, "seed must have shape [] or [2], got (3,)"),
    ({"seed": torch.tensor([[1]])}, ValueError, "seed must have shape [] or [2], got (1, 1)"),
    ({"seed": torch.tensor(1.0)}, TypeError, "seed must be an int64 tensor, got torch.float32"),
    ({"seed": torch.tensor([1, 2], device="meta")}, ValueError, "seed is on meta, the output on cpu"),
    ({"step": -1}, ValueError, "step must be in [0, 4294967296), got -1"),
    ({"step": 2**32}, ValueError, "step must be in"),
    ({"step": "a"}, TypeError, "step must be an integer, got str"),
    ({"stream": 2**32}, ValueError, "stream must be in"),
    ({"out": torch.empty(3, 2)}, ValueError, "out must be torch.float32 (2, 3), got torch.float32 (3, 2)"),
    ({"out": torch.empty(2, 3), "dtype": torch.float64}, ValueError, "out must be torch.float64 (2, 3), got"),
    ({"out": torch.empty(3, 2).t()}, ValueError, "out must be a contiguous torch.Tensor"),
    ({"out": [1.0]}, TypeError, "out must be a torch.Tensor, got list"),
])
def test_bad_input(kind, kwargs, error, message):
    device = "cpu" if "seed" in kwargs and isinstance(kwargs["seed"], torch.Tensor) else None
    arguments = {"shape": (2, 3), "seed": 1, "device": device, **kwargs}
    with pytest.raises(error, match=re.escape(message)):
        fill(kind, **arguments)
