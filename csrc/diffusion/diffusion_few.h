// Samples of few elements, each with a row of coefficients of its own ([65536, 2]): a word of elements meets several rows.
// So the coefficients are spread over the elements first, a column of the table for each, some hundred elements at a time.
#pragma once
#include "diffusion/diffusion_segment.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int64_t kFewElements = 64;  // of a sample; from here on it is a segment
constexpr int64_t kFewBlock = 512;    // elements whose table stays in L1

// to[0, n) = value; writes up to 16 more, which the next sample overwrites.
template <class real>
GMK_INLINE void spread(real* to, real value, int64_t n) {
  typedef real Quad __attribute__((vector_size(4 * sizeof(real))));
  if (n <= 4) {
    const Quad q = value - Quad{};
    memcpy(to, &q, sizeof q);
    return;
  }
  for (int64_t i = 0; i < n; i += simd<real>::n) store(to + i, splat(value));
}

// Streams and what is the same for all elements. The columns of the table: A, B, C0, C1, those of the history, S.
template <class T>
struct Few {
  using real = typename Arithmetic<T>::real;
  const T *x, *m, *u;  // u: nullptr without guidance
  const T* h[3];
  const real* z;  // scaled noise, or nullptr
  T *out, *x0;    // x0: nullptr if it is not wanted
  real guidance, low, high;
  int history;
};

// coefficient * x + more, where a coefficient of 0 hides what x holds.
template <class V, class I>
GMK_INLINE V hidden_madd(V coefficient, V x, V more) {
  return madd(coefficient, (V)((I)x & (I)(coefficient != V{})), more);
}

template <class T, class Table, class... Count>
GMK_INLINE void few_word(const Few<T>& g, const Table& table, int64_t i, Count... count) {
  using V = typename simd<typename Few<T>::real>::v;
  using I = typename simd<typename Few<T>::real>::i;
  const V x = get(g.x + i, count...), a = load(table[0] + i), b = load(table[1] + i);
  V m = get(g.m + i, count...);
  if (g.u) {
    const V u = get(g.u + i, count...);
    m = madd(splat(g.guidance), m - u, u);
  }
  const V ax = a * (V)((I)x & (I)(a != V{}));
  const V x0 = vmin(g.high - V{}, vmax(g.low - V{}, hidden_madd<V, I>(b, m, ax)));  // NaN stays: second operand
  const V c1 = load(table[3] + i);
  V out = hidden_madd<V, I>(load(table[2] + i), x0, c1 * (V)((I)x & (I)(c1 != V{})));
  for (int h = 0; h < g.history; ++h) out = hidden_madd<V, I>(load(table[4 + h] + i), get(g.h[h] + i, count...), out);
  if (g.z) out = hidden_madd<V, I>(load(table[4 + g.history] + i), load(g.z + i), out);
  put(g.out + i, out, count...);
  if (g.x0) put(g.x0 + i, x0, count...);
}

template <class T, class Table>
void run_few(const Few<T>& g, const Table& table, int64_t n) {
  constexpr int64_t lanes = simd<typename Few<T>::real>::n;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) few_word(g, table, i);
  if (i < n) few_word(g, table, i, n - i);
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
