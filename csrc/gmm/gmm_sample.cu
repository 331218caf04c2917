// One thread is one row: it draws its own normals, four at a time, and solves t P = z column by column, t in its row of
// `out` until the mean is added. Bound: d^2/2 multiply-adds and reads of P per row, which rows of one component share in
// the cache; for "diag" and "spherical" d normals.
#include "cuda/prims.cuh"
#include "gmm/gmm_sample.h"

namespace gmk {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 5;  // of a multiprocessor, at least: without it ptxas spills to stay at 64 registers

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) gmm_sample_kernel(GmmSample a) {
  const int64_t rows = a.b * a.n, stride = int64_t(gridDim.x) * kThreads, d = a.d;
  const bool matrix = a.covariance <= kTied;
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < rows; row += stride) {
    const int64_t mixture = row / a.n, counted = a.seed_rows > 1 ? row % a.n : row;
    const PhiloxKey key = philox_key(a.seeds ? uint64_t(a.seeds[a.seed_rows > 1 ? mixture : 0]) : a.seed);
    const PhiloxWords words = philox(uint64_t(counted / 4), 0, kStreamGmmComponent, key);
    const int which = int(counted % 4);
    const uint32_t word = which == 0 ? words.w[0] : which == 1 ? words.w[1] : which == 2 ? words.w[2] : words.w[3];
    const int64_t c = component_of(a.cdf + mixture * a.cdf_stride, a.k, component_uniform(word));
    T* const out = static_cast<T*>(a.out) + row * d;
    a.component[row] = c < a.k ? c : -1;
    if (c == a.k) {
      for (int64_t f = 0; f < d; ++f) out[f] = T(NAN);
      continue;
    }
    const T* const p = static_cast<const T*>(a.precisions) + mixture * a.precisions_stride;
    const T* const mean = static_cast<const T*>(a.means) + mixture * a.means_stride + c * d;
    const int64_t first = counted * d, last = first + d;  // this row's normals
    for (int64_t block = first / 4; 4 * block < last; ++block) {
      float z[4];
      normals_from(philox(uint64_t(block), 0, kStreamGmmNormal, key), z);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // unrolled: z stays in registers
        const int64_t f = 4 * block + i - first;
        if (f < 0 || f >= d) continue;
        T t = T(z[i]);
        if (matrix)
          for (int64_t g = 0; g < f; ++g) t -= out[g] * p[precision_at(a.covariance, d, c, g, f)];
        out[f] = t / p[precision_at(a.covariance, d, c, f, f)];
      }
    }
    for (int64_t f = 0; f < d; ++f) out[f] = mean[f] + out[f];
  }
}

template <class T>
Status launch(const GmmSample& a, void* stream) {
  return GMK_LAUNCH((gmm_sample_kernel<T>), grid_for(a.b * a.n, kThreads), kThreads, 0, stream, a);
}

}  // namespace

Status gmm_sample_cuda(const GmmSample& a, int device, void* stream) {
  if (a.b <= 0 || a.n <= 0) return kOk;
  const DeviceGuard guard(device);
  return a.dtype == kFloat64 ? launch<double>(a, stream) : launch<float>(a, stream);
}

}  // namespace gmk
