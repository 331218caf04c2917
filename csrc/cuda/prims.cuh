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
#define GMK_SHARED(name, ...)                                                                               \
  static const ::gmk_simt::Site name##_site{#name, sizeof(typename ::gmk::type_id<__VA_ARGS__>::type), 16}; \
  auto& name = *reinterpret_cast<typename ::gmk::type_id<__VA_ARGS__>::type*>(::gmk_simt::shared_static(&name##_site))
#define GMK_DYN_SHARED(name) unsigned char* name = (unsigned char*)::gmk_simt::shared_dynamic(16)
// GMK_LAUNCH((kernel<T>), grid, block, shared_bytes, stream, args...) is a Status.
#define GMK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), ::gmk_simt::launch(#kernel, grid, block, shared_bytes, [=] { (GMK_UNPAREN kernel)(__VA_ARGS__); }))
#define GMK_DEV inline __attribute__((always_inline))  // so that a report names the line of the kernel
#else
#define GMK_SHARED(name, ...) __shared__ __align__(16) typename ::gmk::type_id<__VA_ARGS__>::type name
#define GMK_DYN_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define GMK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                        \
  (::gmk::launch_kernel((const void*)(GMK_UNPAREN kernel), shared_bytes, #kernel, [&] {   \
    GMK_UNPAREN kernel<<<grid, block, shared_bytes, (cudaStream_t)stream>>>(__VA_ARGS__); \
  }))
#define GMK_DEV __device__ __forceinline__

// More than 48 KiB of shared memory has to be asked for. The kernel's static arrays count too: 8 KiB here, at most.
template <class F>
inline Status launch_kernel(const void* kernel, size_t shared_bytes, const char* name, F&& launch) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 40 * 1024)
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

// GMK_COMPILED_FOR((kernel)): __CUDA_ARCH__ / 10 of the code of `kernel` that would run on the current device, which an
// older binary or PTX may have. 80 and up: there has_mma() is true.
#ifdef GMK_SIMT
#define GMK_COMPILED_FOR(kernel) (::gmk_simt::has_mma() ? 90 : 75)
#else
#define GMK_COMPILED_FOR(kernel) (::gmk::compiled_for((const void*)(GMK_UNPAREN kernel)))
inline int compiled_for(const void* kernel) {
  cudaFuncAttributes found;
  if (cudaFuncGetAttributes(&found, kernel) == cudaSuccess) return found.ptxVersion;
  cudaGetLastError();  // not to be found by the next launch
  return 0;
}
#endif

// Makes `device` current for a scope. One runtime call where it already is.
class DeviceGuard {
 public:
#ifdef GMK_SIMT
  explicit DeviceGuard(int) {}
#else
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&previous_) == cudaSuccess && previous_ != device)
      changed_ = cudaSetDevice(device) == cudaSuccess;
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

// One number of device memory as it is when all that the stream was given before is done: the host waits for that.
inline Status wait_for(int64_t* number, const int64_t* device, void* stream) {
#ifdef GMK_SIMT
  (void)stream;
  *number = *device;
  return kOk;
#else
  cudaError_t error =
      cudaMemcpyAsync(number, device, sizeof *number, cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream));
  if (!error) error = cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  return error ? cudaGetErrorString(error) : kOk;
#endif
}

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
GMK_HD bool aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % (bytes < 16 ? bytes : 16) == 0;
}
template <class T, int n>
GMK_DEV Pack<T, n> load_pack(const T* p) {
#ifdef GMK_SIMT
  Pack<T, n> x;
  gmk_simt::vector_load(p, &x, sizeof x);
  return x;
#else
  return *reinterpret_cast<const Pack<T, n>*>(p);
#endif
}
template <class T, int n>
GMK_DEV void store_pack(T* p, const Pack<T, n>& x) {
#ifdef GMK_SIMT
  gmk_simt::vector_store(p, &x, sizeof x);
#else
  *reinterpret_cast<Pack<T, n>*>(p) = x;
#endif
}

template <class T>
GMK_DEV T warp_sum(T v) {  // the same value in all 32 lanes, always added in the same order
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(kFullWarp, v, o);
  return v;
}
// The sum over the block, the same bits in every thread. Every thread calls it; parts: kWarps numbers of shared memory, free
// again afterwards.
template <int kWarps>
GMK_DEV double block_sum(double v, double* parts) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += parts[i];
  __syncthreads();
  return sum;
}
template <class T>
GMK_DEV T warp_max(T v) {  // NaN if any lane has one
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const T w = __shfl_xor_sync(kFullWarp, v, o);
    v = v > w || v != v ? v : w;
  }
  return v;
}

// cp.async: 16 bytes of global memory to shared memory without passing through registers; sm_75 copies at once. Only the
// first `bytes` are read, the rest becomes zero. Both addresses are multiples of 16. The order of use:
//   cp_async16(...) ...; cp_async_commit();   cp_async_wait<groups that may still be under way>(); __syncthreads();
GMK_DEV void cp_async16(void* shared, const void* global, int bytes = 16) {
#ifdef GMK_SIMT
  gmk_simt::async_copy(shared, global, 16, bytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  if (bytes == 16) {
    *(uint4*)shared = *(const uint4*)global;
  } else {
    for (int i = 0; i < 16; ++i) ((unsigned char*)shared)[i] = i < bytes ? ((const unsigned char*)global)[i] : 0;
  }
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
               "l"(global), "r"(bytes)
               : "memory");
#endif
}
GMK_DEV void cp_async_commit() {
#ifdef GMK_SIMT
  gmk_simt::async_commit();
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
template <int groups>
GMK_DEV void cp_async_wait() {
#ifdef GMK_SIMT
  gmk_simt::async_wait(groups);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(groups) : "memory");
#endif
}

// Tensor cores, a warp at a time: d = a b + c, float32 sums; A is 16 x k row-major, B k x 8 column-major, C and D 16 x 8.
// k = 16 for bf16 and f16, two values a register (the lower index in the lower half); k = 8 for tf32, one a register.
// With lane = 4 g + t (PTX ISA, "Matrix Fragments"), and columns counted in registers (k / 2 of them, or k):
//   a[i] = A[g + 8 (i & 1)][t + 4 (i >> 1)]    b[i] = B[t + 4 i][g]    c[i] = C[g + 8 (i >> 1)][2 t + (i & 1)]
enum MmaType { kMmaBf16, kMmaF16, kMmaTf32 };
// Does this GPU have these instructions? Known at compile time; the emulator can be told to be an old GPU, so that what a
// kernel does instead is tested too.
#ifdef GMK_SIMT
GMK_DEV bool has_mma() { return gmk_simt::has_mma(); }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
GMK_DEV constexpr bool has_mma() { return false; }
#else
GMK_DEV constexpr bool has_mma() { return true; }
#endif
template <MmaType type>
GMK_DEV void mma_by_shuffles(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  const auto value = [](uint32_t word, int half) {
    if (type == kMmaTf32) return bits_float(word & 0xffffe000u);
    const uint16_t bits = uint16_t(half ? word >> 16 : word);
    return type == kMmaBf16 ? to_float(bf16{bits}) : to_float(f16{bits});
  };
  const int lane = int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
  const int g = lane / 4, t = lane % 4;
  float sum[4] = {c[0], c[1], c[2], c[3]};
  for (int i = 0; i < 2; ++i) {
    for (int s = 0; s < 4; ++s) {
      const uint32_t row[2] = {__shfl_sync(kFullWarp, a[2 * i], 4 * g + s),
                               __shfl_sync(kFullWarp, a[2 * i + 1], 4 * g + s)};
      const uint32_t column[2] = {__shfl_sync(kFullWarp, b[i], 8 * t + s), __shfl_sync(kFullWarp, b[i], 8 * t + 4 + s)};
      for (int half = 0; half < (type == kMmaTf32 ? 1 : 2); ++half)
        for (int j = 0; j < 4; ++j) sum[j] += value(row[j >> 1], half) * value(column[j & 1], half);
    }
  }
  for (int j = 0; j < 4; ++j) d[j] = sum[j];
}
#ifdef GMK_SIMT
#define GMK_MMA(shape, types, type) ::gmk_simt::mma(::gmk_simt::type, d, a, b, c)
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define GMK_MMA(shape, types, type) mma_by_shuffles<type>(d, a, b, c)  // sm_75 has none of these instructions
#else
#define GMK_MMA(shape, types, type)                                                                                 \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." types                                                      \
               ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"                                                          \
               "{%10,%11,%12,%13};\n"                                                                               \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                 "f"(c[3]))
#endif
GMK_DEV void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  GMK_MMA("m16n8k16", "bf16.bf16", kMmaBf16);
}
GMK_DEV void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  GMK_MMA("m16n8k16", "f16.f16", kMmaF16);
}
GMK_DEV void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  GMK_MMA("m16n8k8", "tf32.tf32", kMmaTf32);
}

}  // namespace gmk
