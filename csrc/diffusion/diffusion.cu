// One thread makes a group of 16 bytes of each tensor (4 elements at least: one Philox block); threads stride over all
// groups. Bound: memory, streams * numel * sizeof(T); drawing noise adds some 40 integer and 45 float operations an
// element, about as much as the float32 loads take. A sample's noise starts at its own block 0: nothing depends on the grid.
#include "cuda/real.cuh"
#include "diffusion/diffusion.h"

namespace gmk {
namespace {

template <class R>
struct Row {
  R c[kCoefficients];
};
template <class R>
GMK_DEV Row<R> load_row(const DiffusionStep& a, int64_t row) {
  Row<R> r;
#pragma unroll
  for (int k = 0; k < kCoefficients; ++k) {
    const int64_t at = row * kCoefficients + k;
    r.c[k] =
        a.wide ? R(static_cast<const double*>(a.coefficients)[at]) : R(static_cast<const float*>(a.coefficients)[at]);
  }
  return r;
}
template <class R>
GMK_DEV R term(R c, R x) {
  return c != R(0) ? c * x : R(0);
}

// `count` elements of a stream: one 16-byte access where the launcher has seen that it is aligned.
template <class T, int n, bool kPacked>
GMK_DEV void read(const void* stream, int64_t at, int count, typename Real<T>::type (&v)[n]) {
  const T* const p = static_cast<const T*>(stream) + at;
  if (kPacked && count == n) {
    const Pack<T, n> pack = load_pack<T, n>(p);
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = Real<T>::from(pack.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = i < count ? Real<T>::from(p[i]) : 0;
  }
}
template <class T, int n, bool kPacked>
GMK_DEV void write(void* stream, int64_t at, int count, const typename Real<T>::type (&v)[n]) {
  T* const p = static_cast<T*>(stream) + at;
  if (kPacked && count == n) {
    Pack<T, n> pack;
#pragma unroll
    for (int i = 0; i < n; ++i) pack.v[i] = Real<T>::to(v[i]);
    store_pack(p, pack);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < count) p[i] = Real<T>::to(v[i]);
  }
}

// y where the mask is 0, `known` where it is 1, whatever the other holds.
template <class R>
GMK_DEV R blend(R mask, R known, R y) {
  return mask == R(0) ? y : mask == R(1) ? known : y + mask * (known - y);
}

// Elements [at, at + count), which share a row of coefficients. kKnown: there may be a mask.
template <class T, int n, bool kPacked, bool kKnown>
GMK_DEV void step(const DiffusionStep& a, const Row<typename Real<T>::type>& row, int64_t at, int count,
                  const float (&drawn)[n], const float (&of_known)[kKnown ? n : 1]) {
  using R = typename Real<T>::type;
  const R(&c)[kCoefficients] = row.c;
  R x[n], m[n], v[n], x0[n], out[n];
  read<T, n, kPacked>(a.x, at, count, x);
  read<T, n, kPacked>(a.model_output, at, count, m);
  if (a.uncond) {
    read<T, n, kPacked>(a.uncond, at, count, v);
#pragma unroll
    for (int i = 0; i < n; ++i) m[i] = v[i] + R(a.guidance) * (m[i] - v[i]);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const R y = term(c[kA], x[i]) + term(c[kB], m[i]);
    x0[i] = y < R(a.low) ? R(a.low) : y > R(a.high) ? R(a.high) : y;  // NaN stays
    if (!kKnown) out[i] = term(c[kC0], x0[i]) + term(c[kC1], x[i]);   // not in a loop of its own: sm_75 would spill
  }
  R mask[n], known[n];
  if (kKnown && a.mask) {
    read<T, n, kPacked>(a.mask, at, count, mask);
    read<T, n, kPacked>(a.known, at, count, known);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      known[i] = R(a.known_signal) * known[i];
      if (a.known_noise != 0) known[i] += R(a.known_noise) * R(of_known[kKnown ? i : 0]);
      if (a.known_x0) x0[i] = blend(mask[i], known[i], x0[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (kKnown) out[i] = term(c[kC0], x0[i]) + term(c[kC1], x[i]);
#pragma unroll
  for (int h = 0; h < 3; ++h)
    if (a.history[h] && c[kC2 + h] != R(0)) {
      read<T, n, kPacked>(a.history[h], at, count, v);
#pragma unroll
      for (int i = 0; i < n; ++i) out[i] += c[kC2 + h] * v[i];
    }
  if (a.noise_kind != kNoNoise && c[kS] != R(0)) {
    R z[n];
    if (a.noise_kind == kGivenNoise) {
      read<T, n, kPacked>(a.noise, at, count, z);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) z[i] = R(drawn[i]);
    }
    if (a.variance) {
      read<T, n, kPacked>(a.variance, at, count, v);
#pragma unroll
      for (int i = 0; i < n; ++i) z[i] *= sqrt(v[i]);
    }
#pragma unroll
    for (int i = 0; i < n; ++i) out[i] += c[kS] * z[i];
  }
  if (kKnown && a.mask && !a.known_x0) {
#pragma unroll
    for (int i = 0; i < n; ++i) out[i] = blend(mask[i], known[i], out[i]);
  }
  write<T, n, kPacked>(a.out, at, count, out);
  if (a.x0) write<T, n, kPacked>(a.x0, at, count, x0);
}

// kKnown: the step may have a mask, or an index that is read from memory.
template <class T, int n, bool kPacked, bool kKnown>
__global__ void __launch_bounds__(256) diffusion_step_kernel(DiffusionStep a, int64_t rows, int64_t size) {
  using R = typename Real<T>::type;
  bool inside = true;
  if (kKnown && a.index) {
    const int64_t index = *a.index;
    inside = index >= 0 && index < a.index_rows;
    a.coefficients = static_cast<const char*>(a.coefficients) + (inside ? index : 0) * kCoefficients * (a.wide ? 8 : 4);
    a.step = uint32_t(index);
  }
  const bool known_noise = kKnown && a.mask && a.known_noise != 0;
  const int64_t groups = (size + n - 1) / n, total = rows * groups, stride = int64_t(gridDim.x) * blockDim.x;
  const bool one_row = a.coefficient_rows == 1;
  const int64_t sample = one_row ? a.numel : a.numel / a.coefficient_rows;
  Row<R> row = load_row<R>(a, 0);
  if (!inside) row.c[kC0] = row.c[kC1] = row.c[kA] = R(NAN);  // a GPU cannot say that there is no such step
  for (int64_t job = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; job < total; job += stride) {
    const int64_t seed_row = rows == 1 ? 0 : job / groups, group = rows == 1 ? job : job % groups;
    const int64_t at = seed_row * size + group * n, left = size - group * n;
    const int count = left < n ? int(left) : n;
    const int64_t first = one_row ? 0 : at / sample, last = one_row ? 0 : (at + count - 1) / sample;
    if (!one_row) row = load_row<R>(a, first);
    float z[n] = {}, other[kKnown ? n : 1] = {};
    if (a.noise_kind == kDrawnNoise && (first != last || row.c[kS] != R(0))) {
      const PhiloxKey key = philox_key(a.seeds ? uint64_t(a.seeds[seed_row]) : a.seed);
#pragma unroll
      for (int i = 0; i < n; i += 4)
        normals_from(philox(uint64_t(group * (n / 4) + i / 4), a.step, kStreamDiffusionStep, key), z + i);
    }
    if (known_noise) {
      const PhiloxKey key = philox_key(a.seeds ? uint64_t(a.seeds[seed_row]) : a.seed);
#pragma unroll
      for (int i = 0; i < n; i += 4)
        if constexpr (kKnown)
          normals_from(philox(uint64_t(group * (n / 4) + i / 4), a.step, kStreamKnown, key), other + i);
    }
    if (first == last) {
      step<T, n, kPacked, kKnown>(a, row, at, count, z, other);
    } else {  // samples shorter than a group, or not a multiple of it
#pragma unroll
      for (int i = 0; i < n; ++i) {  // unrolled: an index known only at run time would put z into local memory
        const float one[1] = {z[i]}, of_known[1] = {other[kKnown ? i : 0]};
        if (i < count) step<T, 1, false, kKnown>(a, load_row<R>(a, (at + i) / sample), at + i, 1, one, of_known);
      }
    }
  }
}

template <class T>
Status launch(const DiffusionStep& a, void* stream) {
  constexpr int n = sizeof(T) == 2 ? 8 : 4;
  const bool drawn = a.noise_kind == kDrawnNoise || (a.mask && a.known_noise != 0), known = a.mask || a.index;
  const int64_t rows = drawn ? a.seed_rows : 1, size = a.numel / rows;
  bool packed = rows == 1 || size % n == 0;
  const void* const streams[] = {a.out,        a.x0,         a.x,        a.model_output, a.uncond, a.history[0],
                                 a.history[1], a.history[2], a.variance, a.noise,        a.mask,   a.known};
  for (const void* p : streams) packed = packed && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  const unsigned grid = grid_for(rows * ((size + n - 1) / n), 256);
#define GMK_STEP(...) GMK_LAUNCH((diffusion_step_kernel<T, n, __VA_ARGS__>), grid, 256, 0, stream, a, rows, size)
  if (packed) return known ? GMK_STEP(true, true) : GMK_STEP(true, false);
  return known ? GMK_STEP(false, true) : GMK_STEP(false, false);
#undef GMK_STEP
}

}  // namespace

Status diffusion_step_cuda(const DiffusionStep& a, int device, void* stream) {
  if (a.numel <= 0) return kOk;
  const DeviceGuard guard(device);
  switch (a.dtype) {
    case kFloat32:
      return launch<float>(a, stream);
    case kFloat64:
      return launch<double>(a, stream);
    case kBFloat16:
      return launch<bf16>(a, stream);
    case kFloat16:
      return launch<f16>(a, stream);
  }
  return "unknown dtype";
}

}  // namespace gmk
