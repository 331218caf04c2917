"""Interleaved timing: one process, one shuffled round after another, every callable once per round.

A machine that is shared drifts: clocks, neighbours, caches. Whatever happens in a round happens to everyone in it, so
only ratios inside a round mean something, and those are what `ratio` pairs. docs/benchmark.md says how to read them.
"""

import gc
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

SAMPLE = 1e-3  # seconds: a sample is at least this long, so short calls are looped
WARM = 50e-3  # calls shorter than this are called once, untimed, before each of their samples
MIN_ROUNDS, MAX_ROUNDS = 3, 200
FLUSH_BYTES = 256 << 20  # more than any L2


@dataclass
class Spread:
    """Median, least, and quartiles of `n` numbers. "The spread" is p25 to p75: the middle half of the samples."""

    median: float
    min: float
    p25: float
    p75: float
    n: int

    @classmethod
    def of(cls, values):
        ordered = sorted(values)
        p25, median, p75 = (_quantile(ordered, q) for q in (0.25, 0.5, 0.75))
        return cls(median, ordered[0], p25, p75, len(ordered))

    def overlaps(self, other):
        return self.p25 <= other.p75 and other.p25 <= self.p75

    def holds(self, value):
        return self.p25 <= value <= self.p75

    def as_dict(self):
        return {"median": self.median, "min": self.min, "p25": self.p25, "p75": self.p75, "n": self.n}

    @classmethod
    def from_dict(cls, d):
        return cls(d["median"], d["min"], d["p25"], d["p75"], d["n"])


def _quantile(ordered, q):
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@dataclass
class Timings:
    """Seconds per call by name and round, and why a name has none."""

    samples: dict[str, dict[int, float]] = field(default_factory=dict)  # name -> {round: seconds per call}
    inner: dict[str, int] = field(default_factory=dict)  # name -> calls in one sample
    first: dict[str, float] = field(default_factory=dict)  # name -> seconds of the very first call (compilation)
    errors: dict[str, str] = field(default_factory=dict)  # name -> what it raised

    def spread(self, name):
        return Spread.of(self.samples[name].values())


def ratio(numerator, denominator, scale=1.0):
    """numerator / denominator of two {round: seconds}: ratio of the medians, quartiles of the ratios within rounds."""
    paired = [scale * numerator[r] / denominator[r] for r in numerator.keys() & denominator.keys()]
    if not paired:
        raise ValueError("no round holds both")
    spread = Spread.of(paired)
    median = scale * Spread.of(numerator.values()).median / Spread.of(denominator.values()).median
    # The ratio of medians and the median of ratios differ a little; the spread must hold the number it is printed for.
    return Spread(median, spread.min, min(spread.p25, median), max(spread.p75, median), spread.n)


class _CpuClock:
    def sample(self, call, inner):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        return (time.perf_counter() - start) / inner

    def warms(self, seconds):
        return seconds < WARM


class _CudaClock:
    """CUDA events around each call, with a cold L2.

    Writing FLUSH_BYTES takes the GPU long enough for the CPU to queue the next call behind it, so what lies between the
    events is the GPU's time and not Python's. `inner` calls are flushed one by one and their times are averaged.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        self.trash = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)

    def sample(self, call, inner):
        pairs = []
        for _ in range(inner):
            self.trash.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self.device)
        return sum(s.elapsed_time(e) for s, e in pairs) * 1e-3 / inner

    def warms(self, seconds):
        return False  # a cold L2 is the point


@contextmanager
def thread_count(threads):
    """torch, and every OpenMP or BLAS pool that a rival brings along, limited to `threads`."""
    before = torch.get_num_threads()
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        threadpool_limits = None
    limits = threadpool_limits(threads) if threadpool_limits else None
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        if limits is not None:
            limits.restore_original_limits()
        torch.set_num_threads(before)


def measure(calls, budget, device="cpu", progress=lambda text: None):
    """Time every callable of `calls` (name -> callable) for about `budget` seconds after warm-up: a `Timings`.

    The first name runs in every round. Another one that has used more than twice its fair share of the time sits rounds
    out, after MIN_ROUNDS, so that a rival a hundred times slower does not eat the samples of the rest. A callable that
    raises is out, with the error noted.
    """
    clock = _CudaClock(device) if torch.device(device).type == "cuda" else _CpuClock()
    result, warm = Timings(), {}
    for name, call in calls.items():
        progress(f"warm-up {name}")
        try:
            result.first[name] = clock.sample(call, 1)
            seconds = clock.sample(call, 1)
            if seconds < WARM:
                seconds = min(seconds, *(clock.sample(call, 1) for _ in range(3)))
        except Exception as error:  # noqa: BLE001  a rival may raise anything at all; the run goes on without it
            result.errors[name] = describe(error)
            continue
        result.inner[name] = min(100_000, max(1, round(SAMPLE / max(seconds, 1e-9))))
        warm[name] = clock.warms(seconds)
        result.samples[name] = {}

    progress("measuring")
    first, spent = next(iter(calls), None), dict.fromkeys(result.samples, 0.0)
    collecting, order, start, done = gc.isenabled(), random.Random(0), time.perf_counter(), 0
    gc.collect()
    gc.disable()
    try:
        while result.samples and done < MAX_ROUNDS:
            elapsed = time.perf_counter() - start
            if done >= MIN_ROUNDS and elapsed >= budget:
                break
            fair = 2 * elapsed / len(result.samples)
            names = [n for n in result.samples if done < MIN_ROUNDS or n == first or spent[n] <= fair]
            order.shuffle(names)  # nobody always runs behind the same neighbour, in the cache that one leaves
            for name in names:
                begin = time.perf_counter()
                try:
                    if warm[name]:
                        calls[name]()
                    result.samples[name][done] = clock.sample(calls[name], result.inner[name])
                except Exception as error:  # noqa: BLE001
                    result.errors[name] = describe(error)
                    del result.samples[name]
                spent[name] += time.perf_counter() - begin
            done += 1
    finally:
        if collecting:
            gc.enable()
    return result


def describe(error):
    """One line for the table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
