// CPU only: log-densities of one component for a tile of rows.
#pragma once
#include "gmm/gmm_tile.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

template <class T, int V>
GMK_INLINE void full_words(T* lp, const T* x, int64_t stride, const Mixture<T>& m, int64_t c) {
  using v = typename simd<T>::v;
  const T* const mean = m.means + c * m.d;
  const T* const p = m.matrices + c * m.matrix_step;
  v sum[V] = {};
  for_blocks<(V == 1 ? kChains : kColumns)>(m.d, [&](auto size, int64_t j) __attribute__((always_inline)) {
    constexpr int J = decltype(size)::value;
    v y[J][V];
    times_columns<T, J, V>(y, x, stride, mean, p, m.d, j);
#pragma GCC unroll 16
    for (int e = 0; e < J; ++e)
#pragma GCC unroll 2
      for (int u = 0; u < V; ++u) sum[u] = madd(y[e][u], y[e][u], sum[u]);
  });
  for (int u = 0; u < V; ++u) store(lp + u * simd<T>::n, madd(sum[u], splat(T(-0.5)), splat(m.constants[c])));
}

template <class T, int V, bool centred>
GMK_INLINE void diag_words(T* lp, const T* x, int64_t stride, const Mixture<T>& m, int64_t c) {
  using v = typename simd<T>::v;
  v sum[V] = {};
  for (int64_t f = 0; f < m.d; ++f)
#pragma GCC unroll 8
    for (int u = 0; u < V; ++u) {
      const v y = scaled<centred>(load(x + f * stride + u * simd<T>::n), m, c * m.d + f);
      sum[u] = madd(y, y, sum[u]);
    }
#pragma GCC unroll 8
  for (int u = 0; u < V; ++u) store(lp + u * simd<T>::n, madd(sum[u], splat(T(-0.5)), splat(m.constants[c])));
}

template <class T, bool matrix, bool centred>
GMK_INLINE void component(T* lp, const T* x, int64_t stride, int words, const Mixture<T>& m, int64_t c) {
  constexpr int n = simd<T>::n, V = matrix ? kWords : 8;
  int u = 0;
  for (; u + V <= words; u += V) {
    if (matrix)
      full_words<T, V>(lp + u * n, x + u * n, stride, m, c);
    else
      diag_words<T, V, centred>(lp + u * n, x + u * n, stride, m, c);
  }
  if (!matrix)
    for (; u + 4 <= words; u += 4) diag_words<T, 4, centred>(lp + u * n, x + u * n, stride, m, c);
  for (; u < words; ++u) {
    if (matrix)
      full_words<T, 1>(lp + u * n, x + u * n, stride, m, c);
    else
      diag_words<T, 1, centred>(lp + u * n, x + u * n, stride, m, c);
  }
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
