// CPU kernels only: SIMD words in GCC/Clang vector extensions, as wide as the instruction set this file is compiled for.
// Everything has internal linkage: an inline function shared between instruction sets would put AVX-512 code in the base
// path (the linker keeps one copy). For the same reason: C headers only, no std:: templates in any *_cpu.cpp.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "core/half.h"

#if defined(__AVX512F__)
#define GMK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define GMK_VECTOR_BYTES 32
#else
#define GMK_VECTOR_BYTES 16
#endif
#define GMK_CAT_(a, b) a##b
#define GMK_CAT(a, b) GMK_CAT_(a, b)
#define GMK_ISA_NS GMK_CAT(isa_, GMK_ISA)  // namespace of this compilation: isa_base, isa_avx2, isa_avx512
#define GMK_INLINE static inline __attribute__((always_inline, unused))

namespace gmk {
namespace GMK_ISA_NS {
namespace {

typedef float vfloat __attribute__((vector_size(GMK_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(GMK_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(GMK_VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(GMK_VECTOR_BYTES)));
typedef int64_t vlong __attribute__((vector_size(GMK_VECTOR_BYTES)));
typedef uint64_t vulong __attribute__((vector_size(GMK_VECTOR_BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(GMK_VECTOR_BYTES / 2)));
#if defined(__AVX512F__)
typedef __mmask16 mfloat;
typedef __mmask8 mdouble;
#else
typedef vint mfloat;
typedef vlong mdouble;
#endif

// simd<T>::v is a word of simd<T>::n lanes; simd<T>::i the integers of the same size (comparisons give all ones or zero);
// simd<T>::m a choice of lanes for `where`, in a mask register where there are any.
template <class T>
struct simd;
template <>
struct simd<float> {
  using v = vfloat;
  using i = vint;
  using m = mfloat;
  static constexpr int n = GMK_VECTOR_BYTES / 4;
};
template <>
struct simd<double> {
  using v = vdouble;
  using i = vlong;
  using m = mdouble;
  static constexpr int n = GMK_VECTOR_BYTES / 8;
};
constexpr int kLanes = simd<float>::n;

// Memory: any alignment. load_some/store_some touch exactly `count` lanes; the other lanes load as zero.
template <class T>
GMK_INLINE typename simd<T>::v load(const T* p) {
  typename simd<T>::v x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
GMK_INLINE void store(T* p, typename simd<T>::v x) {
  memcpy(p, &x, sizeof x);
}
template <class T>
GMK_INLINE typename simd<T>::v load_some(const T* p, int64_t count) {
  typename simd<T>::v x{};
  memcpy(&x, p, size_t(count) * sizeof(T));
  return x;
}
template <class T>
GMK_INLINE void store_some(T* p, typename simd<T>::v x, int64_t count) {
  memcpy(p, &x, size_t(count) * sizeof(T));
}
template <class T>
GMK_INLINE typename simd<T>::v splat(T x) {
  return x - typename simd<T>::v{};
}

// Arithmetic. fma is one rounding on every instruction set (slow on base, where it is a library call).
GMK_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  vfloat r;
  for (int l = 0; l < kLanes; ++l) r[l] = __builtin_fmaf(a[l], b[l], c[l]);
  return r;
#endif
}
GMK_INLINE vdouble fma(vdouble a, vdouble b, vdouble c) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (vdouble)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  vdouble r;
  for (int l = 0; l < simd<double>::n; ++l) r[l] = __builtin_fma(a[l], b[l], c[l]);
  return r;
#endif
}
// a * b + c, fused where that is one instruction: for results that need not be the same bits on every instruction set.
template <class V>
GMK_INLINE V madd(V a, V b, V c) {
#if defined(__FMA__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}
// x where a comparison is true, else y.
template <class I, class V>
GMK_INLINE V select(I condition, V x, V y) {
  return condition ? x : y;
}
// The same with masks, for code that keeps, combines and applies many: &, | and ~ are theirs.
#if defined(__AVX512F__)
GMK_INLINE mfloat less(vfloat a, vfloat b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
GMK_INLINE mdouble less(vdouble a, vdouble b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ); }
GMK_INLINE vfloat where(mfloat c, vfloat x, vfloat y) { return (vfloat)_mm512_mask_blend_ps(c, (__m512)y, (__m512)x); }
GMK_INLINE vdouble where(mdouble c, vdouble x, vdouble y) {
  return (vdouble)_mm512_mask_blend_pd(c, (__m512d)y, (__m512d)x);
}
#else
GMK_INLINE mfloat less(vfloat a, vfloat b) { return a < b; }
GMK_INLINE mdouble less(vdouble a, vdouble b) { return a < b; }
GMK_INLINE vfloat where(mfloat c, vfloat x, vfloat y) { return select(c, x, y); }
GMK_INLINE vdouble where(mdouble c, vdouble x, vdouble y) { return select(c, x, y); }
#endif
GMK_INLINE vfloat magnitude(vfloat x) { return (vfloat)((vint)x & 0x7FFFFFFF); }
GMK_INLINE vdouble magnitude(vdouble x) { return (vdouble)((vlong)x & 0x7FFFFFFFFFFFFFFF); }
// x >= 0 with the sign of y.
GMK_INLINE vfloat with_sign_of(vfloat x, vfloat y) { return (vfloat)((vint)x | ((vint)y & (vint)splat(-0.0f))); }
GMK_INLINE vdouble with_sign_of(vdouble x, vdouble y) { return (vdouble)((vlong)x | ((vlong)y & (vlong)splat(-0.0))); }
// b where either is NaN, as the x86 instruction.
GMK_INLINE vfloat vmax(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}
GMK_INLINE vfloat vmin(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}
GMK_INLINE vdouble vmax(vdouble a, vdouble b) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (vdouble)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return select(a > b, a, b);
#endif
}
GMK_INLINE vdouble vmin(vdouble a, vdouble b) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (vdouble)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return select(a < b, a, b);
#endif
}
GMK_INLINE vfloat vsqrt(vfloat x) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)x);
#else
  for (int l = 0; l < kLanes; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
#endif
}
GMK_INLINE vdouble vsqrt(vdouble x) {
  for (int l = 0; l < simd<double>::n; ++l) x[l] = __builtin_sqrt(x[l]);
  return x;
}
// Is a comparison true in some lane?
template <class I>
GMK_INLINE bool any(I condition) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)condition, (__m256i)condition);
#else
  const vlong words = (vlong)condition;
  int64_t some = 0;
  for (int l = 0; l < simd<double>::n; ++l) some |= words[l];
  return some != 0;
#endif
}
// Bit l: is a comparison true in lane l?
GMK_INLINE uint32_t lanes_of(vint condition) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)condition));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= uint32_t(condition[l] & 1) << l;
  return bits;
#endif
}
GMK_INLINE uint32_t lanes_of(vlong condition) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)condition, (__m512i)condition);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_pd((__m256d)condition));
#else
  uint32_t bits = 0;
  for (int l = 0; l < simd<double>::n; ++l) bits |= uint32_t(condition[l] & 1) << l;
  return bits;
#endif
}
// The sum of the lanes, in an order that depends on the width only.
template <class V>
GMK_INLINE auto hsum(V x) {
  constexpr int n = sizeof(V) / sizeof(x[0]);
  decltype(x != x) from;
  for (int l = 0; l < n; ++l) from[l] = l;
#pragma GCC unroll 4
  for (int step = n / 2; step; step /= 2) x += __builtin_shuffle(x, from + step);  // modulo n
  return x[0];
}

// Half types: storage only. load_float/store_float move kLanes (or `count`) elements of T as float32.
GMK_INLINE vfloat load_float(const float* p) { return load(p); }
GMK_INLINE vfloat load_float(const bf16* p) {
  vhalf h;
  memcpy(&h, p, sizeof h);
  return (vfloat)(__builtin_convertvector(h, vuint) << 16);
}
GMK_INLINE vfloat load_float(const f16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vfloat x;
  for (int l = 0; l < kLanes; ++l) x[l] = to_float(p[l]);
  return x;
#endif
}
GMK_INLINE void store_float(float* p, vfloat x) { store(p, x); }
// x rounded to bfloat16, in the upper halves of the lanes; what the lower halves hold is left over.
GMK_INLINE vuint rounded_bf16(vfloat x) {
  const vuint u = (vuint)x;
  return (vuint)select((vint)(x != x), (vint)(u | 0x400000u), (vint)(u + 0x7fffu + ((u >> 16) & 1u)));
}
GMK_INLINE void store_float(bf16* p, vfloat x) {
  const vhalf h = __builtin_convertvector(rounded_bf16(x) >> 16, vhalf);
  memcpy(p, &h, sizeof h);
}
GMK_INLINE void store_float(f16* p, vfloat x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int l = 0; l < kLanes; ++l) p[l] = from_float<f16>(x[l]);
#endif
}
template <class T>
GMK_INLINE vfloat load_float_some(const T* p, int64_t count) {
  vfloat x{};
  for (int64_t l = 0; l < count; ++l) x[l] = to_float(p[l]);
  return x;
}
template <class T>
GMK_INLINE void store_float_some(T* p, vfloat x, int64_t count) {
  for (int64_t l = 0; l < count; ++l) p[l] = from_float<T>(x[l]);
}

// OpenMP team for `work` (elements, or anything that costs about a nanosecond each): one thread where waking another
// costs more than it saves. Results never depend on it.
#ifdef GMK_ALWAYS_THREADS  // the TSan build: small tests must show races too
GMK_INLINE int team(int64_t, int threads, int64_t = 0) { return threads < 2 ? 1 : threads; }
#else
GMK_INLINE int team(int64_t work, int threads, int64_t grain = 32768) {
  return work < grain || threads < 2 ? 1 : threads;
}
#endif

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
