// CPU kernels only: blocks of rows transposed into tiles, so that rows lie on the SIMD lanes and no sum over features
// crosses them; loops over a size in register blocks.
#pragma once
#include "core/simd.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

template <int N>
struct Size {
  static constexpr int value = N;
};
// f(Size<J>, j): 0 .. d in blocks of J, the rest in blocks of 8, 4, 2, 1.
template <int J, class F>
GMK_INLINE void for_blocks(int64_t d, F f) {
  int64_t j = 0;
  for (; j + J <= d; j += J) f(Size<J>{}, j);
  if (J > 8 && d - j >= 8) f(Size<8>{}, j), j += 8;
  if (J > 4 && d - j >= 4) f(Size<4>{}, j), j += 4;
  if (J > 2 && d - j >= 2) f(Size<2>{}, j), j += 2;
  if (J > 1 && d - j >= 1) f(Size<1>{}, j);
}

// n words of n lanes, transposed: log2 n rounds of interleaving the first half with the second.
template <int... I>
struct Ints {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Ints<I...>;
};
template <class V, int... I>
GMK_INLINE V interleave_low(V a, V b, Ints<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I % 2 ? n + I / 2 : I / 2)...);
}
template <class V, int... I>
GMK_INLINE V interleave_high(V a, V b, Ints<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I % 2 ? n + n / 2 + I / 2 : n / 2 + I / 2)...);
}
template <class T>
GMK_INLINE void transpose(typename simd<T>::v* r) {
  constexpr int n = simd<T>::n;
  using Index = typename Count<n>::type;
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    typename simd<T>::v s[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      s[2 * i] = interleave_low(r[i], r[i + n / 2], Index{});
      s[2 * i + 1] = interleave_high(r[i], r[i + n / 2], Index{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) r[i] = s[i];
  }
}

// tile[f * stride + row] = x[row][f] for `rows` rows, zero up to the next whole word.
template <class T>
GMK_INLINE void load_tile(T* tile, int64_t stride, const T* x, int64_t rows, int64_t d) {
  constexpr int n = simd<T>::n;
  for (int64_t first = 0; first < rows; first += n) {
    const int64_t count = rows - first < n ? rows - first : n;
    int64_t f = 0;
    for (; f + n <= d; f += n) {
      typename simd<T>::v r[n];
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) r[l] = l < count ? load(x + (first + l) * d + f) : typename simd<T>::v{};
      transpose<T>(r);
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) store(tile + (f + l) * stride + first, r[l]);
    }
    for (; f < d; ++f)
      for (int l = 0; l < n; ++l) tile[f * stride + first + l] = l < count ? x[(first + l) * d + f] : T(0);
  }
}
template <class T>
GMK_INLINE void store_tile(T* x, const T* tile, int64_t stride, int64_t rows, int64_t d) {
  constexpr int n = simd<T>::n;
  for (int64_t first = 0; first < rows; first += n) {
    const int64_t count = rows - first < n ? rows - first : n;
    int64_t f = 0;
    for (; f + n <= d; f += n) {
      typename simd<T>::v r[n];
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) r[l] = load(tile + (f + l) * stride + first);
      transpose<T>(r);
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l)
        if (l < count) store(x + (first + l) * d + f, r[l]);
    }
    for (; f < d; ++f)
      for (int64_t l = 0; l < count; ++l) x[(first + l) * d + f] = tile[f * stride + first + l];
  }
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
