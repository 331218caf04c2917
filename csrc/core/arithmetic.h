// CPU kernels only: an element-wise kernel written once for float32, float64 and the half types.
#pragma once
#include "core/simd.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// Moving a word of a storage type.
template <class T>
GMK_INLINE vfloat get(const T* p) {
  return load_float(p);
}
GMK_INLINE vdouble get(const double* p) { return load(p); }
template <class T>
GMK_INLINE vfloat get(const T* p, int64_t count) {
  return load_float_some(p, count);
}
GMK_INLINE vdouble get(const double* p, int64_t count) { return load_some(p, count); }
template <class T>
GMK_INLINE void put(T* p, vfloat x) {
  store_float(p, x);
}
GMK_INLINE void put(double* p, vdouble x) { store(p, x); }
template <class T>
GMK_INLINE void put(T* p, vfloat x, int64_t count) {
  store_float_some(p, x, count);
}
GMK_INLINE void put(double* p, vdouble x, int64_t count) { store_some(p, x, count); }

// Some words at once, in an order that is the type's own: of two words of bfloat16 the first holds the even elements and the
// second the odd ones, which takes half the instructions.
template <class V, int kWords>
struct Words {
  V w[kWords];
};
template <class T>
using Vector = typename simd<typename Arithmetic<T>::real>::v;
template <class T, int kWords, int kCounts = 0>
constexpr bool kEvenOdd = kSame<T, bf16> && kWords == 2 && kCounts == 0;

// Two words rounded, interleaved. A NaN must be quiet, as every result of arithmetic is.
GMK_INLINE vuint packed_bf16(vfloat even, vfloat odd) {
#if defined(__AVX512BW__)  // rounded together, in halves: up where rest + (result is odd) > 1/2, but no NaN
  const auto i1 = [](int x) { return _mm512_set1_epi16((short)x); };
  const __mmask32 upper = 0xAAAAAAAAu;
  const __m512i high = _mm512_mask_blend_epi16(upper, _mm512_srli_epi32((__m512i)even, 16), (__m512i)odd);
  const __m512i rest = _mm512_mask_blend_epi16(upper, (__m512i)even, _mm512_slli_epi32((__m512i)odd, 16));
  const __mmask32 finite = _mm512_cmplt_epu16_mask(_mm512_and_si512(high, i1(0x7fff)), i1(0x7f80));
  const __m512i more = _mm512_adds_epu16(rest, _mm512_and_si512(high, i1(1)));
  const __mmask32 up = _mm512_mask_cmpgt_epu16_mask(finite, more, i1(0x8000));
  return (vuint)_mm512_mask_sub_epi16(high, up, high, i1(-1));
#else
  return (rounded_bf16(even) >> 16) | (rounded_bf16(odd) & 0xffff0000u);
#endif
}

template <int kWords, class T, class... Count>
GMK_INLINE Words<Vector<T>, kWords> get_words(const T* p, Count... count) {
  if constexpr (kEvenOdd<T, kWords, sizeof...(Count)>) {
    vuint u;
    memcpy(&u, p, sizeof u);
    return {{(vfloat)(u << 16), (vfloat)(u & 0xffff0000u)}};
  } else {
    Words<Vector<T>, kWords> r;
    for (int j = 0; j < kWords; ++j) r.w[j] = get(p + j * simd<typename Arithmetic<T>::real>::n, count...);
    return r;
  }
}
template <int kWords, class T, class... Count>
GMK_INLINE void put_words(T* p, const Words<Vector<T>, kWords>& x, Count... count) {
  if constexpr (kEvenOdd<T, kWords, sizeof...(Count)>) {
    const vuint u = packed_bf16(x.w[0], x.w[1]);
    memcpy(p, &u, sizeof u);
  } else {
    for (int j = 0; j < kWords; ++j) put(p + j * simd<typename Arithmetic<T>::real>::n, x.w[j], count...);
  }
}
// Words of memory's order in the order of T's.
template <class T, class V, int kWords>
GMK_INLINE Words<V, kWords> in_order_of(const Words<V, kWords>& x) {
  if constexpr (kEvenOdd<T, kWords>) {
    vint even;
    for (int l = 0; l < kLanes; ++l) even[l] = 2 * l;
    return {{__builtin_shuffle(x.w[0], x.w[1], even), __builtin_shuffle(x.w[0], x.w[1], even + 1)}};
  } else {
    return x;
  }
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
