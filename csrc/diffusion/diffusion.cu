// One thread makes a group; threads stride over all groups. Bound: memory, streams * numel * sizeof(T); drawing noise adds
// some 40 integer and 45 float operations an element, about as much as the float32 loads take. A sample's noise starts at
// its own block 0: nothing depends on the grid.
#include "cuda/groups.cuh"
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
// y where the mask is 0, `known` where it is 1, whatever the other holds.
template <class R>
GMK_DEV R blend(R mask, R known, R y) {
  return mask == R(0) ? y : mask == R(1) ? known : y + mask * (known - y);
}

// Elements [at, at + count), which share a row of coefficients. kKnown: there may be a mask.
template <class T, int n, bool kPacked, bool kKnown>
GMK_DEV void step(const DiffusionStep& a, const Row<typename Real<T>::type>& row, int64_t at, int count,
                  const float (&drawn)[n], const float (&of_known)[n]) {
  using R = typename Real<T>::type;
  const R(&c)[kCoefficients] = row.c;
  R x[n], m[n], v[n], x0[n], out[n];
  read<T, kPacked>(a.x, at, count, x);
  read<T, kPacked>(a.model_output, at, count, m);
  if (a.uncond) {
    read<T, kPacked>(a.uncond, at, count, v);
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
    read<T, kPacked>(a.mask, at, count, mask);
    read<T, kPacked>(a.known, at, count, known);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      known[i] = R(a.known_signal) * known[i];
      if (a.known_noise != 0) known[i] += R(a.known_noise) * R(of_known[i]);
      if (a.known_x0) x0[i] = blend(mask[i], known[i], x0[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (kKnown) out[i] = term(c[kC0], x0[i]) + term(c[kC1], x[i]);
#pragma unroll
  for (int h = 0; h < 3; ++h)
    if (a.history[h] && c[kC2 + h] != R(0)) {
      read<T, kPacked>(a.history[h], at, count, v);
#pragma unroll
      for (int i = 0; i < n; ++i) out[i] += c[kC2 + h] * v[i];
    }
  if (a.noise_kind != kNoNoise && c[kS] != R(0)) {
    R z[n];
    if (a.noise_kind == kGivenNoise) {
      read<T, kPacked>(a.noise, at, count, z);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) z[i] = R(drawn[i]);
    }
    if (a.variance) {
      read<T, kPacked>(a.variance, at, count, v);
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
  write<T, kPacked>(a.out, at, count, out);
  if (a.x0) write<T, kPacked>(a.x0, at, count, x0);
}

// kKnown: the step may have a mask, or an index that is read from memory.
template <class T, bool kPacked, bool kKnown>
__global__ void __launch_bounds__(256) diffusion_step_kernel(DiffusionStep a, Groups g) {
  using R = typename Real<T>::type;
  constexpr int n = kGroup<T>;
  bool inside = true;
  if (kKnown && a.index) {
    const int64_t index = *a.index;
    inside = index >= 0 && index < a.index_rows;
    a.coefficients = static_cast<const char*>(a.coefficients) + (inside ? index : 0) * kCoefficients * (a.wide ? 8 : 4);
    a.step = uint32_t(index);
  }
  const bool known_noise = kKnown && a.mask && a.known_noise != 0;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  Row<R> row = load_row<R>(a, 0);
  if (!inside) row.c[kC0] = row.c[kC1] = row.c[kA] = R(NAN);  // a GPU cannot say that there is no such step
  for (int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; group < g.total; group += stride) {
    const Place p = place_of<n>(g, group);
    if (g.sample) row = load_row<R>(a, p.first);
    float z[n] = {}, other[n] = {};
    if (a.noise_kind == kDrawnNoise && (p.first != p.last || row.c[kS] != R(0)))
      draw(p, a.seeds, a.seed, a.step, kStreamDiffusionStep, z);
    if (kKnown && known_noise) draw(p, a.seeds, a.seed, a.step, kStreamKnown, other);
    if (p.first == p.last) {
      step<T, n, kPacked, kKnown>(a, row, p.at, p.count, z, other);
    } else {  // samples shorter than a group, or not a multiple of it
#pragma unroll
      for (int i = 0; i < n; ++i) {  // unrolled: an index known only at run time would put z into local memory
        const float one[1] = {z[i]}, of_known[1] = {other[i]};
        if (i < p.count)
          step<T, 1, false, kKnown>(a, load_row<R>(a, (p.at + i) / g.sample), p.at + i, 1, one, of_known);
      }
    }
  }
}

template <class T>
Status launch(const DiffusionStep& a, void* stream) {
  const bool drawn = a.noise_kind == kDrawnNoise || (a.mask && a.known_noise != 0), known = a.mask || a.index;
  const Groups g = groups_of<T>(a.numel, drawn ? a.seed_rows : 1, a.coefficient_rows);
  const void* const streams[] = {a.out,        a.x0,         a.x,        a.model_output, a.uncond, a.history[0],
                                 a.history[1], a.history[2], a.variance, a.noise,        a.mask,   a.known};
  const unsigned grid = grid_for(g.total, 256);
#define GMK_STEP(...) GMK_LAUNCH((diffusion_step_kernel<T, __VA_ARGS__>), grid, 256, 0, stream, a, g)
  if (packed<T>(g, streams)) return known ? GMK_STEP(true, true) : GMK_STEP(true, false);
  return known ? GMK_STEP(false, true) : GMK_STEP(false, false);
#undef GMK_STEP
}

}  // namespace

Status diffusion_step_cuda(const DiffusionStep& a, int device, void* stream) {
  if (a.numel <= 0) return kOk;
  const DeviceGuard guard(device);
  return by_dtype(a.dtype, [&](auto type) { return launch<typename decltype(type)::of>(a, stream); });
}

}  // namespace gmk
