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

// simd<T>::v is a word of simd<T>::n lanes; simd<T>::i the integers of the same size (comparisons give all ones or zero).
template <class T>
struct simd;
template <>
struct simd<float> {
  using v = vfloat;
  using i = vint;
  static constexpr int n = GMK_VECTOR_BYTES / 4;
};
template <>
struct simd<double> {
  using v = vdouble;
  using i = vlong;
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
  return (V)(((I)x & condition) | ((I)y & ~condition));
}
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
  decltype(x[0] + x[0]) part[n];
  for (int l = 0; l < n; ++l) part[l] = x[l];
  for (int step = n / 2; step; step /= 2)
    for (int l = 0; l < step; ++l) part[l] += part[l + step];
  return part[0];
}

// Elementary functions. Errors are bounds checked by tests/test_simd.py against float64.
// exp: at most 2 ulp; 0 below the smallest normal number, infinity above the largest, NaN for NaN.
GMK_INLINE vfloat vexp(vfloat x) {
  const vfloat lo = splat(-87.336540f), hi = splat(88.722839f);
  const vint under = x < lo;
  const vint over = x > hi;
  const vfloat y = select(under, lo, select(over, hi, x));
  const vfloat magic = splat(12582912.0f), z = madd(y, splat(1.44269504f), magic), n = z - magic;
  vfloat f = madd(n, splat(-0.693145752f), y);
  f = madd(n, splat(-1.42860677e-6f), f);
  vfloat p = splat(1.9875691500e-4f);
  p = madd(p, f, splat(1.3981999507e-3f));
  p = madd(p, f, splat(8.3334519073e-3f));
  p = madd(p, f, splat(4.1665795894e-2f));
  p = madd(p, f, splat(1.6666665459e-1f));
  p = madd(p, f, splat(5.0000001201e-1f));
  p = madd(p * f, f, f) + splat(1.0f);
  const vint k = (vint)z - 0x4B400000, half = k >> 1;  // two factors, since 2^128 is not a float
  const vfloat r = p * (vfloat)((half + 127) << 23) * (vfloat)((k - half + 127) << 23);
  return select(under, vfloat{}, select(over, splat(INFINITY), r));
}
GMK_INLINE vdouble vexp(vdouble x) {
  const vdouble lo = splat(-708.39), hi = splat(709.782712893384);
  const vlong under = x < lo;
  const vlong over = x > hi;
  const vdouble y = select(under, lo, select(over, hi, x));
  const vdouble magic = splat(6755399441055744.0), z = madd(y, splat(1.4426950408889634), magic), n = z - magic;
  vdouble f = madd(n, splat(-0.693147180369123816490), y);
  f = madd(n, splat(-1.90821492927058770002e-10), f);
  vdouble p = splat(1.0 / 6227020800.0);
  p = madd(p, f, splat(1.0 / 479001600.0));
  p = madd(p, f, splat(1.0 / 39916800.0));
  p = madd(p, f, splat(1.0 / 3628800.0));
  p = madd(p, f, splat(1.0 / 362880.0));
  p = madd(p, f, splat(1.0 / 40320.0));
  p = madd(p, f, splat(1.0 / 5040.0));
  p = madd(p, f, splat(1.0 / 720.0));
  p = madd(p, f, splat(1.0 / 120.0));
  p = madd(p, f, splat(1.0 / 24.0));
  p = madd(p, f, splat(1.0 / 6.0));
  p = madd(p, f, splat(0.5));
  p = madd(p * f, f, f) + splat(1.0);
  const vlong k = (vlong)z - 0x4338000000000000, half = k >> 1;
  const vdouble r = p * (vdouble)((half + 1023) << 52) * (vdouble)((k - half + 1023) << 52);
  return select(under, vdouble{}, select(over, splat((double)INFINITY), r));
}
// exp of x <= 0, for softmax: 0 below the smallest normal number, so that no subnormal ever reaches a product.
GMK_INLINE vfloat vexp_nonpositive(vfloat x) {
  const vfloat lo = splat(-87.0f);
  const vint under = x < lo;
  const vfloat magic = splat(12582912.0f), z = madd(x, splat(1.44269504f), magic), n = z - magic;
  vfloat f = madd(n, splat(-0.693145752f), x);
  f = madd(n, splat(-1.42860677e-6f), f);
  vfloat p = splat(1.9875691500e-4f);
  p = madd(p, f, splat(1.3981999507e-3f));
  p = madd(p, f, splat(8.3334519073e-3f));
  p = madd(p, f, splat(4.1665795894e-2f));
  p = madd(p, f, splat(1.6666665459e-1f));
  p = madd(p, f, splat(5.0000001201e-1f));
  p = madd(p * f, f, f) + splat(1.0f);
  // NaN survives: its z is NaN, and adding to the exponent field of a NaN with a full mantissa leaves it a NaN only by
  // luck, so multiply instead of adding.
  const vfloat r = p * (vfloat)(((vuint)z - 0x4B400000u + 127u) << 23);  // wraps where `under`
  return (vfloat)((vint)r & ~under);
}
GMK_INLINE vdouble vexp_nonpositive(vdouble x) {
  const vlong under = x < splat(-708.39);
  const vdouble magic = splat(6755399441055744.0), z = madd(x, splat(1.4426950408889634), magic), n = z - magic;
  vdouble f = madd(n, splat(-0.693147180369123816490), x);
  f = madd(n, splat(-1.90821492927058770002e-10), f);
  vdouble p = splat(2.51003758422237e-08);  // (e^f - 1 - f) / f^2 to 2^-56
  p = madd(p, f, splat(2.7620075892548164e-07));
  p = madd(p, f, splat(2.7557268480289716e-06));
  p = madd(p, f, splat(2.480152132234228e-05));
  p = madd(p, f, splat(0.00019841269863040559));
  p = madd(p, f, splat(0.0013888888917196736));
  p = madd(p, f, splat(0.008333333333330065));
  p = madd(p, f, splat(0.041666666666624164));
  p = madd(p, f, splat(0.16666666666666669));
  p = madd(p, f, splat(0.5000000000000001));
  p = madd(p * f, f, f) + splat(1.0);
  const vdouble r = p * (vdouble)(((vulong)z - 0x4338000000000000u + 1023u) << 52);  // as above
  return (vdouble)((vlong)r & ~under);
}

// log: at most 2 ulp; -inf at 0, NaN below 0, inf at inf, subnormals included.
GMK_INLINE vfloat vlog(vfloat x) {
  const vint tiny = x < splat(1.17549435e-38f);
  const vfloat y = select(tiny, x * splat(8388608.0f), x);
  const vint t = (vint)((vuint)y - 0x3F3504F3u), e = t >> 23;  // unsigned: wraps for -0
  const vfloat f = (vfloat)((t & 0x7FFFFF) + 0x3F3504F3) - splat(1.0f), z = f * f;
  const vfloat k = __builtin_convertvector(e - (tiny & 23), vfloat);
  vfloat p = splat(7.0376836292e-2f);
  p = madd(p, f, splat(-1.1514610310e-1f));
  p = madd(p, f, splat(1.1676998740e-1f));
  p = madd(p, f, splat(-1.2420140846e-1f));
  p = madd(p, f, splat(1.4249322787e-1f));
  p = madd(p, f, splat(-1.6668057665e-1f));
  p = madd(p, f, splat(2.0000714765e-1f));
  p = madd(p, f, splat(-2.4999993993e-1f));
  p = madd(p, f, splat(3.3333331174e-1f));
  vfloat r = p * f * z;
  r = madd(k, splat(-2.12194440e-4f), r);
  r = madd(splat(-0.5f), z, r);
  r = madd(k, splat(0.693359375f), f + r);
  r = select(x == vfloat{}, splat(-INFINITY), r);
  r = select((vint)(x == splat(INFINITY)), x, r);
  return select((vint)((x < vfloat{}) | (x != x)), splat(NAN), r);
}
GMK_INLINE vdouble vlog(vdouble x) {
  const vlong tiny = x < splat(2.2250738585072014e-308);
  const vdouble y = select(tiny, x * splat(4503599627370496.0), x);
  const vlong t = (vlong)((vulong)y - 0x3FE6A09E667F3BCDu), e = t >> 52;
  const vdouble f = (vdouble)((t & 0xFFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD) - splat(1.0);
  const vdouble k = __builtin_convertvector(e - (tiny & 52), vdouble);
  const vdouble s = f / (splat(2.0) + f), z = s * s, half = splat(0.5) * f * f;
  vdouble p = splat(1.479819860511658591e-01);
  p = madd(p, z, splat(1.531383769920937332e-01));
  p = madd(p, z, splat(1.818357216161805012e-01));
  p = madd(p, z, splat(2.222219843214978396e-01));
  p = madd(p, z, splat(2.857142874366239149e-01));
  p = madd(p, z, splat(3.999999999940941908e-01));
  p = madd(p, z, splat(6.666666666666735130e-01));
  vdouble r = k * splat(6.93147180369123816490e-01) -
              ((half - madd(s, half + p * z, k * splat(1.90821492927058770002e-10))) - f);
  r = select(x == vdouble{}, splat(-(double)INFINITY), r);
  r = select((vlong)(x == splat((double)INFINITY)), x, r);
  return select((vlong)((x < vdouble{}) | (x != x)), splat((double)NAN), r);
}
template <class V>
GMK_INLINE V vsigmoid(V x) {  // at most 3 ulp
  const V one = V{} + 1;
  return one / (one + vexp(-x));
}
// tanh: at most 3 ulp, odd, also where it is nearly x.
GMK_INLINE vfloat vtanh(vfloat x) {
  const vint sign = (vint)x & (vint)splat(-0.0f);
  const vfloat a = (vfloat)((vint)x & 0x7FFFFFFF), e = vexp(a * splat(-2.0f));
  const vfloat big = (splat(1.0f) - e) / (splat(1.0f) + e), z = x * x;
  vfloat p = splat(-5.70498872745e-3f);
  p = madd(p, z, splat(2.06390887954e-2f));
  p = madd(p, z, splat(-5.37397155531e-2f));
  p = madd(p, z, splat(1.33314422036e-1f));
  p = madd(p, z, splat(-3.33332819422e-1f));
  p = madd(p * z, a, a);
  return (vfloat)((vint)select((vint)(a < splat(0.625f)), p, big) | sign);
}
GMK_INLINE vdouble vtanh(vdouble x) {
  const vlong sign = (vlong)x & (vlong)splat(-0.0);
  const vdouble a = (vdouble)((vlong)x & 0x7FFFFFFFFFFFFFFF), e = vexp(a * splat(-2.0));
  vdouble r = (splat(1.0) - e) / (splat(1.0) + e);
  for (int l = 0; l < simd<double>::n; ++l)
    if (!(a[l] >= 0.625)) r[l] = __builtin_tanh(a[l]);
  return (vdouble)((vlong)r | sign);
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
GMK_INLINE void store_float(bf16* p, vfloat x) {
  const vuint u = (vuint)x, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vuint r = (vuint)select((vint)(x != x), (vint)((u >> 16) | 0x40u), (vint)rounded);
  const vhalf h = __builtin_convertvector(r, vhalf);
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
