// One thread makes one block of four numbers and stores them; threads stride over all blocks of all samples.
// Bound: 10 rounds of two 32x32->64 multiplies and about 90 float operations per block, against 16 bytes written
// (float32). Each sample starts at its own block 0, so nothing depends on the grid.
#include "cuda/prims.cuh"
#include "random/random.h"

namespace gmk {
namespace {

template <class T>
GMK_DEV T rounded(float x) {
  return from_float<T>(x);
}
template <>
GMK_DEV double rounded<double>(float x) {
  return double(x);
}

template <class T>
__global__ void __launch_bounds__(256) philox_fill_kernel(PhiloxFill a) {
  T* const out = static_cast<T*>(a.out);
  const int64_t blocks = (a.size + 3) / 4, total = a.samples * blocks;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t job = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; job < total; job += stride) {
    const int64_t sample = job / blocks, block = job % blocks;
    const uint64_t seed = a.seeds ? uint64_t(a.seeds[sample]) : a.seed;
    const PhiloxWords words = philox(uint64_t(block), a.step, a.stream, philox_key(seed));
    float z[4];
    if (a.kind == kNormal) {
      normals_from(words, z);
    } else {
      for (int i = 0; i < 4; ++i) z[i] = uniform_from(words.w[i]);
    }
    T* const p = out + sample * a.size + 4 * block;
    if (4 * block + 4 <= a.size && aligned(p, 4 * sizeof(T))) {
      Pack<T, 4> pack;
      for (int i = 0; i < 4; ++i) pack.v[i] = rounded<T>(z[i]);
      store_pack(p, pack);
    } else {
      for (int i = 0; i < 4; ++i)
        if (4 * block + i < a.size) p[i] = rounded<T>(z[i]);
    }
  }
}

template <class T>
Status launch(const PhiloxFill& a, void* stream) {
  const int64_t total = a.samples * ((a.size + 3) / 4);
  return GMK_LAUNCH((philox_fill_kernel<T>), grid_for(total, 256), 256, 0, stream, a);
}

}  // namespace

Status philox_fill_cuda(const PhiloxFill& a, int device, void* stream) {
  if (a.samples <= 0 || a.size <= 0) return kOk;
  const DeviceGuard guard(device);
  return by_dtype(a.dtype, [&](auto type) { return launch<typename decltype(type)::of>(a, stream); });
}

}  // namespace gmk
