"""The emulator itself: right numbers, and a report for each bug that was planted in tests/simt/bugs.cu."""

import itertools
import re
import threading
from pathlib import Path

import pytest
import torch

from gmkernels import ops
from simt import SCHEDULES

backend = pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)

SOURCE = (Path(__file__).parent / "simt" / "bugs.cu").read_text().splitlines()

# kernel: (what must be reported at the line that says BUG, what else follows from the bug, n)
BUGS = {
    "read_past_end": ("out-of-bounds", (), 128),
    "write_past_end": ("out-of-bounds", (), 100),
    "read_before_start": ("out-of-bounds", (), 128),
    "vector_past_end": ("out-of-bounds", (), 102),
    "shared_past_end": ("out-of-bounds", (), 128),
    "local_past_end": ("out-of-bounds", (), 64),
    "dynamic_shared_past_end": ("out-of-bounds", (), 64),
    "copy_past_end": ("out-of-bounds", ("race",), 64),
    "atomic_past_end": ("out-of-bounds", ("unwritten-output",), 64),
    "misaligned_vector": ("misaligned", (), 128),
    "misaligned_double": ("misaligned", (), 64),
    "uninitialised_output": ("uninitialised", (), 128),
    "uninitialised_shared": ("uninitialised", (), 128),
    "write_to_input": ("write-to-input", (), 128),
    "unwritten": ("unwritten-output", (), 128),
    "write_between": ("write-between", (), 64),
    "too_much_shared": ("bad-launch", (), 64),
    "host_read": ("host-pointer", (), 64),
    "host_write": ("host-pointer", (), 64),
    "null_pointer": ("host-pointer", (), 64),
    "other_threads_local": ("host-pointer", (), 64),
    "stack_overflow": ("crash", (), 64),
    "missing_barrier": ("race", ("uninitialised",), 128),
    "missing_second_barrier": ("race", (), 128),
    "two_threads_one_element": ("race", (), 64),
    "two_blocks_one_element": ("race", (), 128),
    "missing_syncwarp": ("race", ("uninitialised",), 128),
    "shuffle_is_no_barrier": ("race", ("uninitialised",), 128),
    "missing_fence": ("race", (), 256),
    "plain_counter": ("race", (), 128),
    "divergent_barrier": ("barrier-divergence", (), 128),
    "exited_barrier": ("barrier-exited", (), 100),
    "deadlock": ("deadlock", (), 64),
    "spin": ("spin", (), 128),
    "endless_loop": ("spin", (), 64),
    "wrong_mask": ("warp-mask", (), 64),
    "inactive_source": ("shuffle-source", (), 64),
    "exited_lanes": ("warp-mask", (), 64),
    "vote_mask": ("warp-mask", (), 64),
    "mma_with_half_a_warp": ("warp-mask", ("mma-mask",), 64),
    "missing_wait": ("uninitialised", ("race",), 64),
    "wait_without_barrier": ("race", ("uninitialised",), 64),
    "copies_never_waited": ("async-not-waited", (), 64),
    "async_past_end": ("out-of-bounds", (), 64),
    "async_misaligned": ("misaligned", (), 64),
    "async_overwrites": ("race", ("uninitialised",), 64),
}
USES_STATE = {"missing_fence", "plain_counter", "atomic_past_end"}
COPIES = {name for name in BUGS if name.startswith("async_")} | {"missing_wait", "wait_without_barrier",
                                                                  "copies_never_waited"}
PLACELESS = {"unwritten-output", "write-between", "crash", "async-not-waited"}  # no single line is to blame


def run(name, bug, n, schedule="ascending"):
    """One kernel of bugs.cu on x = 0, 1, 2, ...: its output, and its reports."""
    x = torch.arange(max(n, 256), dtype=torch.float32)[:n].clone()
    host = torch.ones(n)
    state = torch.zeros(1, dtype=torch.int32) if name in USES_STATE else None
    out = torch.full((2 * n if name == "write_between" else n,), -1.0)
    out = out[::2] if name == "write_between" else out
    if name in COPIES:
        x = torch.arange(256, dtype=torch.float32)
    reports = []
    with backend.running(schedule):
        try:
            backend._call.Kernel.backend("bug", (out, state), (x, state), (host.data_ptr(), n, name, bug))
        except backend.Reported as error:
            reports = error.reports
            assert all(str(report) in str(error) for report in reports)
    assert torch.equal(host, torch.ones(n))
    return out, reports


def line_of(name):
    (line,) = [i for i, text in enumerate(SOURCE, 1) if text.endswith(f"// BUG {name}")]
    return f"tests/simt/bugs.cu:{line}"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_reported(name, schedule):
    kind, also, n = BUGS[name]
    _, reports = run(name, True, n, schedule)
    kinds = {report.kind for report in reports}
    assert kind in kinds and kinds <= {kind, *also}, "\n".join(map(str, reports))
    first = next(report for report in reports if report.kind == kind)
    if kind not in PLACELESS:
        lines = [re.findall(r"at (tests/simt/bugs.cu:\d+)", str(r)) for r in reports if r.kind == kind]
        assert line_of(name) in sum(lines, []), str(first)
    if kind not in ("unwritten-output", "write-between"):
        assert first.kernel == f"{name}_kernel<true>" and len(first.block) == len(first.thread) == 3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", BUGS)
def test_the_same_kernel_without_the_bug_is_clean(name, schedule):
    n = BUGS[name][2]
    out, reports = run(name, False, n, schedule)
    assert not reports
    assert not (out == -1).any()


def test_every_kind_of_report_has_a_planted_bug_and_a_line_in_the_docs():
    root = Path(__file__).parents[1]
    code = "".join(p.read_text() for p in (root / "tests" / "simt").iterdir() if p.suffix in (".cpp", ".py"))
    kinds = set(re.findall(r'\b[rR]eport\(\s*"([a-z-]+)"', code))
    assert len(kinds) >= 18
    assert kinds == {kind for kind, *_ in BUGS.values()} | {kind for _, also, _ in BUGS.values() for kind in also}
    assert kinds == set(re.findall(r"^\| `([a-z-]+)` \|", (root / "docs" / "emulator.md").read_text(), re.M))


def test_report_tells_what_an_author_needs():
    _, reports = run("missing_second_barrier", True, 64)
    report = next(r for r in reports if "write after an unordered read" in r.message)
    write, read = (next(i for i, text in enumerate(SOURCE, 1) if part in text)
                   for part in ("// BUG missing_second_barrier", "const float v = tile[63 - tid]"))
    text = str(report)
    assert "race: " in text and "of shared array tile" in text
    assert {f"tests/simt/bugs.cu:{write}", f"tests/simt/bugs.cu:{read}"} == set(re.findall(r"at (tests/\S+:\d+)", text))
    assert "in missing_second_barrier_kernel<true>, block (0, 0, 0), thread (" in text
    _, (report,) = run("read_past_end", True, 100)
    assert "read of 4 bytes, at byte 400 of in[0] float32[100] (400 bytes)" in str(report)
    assert "block (1, 0, 0), thread (35, 0, 0)" in str(report)


def test_wrong_launch_is_an_error_as_in_cuda():
    assert not run("too_many_threads", False, 13)[1]
    with pytest.raises(RuntimeError, match="invalid configuration"):
        run("too_many_threads", True, 13)


def test_more_threads_than_launch_bounds_is_an_error():
    out, reports = run("launch_bounds", False, 64)
    assert not reports and bool((out == 1).all())
    with pytest.raises(RuntimeError, match=r"96 in a block, __launch_bounds__ says 64"):
        run("launch_bounds", True, 96)


def test_votes_and_shuffles():
    out, reports = run("votes", False, 13)
    assert not reports
    assert out.tolist() == [1, 496, 31, 1, 0, 7, 1, 0, 8, 2, 496, 1, 7.75]


def fragments(a, b, c):
    """A [16, k], B [k, 8], C [16, 8] as the ten words of each lane, by the formula in csrc/cuda/prims.cuh."""
    pairs_a, pairs_b = a.contiguous().view(torch.float32), b.t().contiguous().view(torch.float32)  # [16, 8], [8, 8]
    words = torch.empty(32, 10)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            words[lane, i] = pairs_a[g + 8 * (i & 1), t + 4 * (i >> 1)]
            words[lane, 6 + i] = c[g + 8 * (i >> 1), 2 * t + (i & 1)]
        for i in range(2):
            words[lane, 4 + i] = pairs_b[g, t + 4 * i]
    return words


@pytest.mark.parametrize("by_shuffles", [False, True])
@pytest.mark.parametrize("name", ["mma_bf16", "mma_f16", "mma_tf32"])
def test_mma(name, by_shuffles):
    dtype = {"mma_bf16": torch.bfloat16, "mma_f16": torch.float16, "mma_tf32": torch.float32}[name]
    depth = 8 if dtype == torch.float32 else 16
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(s, generator=generator) for s in ((16, depth), (depth, 8), (16, 8)))
    a, b = a.to(dtype), b.to(dtype)
    if name == "mma_tf32":  # 10 bits of mantissa
        a, b = ((v.view(torch.int32) & ~0x1FFF).view(torch.float32) for v in (a, b))
    x, out = fragments(a, b, c).flatten(), torch.empty(128)
    with backend.running():
        backend._call.Kernel.backend("bug", (out, None), (x, None), (0, 128, name, by_shuffles))
    got = torch.empty(16, 8)
    for lane, i in itertools.product(range(32), range(4)):
        got[lane // 4 + 8 * (i >> 1), 2 * (lane % 4) + (i & 1)] = out[4 * lane + i]
    torch.testing.assert_close(got, (a.double() @ b.double() + c.double()).float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("by_shuffles", [False, True])
def test_mma_tf32_does_not_see_the_lower_13_bits(by_shuffles):
    generator, outs = torch.Generator().manual_seed(0), []
    a, b = torch.randn(16, 8, generator=generator), torch.randn(8, 8, generator=generator)
    for lower in (0, 0x1FFF):
        words = [((v.view(torch.int32) & ~0x1FFF) | lower).view(torch.float32) for v in (a, b)]
        x, out = fragments(*words, torch.zeros(16, 8)).flatten(), torch.empty(128)
        with backend.running():
            backend._call.Kernel.backend("bug", (out, None), (x, None), (0, 128, "mma_tf32", by_shuffles))
        outs.append(out)
    assert outs[0].count_nonzero() == 128 and torch.equal(*outs)


# running() itself ----------------------------------------------------------------------------------------------------


def test_backend_is_restored_after_an_error():
    before = backend._call.Kernel.backend
    with pytest.raises(ZeroDivisionError), backend.running():
        assert backend._call.Kernel.backend is not before
        raise ZeroDivisionError
    assert backend._call.Kernel.backend is before


def test_schedules_repeat_exactly_and_differ():
    def switches(schedule):
        with backend.running(schedule) as simt:
            simt.counters()
            ops.philox_normal((300,), seed=0)
            return simt.counters()

    assert switches("preempt:1") == switches("preempt:1")
    assert switches("preempt:1") != switches("preempt:2")


@pytest.mark.parametrize("wrong", ["upwards", "random:", "random:x", "ascending,descending"])
def test_unknown_schedule_is_an_error(wrong, monkeypatch):
    with pytest.raises(ValueError, match="schedule must be one of ascending, .* got '" + wrong), backend.running(wrong):
        pass
    monkeypatch.setenv("GMK_SIMT_SCHEDULE", wrong)
    with pytest.raises(ValueError, match="schedule must be one of"), backend.running():
        pass


def test_unchecked_runs_report_nothing():
    x, out = torch.zeros(64), torch.zeros(64)
    with backend.running(check=False):
        backend._call.Kernel.backend("bug", (out, None), (x, None), (0, 64, "read_past_end", True))


def test_only_some_blocks():
    out = torch.full((256,), -1.0)
    x = torch.arange(256.0)
    with backend.running(blocks=[2]):
        backend._call.Kernel.backend("bug", (out, None), (x, None), (0, 256, "read_past_end", False))
    assert torch.equal(out[128:192], x[128:192]) and bool((out[:128] == -1).all()) and bool((out[192:] == -1).all())


def test_scratch_need_not_be_written_whole(monkeypatch):
    assert run("unwritten", True, 64)[1]
    monkeypatch.setitem(backend._call.Kernel.scratch, "bug", 2)
    assert not run("unwritten", True, 64)[1]


def test_views_keep_their_alignment_and_bounds():
    x, out = torch.arange(300.0), torch.empty(256)
    with backend.running(), pytest.raises(backend.Reported, match="misaligned"):
        backend._call.Kernel.backend("bug", (out, None), (x[1:257], None), (0, 256, "misaligned_vector", False))
    with backend.running():
        backend._call.Kernel.backend("bug", (out, None), (x[4:260], None), (0, 256, "misaligned_vector", False))


def test_threads_take_turns():
    wants = [ops.philox_normal((50,), seed=s) for s in range(4)]
    gots = [None] * 4
    with backend.running():

        def work(s):
            gots[s] = ops.philox_normal((50,), seed=s)

        workers = [threading.Thread(target=work, args=(s,)) for s in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=60)
    assert all(torch.equal(got, want) for got, want in zip(gots, wants, strict=True))


# a product kernel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 127, 1023, 1025])
def test_philox_has_the_bits_of_the_cpu(size, dtype):
    for op in (ops.philox_normal, ops.philox_uniform):
        want = op(size, seed=7, step=3, dtype=dtype)
        with backend.running():
            got = op(size, seed=7, step=3, dtype=dtype)
        assert torch.equal(got, want)


def test_philox_seeds_per_sample():
    seeds = torch.tensor([5, -1, 2**62])
    want = ops.philox_normal((3, 7), seed=seeds)
    with backend.running():
        assert torch.equal(ops.philox_normal((3, 7), seed=seeds), want)
