"""core/simd.h and core/half.h, compiled for each instruction set of this machine, against numpy in float64."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gmkernels import _C

ROOT = Path(__file__).parents[1]
FLAGS = {"base": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}

SOURCE = """
#define GMK_ISA test
#include "core/simd_math.h"
using namespace gmk;
using namespace gmk::isa_test;
template <class T, class F> static void map(const T* x, T* y, long n, F f) {
  constexpr int w = simd<T>::n;
  long i = 0;
  for (; i + w <= n; i += w) store(y + i, f(load(x + i)));
  if (i < n) store_some(y + i, f(load_some(x + i, n - i)), n - i);
}
#define EACH(name, call)                                                                                             \\
  extern "C" void name##_f32(const float* x, float* y, long n) { map(x, y, n, [](vfloat v) { return call(v); }); }   \\
  extern "C" void name##_f64(const double* x, double* y, long n) { map(x, y, n, [](vdouble v) { return call(v); }); }
EACH(exp, vexp) EACH(exp_nonpositive, vexp_nonpositive) EACH(log, vlog) EACH(tanh, vtanh) EACH(sigmoid, vsigmoid)
extern "C" double sum_f32(const float* x) { return hsum(load(x)); }
template <class T> static void halves(const float* x, T* h, float* back, long n) {
  long i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store_float(h + i, load_float(x + i));
    store_float(back + i, load_float(h + i));
  }
  store_float_some(h + i, load_float_some(x + i, n - i), n - i);
  store_float_some(back + i, load_float_some(h + i, n - i), n - i);
}
extern "C" void bf16_round(const float* x, bf16* h, float* back, long n) { halves(x, h, back, n); }
extern "C" void f16_round(const float* x, f16* h, float* back, long n) { halves(x, h, back, n); }
"""


@pytest.fixture(scope="module", params=_C.isas())
def lib(request, tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("simd")
    (folder / "simd.cpp").write_text(SOURCE)
    flags = "-std=c++17 -O2 -fno-math-errno -fno-trapping-math -ffp-contract=off -Wno-psabi -shared -fPIC".split()
    flags += [*FLAGS[request.param], f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, folder / "simd.cpp", "-o", folder / "simd.so"], check=True)
    return ctypes.CDLL(str(folder / "simd.so"))


def addresses(*arrays):
    return [ctypes.c_void_p(a.ctypes.data) for a in arrays]


def call(lib, name, x):
    x = np.ascontiguousarray(x)
    y = np.empty_like(x)
    suffix = "f32" if x.dtype == np.float32 else "f64"
    getattr(lib, f"{name}_{suffix}")(*addresses(x, y), ctypes.c_long(x.size))
    return y


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def grid(dtype, low, high):
    rng = np.random.default_rng(0)
    return np.concatenate([np.linspace(low, high, 100_003), rng.uniform(low, high, 50_000)]).astype(dtype)


CASES = [  # name, formula, range for float32, range for float64, bound in ulp
    ("exp", np.exp, (-87.3, 88.7), (-708, 709.7), 2),
    ("exp_nonpositive", np.exp, (-87, 0), (-708, 0), 2),
    ("tanh", np.tanh, (-12, 12), (-25, 25), 4),
    ("sigmoid", sigmoid, (-80, 80), (-600, 600), 4),
]


@pytest.mark.parametrize("name, formula, narrow, wide, ulp", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_elementary_functions(lib, name, formula, narrow, wide, ulp, dtype):
    x = grid(dtype, *(narrow if dtype is np.float32 else wide))
    x = np.concatenate([x, x * dtype(1e-4), x * dtype(1e-8)])
    want = formula(x.astype(np.longdouble))
    error = np.abs(call(lib, name, x).astype(np.longdouble) - want) / np.spacing(np.abs(want).astype(dtype))
    assert error.max() <= ulp


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log(lib, dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    edges = [tiny, 7 * tiny, np.finfo(dtype).tiny]
    x = np.concatenate([np.exp(grid(dtype, -80, 80)), 1 + grid(dtype, -1e-3, 1e-3), edges]).astype(dtype)
    want = np.log(x.astype(np.longdouble))
    error = np.abs(call(lib, "log", x).astype(np.longdouble) - want) / np.spacing(np.abs(want).astype(dtype))
    assert error.max() <= 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(lib, dtype):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 1e30, -1e30], dtype)
    big = dtype(1e30)
    with np.errstate(all="ignore"):
        got = call(lib, "exp", x)[[0, 1, 2, 3, 4, 6, 7]]
        np.testing.assert_array_equal(got, dtype([np.nan, np.inf, 0, 1, 1, np.inf, 0]))
        np.testing.assert_array_equal(call(lib, "exp_nonpositive", x[[0, 2, 3, 7]]), dtype([np.nan, 0, 1, 0]))
        np.testing.assert_array_equal(call(lib, "tanh", x)[[0, 1, 2, 3, 6, 7]], dtype([np.nan, 1, -1, 0, 1, -1]))
        assert np.signbit(call(lib, "tanh", x)[4])
        np.testing.assert_array_equal(call(lib, "sigmoid", x)[[0, 1, 2, 3, 6, 7]], dtype([np.nan, 1, 0, 0.5, 1, 0]))
        got = call(lib, "log", x)
    np.testing.assert_array_equal(got[[0, 1, 2, 3, 4, 5]], dtype([np.nan, np.inf, np.nan, -np.inf, -np.inf, np.nan]))
    np.testing.assert_allclose(got[6], np.log(np.float64(big)), rtol=1e-6)


def test_halves_round_to_nearest_even(lib):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    special = [0x7FC00000, 0x7F800000, 0xFF800000, 0x7F800001, 0x80000000]
    bits = np.concatenate([rng.integers(0, 2**32, 200_000, dtype=np.uint64), np.arange(0x33000000, 0x33900000, 997),
                           np.arange(0x477F0000, 0x47810000, 13), special])
    x = bits.astype(np.uint32).view(np.float32)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        half, back = np.empty(x.size, np.uint16), np.empty_like(x)
        getattr(lib, f"{name}_round")(*addresses(x, half, back), ctypes.c_long(x.size))
        want = torch.from_numpy(x.copy()).to(dtype)
        got = torch.from_numpy(half.view(np.int16)).view(dtype).float()
        torch.testing.assert_close(got, want.float(), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(torch.from_numpy(back), want.float(), rtol=0, atol=0, equal_nan=True)


def test_sum_of_lanes(lib):
    lib.sum_f32.restype = ctypes.c_double
    x = np.arange(16, dtype=np.float32)
    assert lib.sum_f32(*addresses(x)) in (sum(range(lanes)) for lanes in (4, 8, 16))
