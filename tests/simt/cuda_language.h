// clang-format off
// (one line per CUDA name reads better)
// CUDA C++ as plain C++: the keywords, built-in variables and functions that kernels use, for a compiler and a machine
// that have no CUDA. What a CUDA header declares and this file lacks is a compile error: add it here.
//
// Every function that meets the emulator is a thin always_inline wrapper around a function of the runtime, which takes
// its caller's program counter: that is how a report names the line of the kernel, not a line of this file.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "simt.h"

#ifdef __SANITIZE_THREAD__  // kernel sources, not the runtime
extern "C" void* memcpy(void*, const void*, size_t) noexcept __asm__("gmk_simt_memcpy");
extern "C" void* memset(void*, int, size_t) noexcept __asm__("gmk_simt_memset");
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ gmk_simt_error_use_GMK_SHARED  // plain __shared__ must not compile: it would be a CPU local

#define GMK_SIMT_INLINE inline __attribute__((always_inline))

// Each is a function of the fiber, so a kernel that keeps a reference to one or writes to one does not compile.
#define threadIdx (::gmk_simt::thread_index())
#define blockIdx (::gmk_simt::block_index())
#define blockDim (::gmk_simt::block_size())
#define gridDim (::gmk_simt::grid_size())
constexpr int warpSize = 32;

// Vector types ------------------------------------------------------------
#define GMK_SIMT_VECTOR(T, name, bytes)                                                              \
  struct alignas(2 * bytes) name##2 { T x, y; };                                                     \
  struct alignas(4 * bytes > 16 ? 16 : 4 * bytes) name##4 { T x, y, z, w; };                         \
  GMK_SIMT_INLINE name##2 make_##name##2(T x, T y) { return {x, y}; }                                \
  GMK_SIMT_INLINE name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
GMK_SIMT_VECTOR(float, float, 4)
GMK_SIMT_VECTOR(double, double, 8)
GMK_SIMT_VECTOR(int, int, 4)
GMK_SIMT_VECTOR(unsigned, uint, 4)
#undef GMK_SIMT_VECTOR
GMK_SIMT_INLINE uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// Barriers and fences ------------------------------------------------------------
GMK_SIMT_INLINE void __syncthreads() { gmk_simt::block_barrier(gmk_simt::kPlain, 0); }
GMK_SIMT_INLINE int __syncthreads_count(int p) { return gmk_simt::block_barrier(gmk_simt::kCount, p != 0); }
GMK_SIMT_INLINE int __syncthreads_or(int p) { return gmk_simt::block_barrier(gmk_simt::kOr, p != 0); }
GMK_SIMT_INLINE int __syncthreads_and(int p) { return gmk_simt::block_barrier(gmk_simt::kAnd, p != 0); }
GMK_SIMT_INLINE void __syncwarp(unsigned mask = 0xffffffffu) { gmk_simt::warp_barrier(mask); }
GMK_SIMT_INLINE void __threadfence() { gmk_simt::fence(); }
GMK_SIMT_INLINE void __threadfence_block() {}

// Warps: shuffles and votes. As on a GPU, none of them orders memory. ---------------------------------------------------
namespace gmk_simt {
template <class T>
GMK_SIMT_INLINE T shuffle_from(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "CUDA shuffles 2, 4 and 8 bytes");
  T result;
  shuffle(mask, source, &value, &result, sizeof(T));
  return result;
}
template <class T>
GMK_SIMT_INLINE T reduce(unsigned mask, T value, Reduction how) {
  static_assert(sizeof(T) == 4 && T(1) / T(2) == T(0), "CUDA reduces 32-bit integers");
  return T(reduce_integers(mask, int64_t(value), how));
}
}  // namespace gmk_simt

template <class T>
GMK_SIMT_INLINE T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  const int lane = gmk_simt::lane_index();
  return gmk_simt::shuffle_from(mask, v, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
GMK_SIMT_INLINE T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  const int lane = gmk_simt::lane_index(), source = lane ^ bits;
  return gmk_simt::shuffle_from(mask, v, source >= (lane & ~(width - 1)) + width ? lane : source);
}
template <class T>
GMK_SIMT_INLINE T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = gmk_simt::lane_index(), source = lane + int(delta);
  return gmk_simt::shuffle_from(mask, v, source >= (lane & ~(width - 1)) + width ? lane : source);
}
template <class T>
GMK_SIMT_INLINE T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = gmk_simt::lane_index(), source = lane - int(delta);
  return gmk_simt::shuffle_from(mask, v, source < (lane & ~(width - 1)) ? lane : source);
}
GMK_SIMT_INLINE unsigned __ballot_sync(unsigned mask, int p) { return gmk_simt::ballot(mask, p != 0); }
GMK_SIMT_INLINE int __any_sync(unsigned mask, int p) { return gmk_simt::ballot(mask, p != 0) != 0; }
GMK_SIMT_INLINE int __all_sync(unsigned mask, int p) { return gmk_simt::ballot(mask, p == 0) == 0; }
template <class T>
GMK_SIMT_INLINE T __reduce_add_sync(unsigned mask, T v) { return gmk_simt::reduce(mask, v, gmk_simt::kAdd); }
template <class T>
GMK_SIMT_INLINE T __reduce_min_sync(unsigned mask, T v) { return gmk_simt::reduce(mask, v, gmk_simt::kMin); }
template <class T>
GMK_SIMT_INLINE T __reduce_max_sync(unsigned mask, T v) { return gmk_simt::reduce(mask, v, gmk_simt::kMax); }

// Atomics ------------------------------------------------------------
namespace gmk_simt {
template <class T, class F>
GMK_SIMT_INLINE T atomic_update(T* p, F&& next) {
  T old;
  atomic_load(p, &old, sizeof(T));  // no other fiber runs between the load and the store
  const T value = next(old);
  atomic_store(p, &value, sizeof(T));
  return old;
}
}  // namespace gmk_simt
template <class T>
GMK_SIMT_INLINE T atomicAdd(T* p, T v) { return gmk_simt::atomic_update(p, [&](T old) { return T(old + v); }); }
template <class T>
GMK_SIMT_INLINE T atomicMax(T* p, T v) { return gmk_simt::atomic_update(p, [&](T old) { return old > v ? old : v; }); }
template <class T>
GMK_SIMT_INLINE T atomicMin(T* p, T v) { return gmk_simt::atomic_update(p, [&](T old) { return old < v ? old : v; }); }
template <class T>
GMK_SIMT_INLINE T atomicOr(T* p, T v) { return gmk_simt::atomic_update(p, [&](T old) { return T(old | v); }); }
template <class T>
GMK_SIMT_INLINE T atomicAnd(T* p, T v) { return gmk_simt::atomic_update(p, [&](T old) { return T(old & v); }); }
template <class T>
GMK_SIMT_INLINE T atomicExch(T* p, T v) { return gmk_simt::atomic_update(p, [&](T) { return v; }); }
template <class T>
GMK_SIMT_INLINE T atomicCAS(T* p, T expected, T v) {
  return gmk_simt::atomic_update(p, [&](T old) { return old == expected ? v : old; });
}

// Loads with a cache hint ------------------------------------------------------------
template <class T>
GMK_SIMT_INLINE T __ldg(const T* p) {
  T value;
  gmk_simt::vector_load(p, &value, sizeof(T));
  return value;
}
template <class T>
GMK_SIMT_INLINE T __ldcs(const T* p) { return __ldg(p); }
template <class T>
GMK_SIMT_INLINE void __stcs(T* p, T v) { gmk_simt::vector_store(p, &v, sizeof(T)); }

// Arithmetic. The approximate functions are computed exactly: their error on a GPU is not seen here. --------------------
GMK_SIMT_INLINE float __expf(float x) { return expf(x); }
GMK_SIMT_INLINE float __exp2f(float x) { return exp2f(x); }
GMK_SIMT_INLINE float __logf(float x) { return logf(x); }
GMK_SIMT_INLINE float __log2f(float x) { return log2f(x); }
GMK_SIMT_INLINE float __powf(float x, float y) { return powf(x, y); }
GMK_SIMT_INLINE float __sinf(float x) { return sinf(x); }
GMK_SIMT_INLINE float __cosf(float x) { return cosf(x); }
GMK_SIMT_INLINE float __tanhf(float x) { return tanhf(x); }
GMK_SIMT_INLINE float __fdividef(float a, float b) { return a / b; }
GMK_SIMT_INLINE float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
GMK_SIMT_INLINE float rsqrtf(float x) { return 1.0f / sqrtf(x); }
GMK_SIMT_INLINE double rsqrt(double x) { return 1.0 / sqrt(x); }
GMK_SIMT_INLINE float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }
GMK_SIMT_INLINE float __frcp_rn(float x) { return 1.0f / x; }
GMK_SIMT_INLINE float __fsqrt_rn(float x) { return sqrtf(x); }
GMK_SIMT_INLINE float __fadd_rn(float a, float b) { return a + b; }
GMK_SIMT_INLINE float __fsub_rn(float a, float b) { return a - b; }
GMK_SIMT_INLINE float __fmul_rn(float a, float b) { return a * b; }
GMK_SIMT_INLINE float __fdiv_rn(float a, float b) { return a / b; }
GMK_SIMT_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
GMK_SIMT_INLINE double __dadd_rn(double a, double b) { return a + b; }
GMK_SIMT_INLINE double __dmul_rn(double a, double b) { return a * b; }
GMK_SIMT_INLINE double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
GMK_SIMT_INLINE int __float2int_rn(float x) { return int(nearbyintf(x)); }
GMK_SIMT_INLINE int __float_as_int(float x) { int r; __builtin_memcpy(&r, &x, 4); return r; }
GMK_SIMT_INLINE unsigned __float_as_uint(float x) { unsigned r; __builtin_memcpy(&r, &x, 4); return r; }
GMK_SIMT_INLINE float __int_as_float(int x) { float r; __builtin_memcpy(&r, &x, 4); return r; }
GMK_SIMT_INLINE float __uint_as_float(unsigned x) { float r; __builtin_memcpy(&r, &x, 4); return r; }
GMK_SIMT_INLINE long long __double_as_longlong(double x) { long long r; __builtin_memcpy(&r, &x, 8); return r; }
GMK_SIMT_INLINE double __longlong_as_double(long long x) { double r; __builtin_memcpy(&r, &x, 8); return r; }
GMK_SIMT_INLINE unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
GMK_SIMT_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
GMK_SIMT_INLINE int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
GMK_SIMT_INLINE int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
GMK_SIMT_INLINE T min(T a, T b) { return b < a ? b : a; }
template <class T>
GMK_SIMT_INLINE T max(T a, T b) { return a < b ? b : a; }
