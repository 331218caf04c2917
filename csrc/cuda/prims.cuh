// The only file where kernels meet inline PTX, launches and shared-memory declarations. nvcc compiles it for a GPU; g++
// with GMK_SIMT compiles it for the emulator (tests/simt), which checks every access, barrier and shuffle.
#pragma once
#include <stdint.h>

#ifdef GMK_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>
#include <stdio.h>
#endif

#include "core/error.h"
#include "core/half.h"

namespace gmk {

template <class T>
struct type_id {
  using type = T;
};
#define GMK_UNPAREN(...) __VA_ARGS__

#ifdef GMK_SIMT
// GMK_SHARED(name, float[8][32]): a block's shared array. GMK_DYN_SHARED(name): the bytes asked for at the launch.
#define GMK_SHARED(name, ...)                                                                                    \
  static const ::gmk_simt::Site name##_site{#name, sizeof(typename ::gmk::type_id<__VA_ARGS__>::type), 16};     \
  auto& name = *reinterpret_cast<typename ::gmk::type_id<__VA_ARGS__>::type*>(::gmk_simt::shared_static(&name##_site))
#define GMK_DYN_SHARED(name) unsigned char* name = (unsigned char*)::gmk_simt::shared_dynamic(16)
// GMK_LAUNCH((kernel<T>), grid, block, shared_bytes, stream, args...) is a Status.
#define GMK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), ::gmk_simt::launch(#kernel, grid, block, shared_bytes, [=] { (GMK_UNPAREN kernel)(__VA_ARGS__); }))
#define GMK_DEV static inline
#else
#define GMK_SHARED(name, ...) __shared__ __align__(16) typename ::gmk::type_id<__VA_ARGS__>::type name
#define GMK_DYN_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define GMK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                             \
  (::gmk::launch_kernel((const void*)(GMK_UNPAREN kernel), shared_bytes, #kernel, [&] {                        \
    GMK_UNPAREN kernel<<<grid, block, shared_bytes, (cudaStream_t)stream>>>(__VA_ARGS__);                      \
  }))
#define GMK_DEV __device__ __forceinline__

// More than 48 KiB of dynamic shared memory has to be asked for.
template <class F>
inline Status launch_kernel(const void* kernel, size_t shared_bytes, const char* name, F&& launch) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (!error) {
    launch();
    error = cudaGetLastError();
  }
  if (!error) return kOk;
  static thread_local char text[256];
  snprintf(text, sizeof text, "%s: %s", name, cudaGetErrorString(error));
  return text;
}
#endif

// Makes `device` current for a scope. One runtime call where it already is.
class DeviceGuard {
 public:
#ifdef GMK_SIMT
  explicit DeviceGuard(int) {}
#else
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&previous_) == cudaSuccess && previous_ != device) changed_ = cudaSetDevice(device) == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
#endif
};

constexpr unsigned kFullWarp = 0xffffffffu;

// Blocks of `threads` for `items`, one each, but no more than a large GPU keeps busy: kernels stride over the rest.
inline unsigned grid_for(int64_t items, int threads, int64_t most = 132 * 16) {
  const int64_t blocks = (items + threads - 1) / threads;
  return unsigned(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

// n elements moved by one instruction of n * sizeof(T) bytes (4, 8 or 16); the address must be a multiple of that.
template <class T, int n>
struct alignas(n * sizeof(T) <= 16 ? n * sizeof(T) : 16) Pack {
  T v[n];
};
GMK_DEV bool aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % (bytes < 16 ? bytes : 16) == 0;
}
template <class T, int n>
GMK_DEV Pack<T, n> load_pack(const T* p) {
#ifdef GMK_SIMT
  gmk_simt::vector_check(p, alignof(Pack<T, n>));
#endif
  return *reinterpret_cast<const Pack<T, n>*>(p);
}
template <class T, int n>
GMK_DEV void store_pack(T* p, const Pack<T, n>& x) {
#ifdef GMK_SIMT
  gmk_simt::vector_check(p, alignof(Pack<T, n>));
#endif
  *reinterpret_cast<Pack<T, n>*>(p) = x;
}

template <class T>
GMK_DEV T warp_sum(T v) {  // the same value in all 32 lanes, always added in the same order
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(kFullWarp, v, o);
  return v;
}
template <class T>
GMK_DEV T warp_max(T v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const T w = __shfl_xor_sync(kFullWarp, v, o);
    v = v > w || v != v ? v : w;
  }
  return v;
}

}  // namespace gmk
