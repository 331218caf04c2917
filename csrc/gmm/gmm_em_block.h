// CPU only: a block of rows becomes responsibilities. Rows lie on the SIMD lanes.
#pragma once
#include "gmm/gmm_density.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// A responsibility whose logarithm is less counts as 0: its products would be subnormal.
template <class T>
constexpr T kSubnormal = T(sizeof(T) == 4 ? -69 : -640);
// In sums: 2^-64 and 2^-93. A component of less than 2^-40 of the weight is dead; to the weight of every other one what is
// left out adds less than a rounding (to a second moment that times its squared distance in standard deviations).
template <class T>
constexpr T kNegligible = T(sizeof(T) == 4 ? -44.3614196 : -64.4627329);

// e^x for x <= 0 and a sum of such; 0 for x < least.
template <class T>
GMK_INLINE typename simd<T>::v responsibility(typename simd<T>::v x, T least) {
  const auto tiny = (typename simd<T>::i)(x < splat(least));
  return select(tiny, typename simd<T>::v{}, vexp_nonpositive(x));
}

template <class T, int rows>
struct Block {
  static constexpr int n = simd<T>::n;
  T* x;                  // [d][rows]
  T* e;                  // [k][rows]: log-densities, then responsibilities but for the factor `scale`
  T* centred;            // [d][rows], where the mixture is centred
  int32_t* list;         // [words][k]: components that count for some row of a word, in order
  int listed[rows / n];  // how many; -1: all of them
  int32_t* todo;         // [k]
  bool* seen;            // [k]
  T weight[rows], alive[rows], scale[rows];
  double log_likelihood[n];
  int64_t nonzero;  // responsibilities of this block
  int used = rows;  // whole words: what is past them is not computed

  static int64_t numbers(const GmmInputs& in) { return (2 * in.d + in.k) * rows + in.k * (rows / n + 2); }
  void take(const GmmInputs& in, T* at) {
    x = at;
    centred = x + in.d * rows;
    e = centred + in.d * rows;
    list = reinterpret_cast<int32_t*>(e + in.k * rows);
    todo = list + in.k * (rows / n);
    seen = reinterpret_cast<bool*>(e + in.k * (rows + rows / n + 1));
    memset(seen, 0, size_t(in.k));
    memset(log_likelihood, 0, sizeof log_likelihood);
  }

  // A row that counts for nothing (past the end, of weight 0, or infinite) is made harmless: 0 * inf would be NaN.
  void load_rows(const T* from, const T* weights, int64_t count, int64_t d) {
    if (count < rows) memset(x, 0, size_t(d * rows) * sizeof(T));
    load_tile(x, rows, from, count, d);
    bool clean = true;
    for (int row = 0; row < rows; ++row) {
      weight[row] = row >= count ? T(0) : weights ? weights[row] : T(1);
      alive[row] = T(1);
      clean &= weight[row] != T(0);
    }
    typename simd<T>::v bad[rows / n] = {};
    for (int64_t f = 0; f < d; ++f)
#pragma GCC unroll 16
      for (int u = 0; u < rows / n; ++u) {
        const auto t = load(x + f * rows + u * n) * splat(T(0));  // NaN where x is not finite
        bad[u] += t;
      }
    for (int u = 1; u < rows / n; ++u) bad[0] += bad[u];
    for (int l = 0; l < n; ++l) clean &= bad[0][l] == bad[0][l];
    if (clean) return;
    for (int row = 0; row < rows; ++row) {
      bool infinite = false, nan = false;
      for (int64_t f = 0; f < d; ++f) {
        const T t = x[f * rows + row];
        nan |= t != t;
        infinite |= t == T(INFINITY) || t == T(-INFINITY);
      }
      if (weight[row] != T(0) && (nan || !infinite)) continue;
      alive[row] = T(0);
      for (int64_t f = 0; f < d; ++f) x[f * rows + row] = T(0);
    }
  }

  // Where the rows of the densities are: x or, for a centred mixture, x - centre.
  const T* rows_for(const Mixture<T>& m, bool matrix) {
    if (matrix || !m.centred) return x;
    for (int64_t f = 0; f < m.d; ++f)
      for (int u = 0; u < used / n; ++u)
        store(centred + f * rows + u * n, load(x + f * rows + u * n) - splat(m.centre[f]));
    return centred;
  }
  void component_words(const Mixture<T>& m, bool matrix, const T* from, int u, int words, int64_t c, int64_t end) {
    T* const to = e + c * rows + u * n;
    if (m.constants[c] == T(-INFINITY))
      for (int w = 0; w < words; ++w) store(to + w * n, splat(T(-INFINITY)));
    else if (matrix)
      component<T, true, false>(to, from + u * n, rows, words, m, c, end);
    else if (m.centred)
      component<T, false, true>(to, from + u * n, rows, words, m, c, end);
    else
      component<T, false, false>(to, from + u * n, rows, words, m, c, end);
  }
  void densities(const Mixture<T>& m, bool matrix) {
    const T* const from = rows_for(m, matrix);
    const int step = tile_words(m.d) < rows / n ? tile_words(m.d) : rows / n;
    for (int u = 0; u < rows / n; ++u) listed[u] = -1;
    for (int u = 0; u < used / n; u += step)
      for (int64_t c = 0; c < m.k; ++c)
        component_words(m, matrix, from, u, used / n - u < step ? used / n - u : step, c, m.d);
  }

  template <class F>
  inline __attribute__((always_inline)) void each_listed(int u, int64_t k, F f) const {
    if (listed[u] < 0)
      for (int64_t c = 0; c < k; ++c) f(c);
    else
      for (int i = 0; i < listed[u]; ++i) f(list[u * k + i]);
  }

  void softmax(int64_t k, int64_t d, T negligible) {
    using v = typename simd<T>::v;
    typename simd<T>::i far{};
    v met{};
    const v least = splat(T(sizeof(T) == 4 ? -3.4028234e38 : -1.7976931348623157e308));  // -inf - -inf would be NaN
    for (int u = 0; u < used / n; ++u) {
      T* const p = e + u * n;
      v top = least, sum{};
      each_listed(u, k, [&](int64_t c) __attribute__((always_inline)) { top = vmax(load(p + c * rows), top); });
      each_listed(u, k, [&](int64_t c) __attribute__((always_inline)) {
        const v r = responsibility<T>(load(p + c * rows) - top, negligible);
        store(p + c * rows, r);
        sum += r;
        met += select((typename simd<T>::i)(r == v{}), v{}, splat(T(1)));
      });
      const v w = load(weight + u * n);
      const auto dead = (typename simd<T>::i)((load(alive + u * n) == v{}) | (sum == v{}));
      store(scale + u * n, select(dead, v{}, w / sum));
      far |= dead;
      const v log_prob = select(dead, splat(T(-INFINITY)), top + vlog(sum));
      T part[n];
      store(part, select((typename simd<T>::i)(w == v{}), v{}, w * log_prob));
      for (int l = 0; l < n; ++l) log_likelihood[l] += double(part[l]);
    }
    nonzero = int64_t(hsum(met));
    if (!any(far)) return;
    for (int row = 0; row < used; ++row)  // its square may be infinite
      if (scale[row] == T(0))
        for (int64_t f = 0; f < d; ++f) x[f * rows + row] = T(0);
  }
};

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
