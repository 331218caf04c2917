// diffusion_step for samples of few elements: rows of eight coefficients are transposed into the columns of few.h, so a row
// is read once and an element costs a load and a permutation a coefficient.
#pragma once
#include "core/few.h"
#include "diffusion/diffusion_segment.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// table[c][row] = rows[row][c], for all columns or only the first four.
template <class real>
struct Columns {
  alignas(64) Column<real> table[kCoefficients];

  template <class T>
  GMK_HD_MEMBER void fill(const T* rows, int64_t count, bool all) {
    int64_t row = 0;
    if constexpr (sizeof(T) == 4 && sizeof(real) == 4)
      for (; row + 8 <= count; row += 8) {
        four(rows + row * kCoefficients, table, row);
        if (all) four(rows + row * kCoefficients + 4, table + 4, row);
      }
    for (; row < count; ++row)
      for (int c = 0; c < kCoefficients; ++c) table[c][row] = real(rows[row * kCoefficients + c]);
  }

 private:
  // Four columns of eight rows.
  GMK_HD_MEMBER static void four(const float* p, Column<float>* to, int64_t row) {
#if defined(__AVX2__)
    const auto pair = [p](int i) __attribute__((always_inline)) {  // row i | row i + 4
      const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(p + i * kCoefficients));
      return _mm256_insertf128_ps(low, _mm_loadu_ps(p + (i + 4) * kCoefficients), 1);
    };
    const __m256 a = pair(0), b = pair(1), c = pair(2), d = pair(3);
    const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    const __m256d AB = _mm256_castps_pd(_mm256_unpackhi_ps(a, b)), CD = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    _mm256_storeu_ps(to[0] + row, _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)));
    _mm256_storeu_ps(to[1] + row, _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
    _mm256_storeu_ps(to[2] + row, _mm256_castpd_ps(_mm256_unpacklo_pd(AB, CD)));
    _mm256_storeu_ps(to[3] + row, _mm256_castpd_ps(_mm256_unpackhi_pd(AB, CD)));
#else
    for (int i = 0; i < 8; ++i)
      for (int c = 0; c < 4; ++c) to[c][row + i] = p[i * kCoefficients + c];
#endif
  }
};

// Streams, and what is the same for all elements.
template <class T>
struct Few {
  using real = typename Arithmetic<T>::real;
  const T *x, *m, *u;  // u: nullptr without guidance
  const T* h[3];       // nullptr: absent
  const real* z;       // scaled noise, or nullptr
  T *out, *x0;         // x0: nullptr if it is not wanted
  real guidance, low, high;
};

// coefficient * x + more, where a coefficient of 0 hides what x holds.
template <class V, class I>
GMK_INLINE V hidden_madd(V coefficient, V x, V more) {
  return madd(coefficient, (V)((I)x & (I)(coefficient != V{})), more);
}

template <bool kMore, class T, class I, class... Count>
GMK_INLINE void few_word(const Few<T>& g, const Columns<typename Few<T>::real>& columns, int64_t i, int64_t row, I on,
                         Count... count) {
  using V = typename simd<typename Few<T>::real>::v;
  const auto coefficient = [&](int c) __attribute__((always_inline)) { return pick(columns.table[c] + row, on); };
  const V x = get(g.x + i, count...), a = coefficient(kA), b = coefficient(kB);
  V m = get(g.m + i, count...);
  if (kMore && g.u) {
    const V u = get(g.u + i, count...);
    m = madd(splat(g.guidance), m - u, u);
  }
  const V ax = a * (V)((I)x & (I)(a != V{}));
  const V x0 = vmin(g.high - V{}, vmax(g.low - V{}, hidden_madd<V, I>(b, m, ax)));  // NaN stays: second operand
  const V c1 = coefficient(kC1);
  V out = hidden_madd<V, I>(coefficient(kC0), x0, c1 * (V)((I)x & (I)(c1 != V{})));
  if (kMore) {
    for (int h = 0; h < 3; ++h)
      if (g.h[h]) out = hidden_madd<V, I>(coefficient(kC2 + h), get(g.h[h] + i, count...), out);
    if (g.z) out = hidden_madd<V, I>(coefficient(kS), get(g.z + i, count...), out);
  }
  put(g.out + i, out, count...);
  if (kMore && g.x0) put(g.x0 + i, x0, count...);
}

// n elements; the first is number `phase` of its sample, whose coefficients are row 0 of the columns. kMore: there is
// anything besides x, the model's output and out.
template <bool kMore, class T>
void run_few(const Few<T>& g, const Columns<typename Few<T>::real>& columns, int64_t n, int64_t phase, int64_t sample) {
  few_words<typename Few<T>::real>(n, phase, sample,
                                   [&](int64_t i, int64_t row, auto on, auto... count) __attribute__((always_inline)) {
                                     few_word<kMore>(g, columns, i, row, on, count...);
                                   });
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
