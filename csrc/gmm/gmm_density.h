// CPU only: log-densities of one component for a tile of rows.
#pragma once
#include "gmm/gmm_tile.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// sum += y_f^2 of features begin <= f < end, in their order whatever the words: the bits of one row are always the same.
template <class T, int V>
GMK_INLINE void full_squares(typename simd<T>::v (&sum)[V], const T* x, int64_t stride, const Mixture<T>& m, int64_t c,
                             int64_t begin, int64_t end) {
  using v = typename simd<T>::v;
  const T* const mean = m.means + c * m.d;
  const T* const p = m.matrices + c * m.matrix_step;
  for_blocks<(V == 1 ? kChains : kColumns)>(end - begin, [&](auto size, int64_t j) __attribute__((always_inline)) {
    constexpr int J = decltype(size)::value;
    v y[J][V];
    times_columns<T, J, V>(y, x, stride, mean, p, m.d, begin + j);
#pragma GCC unroll 16
    for (int e = 0; e < J; ++e)
#pragma GCC unroll 2
      for (int u = 0; u < V; ++u) sum[u] = madd(y[e][u], y[e][u], sum[u]);
  });
}

template <class T, int V, bool centred>
GMK_INLINE void diag_squares(typename simd<T>::v (&sum)[V], const T* x, int64_t stride, const Mixture<T>& m, int64_t c,
                             int64_t begin, int64_t end) {
  using v = typename simd<T>::v;
  for (int64_t f = begin; f < end; ++f)
#pragma GCC unroll 8
    for (int u = 0; u < V; ++u) {
      const v y = scaled<centred>(load(x + f * stride + u * simd<T>::n), m, c * m.d + f);
      sum[u] = madd(y, y, sum[u]);
    }
}

template <class T, int V, bool matrix, bool centred>
GMK_INLINE void squares(typename simd<T>::v (&sum)[V], const T* x, int64_t stride, const Mixture<T>& m, int64_t c,
                        int64_t begin, int64_t end) {
  if (matrix)
    full_squares<T, V>(sum, x, stride, m, c, begin, end);
  else
    diag_squares<T, V, centred>(sum, x, stride, m, c, begin, end);
}

template <class T>
GMK_INLINE typename simd<T>::v density(typename simd<T>::v sum, const Mixture<T>& m, int64_t c) {
  return madd(sum, splat(T(-0.5)), splat(m.constants[c]));
}

// The log-densities of component c; or, with `end` before the last feature, the sum of the squares up to there.
template <class T, bool matrix, bool centred>
GMK_INLINE void component(T* lp, const T* x, int64_t stride, int words, const Mixture<T>& m, int64_t c, int64_t end) {
  constexpr int n = simd<T>::n, V = matrix ? kWords : 8;
  const auto some = [&](auto size, int u) __attribute__((always_inline)) {
    constexpr int W = decltype(size)::value;
    typename simd<T>::v sum[W] = {};
    squares<T, W, matrix, centred>(sum, x + u * n, stride, m, c, 0, end);
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) store(lp + (u + w) * n, end < m.d ? sum[w] : density(sum[w], m, c));
  };
  int u = 0;
  for (; u + V <= words; u += V) some(Size<V>{}, u);
  if (!matrix)
    for (; u + 4 <= words; u += 4) some(Size<4>{}, u);
  for (; u < words; ++u) some(Size<1>{}, u);
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
