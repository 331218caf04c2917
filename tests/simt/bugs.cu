// Kernels with one planted bug each, and the same kernels without it: what test_simt.py shows to the emulator.
#include "bugs.h"
#include "cuda/prims.cuh"

namespace gmk {
namespace {

template <bool bug>
__global__ void out_of_bounds_kernel(float* out, const float* x, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[bug ? i + 1 : i];
}

Status run(const Bug& a, void* stream) {
  const unsigned grid = grid_for(a.n, 64);
  switch (a.which) {
    case 0: return GMK_LAUNCH((out_of_bounds_kernel<false>), grid, 64, 0, stream, a.out, a.x, a.n);
    case 1: return GMK_LAUNCH((out_of_bounds_kernel<true>), grid, 64, 0, stream, a.out, a.x, a.n);
  }
  return "no such bug";
}

}  // namespace

Status bug_cuda(const Bug& a, int, void* stream) { return run(a, stream); }

}  // namespace gmk
