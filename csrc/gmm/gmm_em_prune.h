// CPU only: the log-densities of a block of rows where most components are far from most rows. The squares of the first
// features bound a density from above, and never less in floating point, since adding a square never makes a sum
// smaller. The component of the largest bound of each row is finished first (and shows a NaN that the row may have);
// a word of rows in which no bound comes within a responsibility that counts is never finished. What is finished has
// the bits that it has without this, and what is not has responsibility 0.
#pragma once
#include "gmm/gmm_em_block.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int64_t kPruneFeatures = 16, kPruneComponents = 16;  // the fewest; at least as many components as lanes
constexpr int kPruneRest = 64;                                 // blocks until it is tried again

// The largest factors of a mixture; infinity or NaN if there is one, which must not be missed where it is not looked at.
template <class T>
struct Magnitudes {
  T mean = 0, precision = 0;
};
template <class T>
static Magnitudes<T> magnitudes(const Mixture<T>& m, bool matrix) {
  Magnitudes<T> most;
  const auto meet = [](T& largest, T v) {
    v = v < T(0) ? -v : v;
    if (!(v <= largest) && largest == largest) largest = v;
  };
  for (int64_t c = 0; c < m.k; ++c) {
    if (m.constants[c] == T(-INFINITY)) continue;
    for (int64_t f = 0; f < m.d; ++f) {
      meet(most.mean, m.means[c * m.d + f]);
      if (!matrix) meet(most.precision, m.scales[c * m.d + f]);
    }
    for (int64_t i = 0; matrix && i < m.d; ++i)
      for (int64_t j = i; j < m.d; ++j) meet(most.precision, m.matrices[c * m.matrix_step + i * m.d + j]);
  }
  return most;
}

template <class T, int rows>
struct Pruning {
  static constexpr int n = simd<T>::n;
  using v = typename simd<T>::v;
  bool possible = false;
  int rest = 0;             // blocks that go without
  int64_t first = 0, live;  // of the components that count: the first, and how many
  Magnitudes<T> most;

  void take(const Mixture<T>& m, bool matrix) {
    rest = 0;
    possible = m.d >= kPruneFeatures && m.k >= kPruneComponents;
    if (!possible) return;
    most = magnitudes(m, matrix);
    live = 0;
    for (int64_t c = m.k; c-- > 0;)
      if (m.constants[c] != T(-INFINITY)) first = c, ++live;
  }
  // No product of finite numbers is infinite: infinity times 0, or less itself, would be a NaN of the last features.
  bool safe(const Block<T, rows>& block, const Mixture<T>& m) const {
    v x{};
    for (int64_t f = 0; f < m.d; ++f)
      for (int row = 0; row < block.used; row += n) {
        const v t = load(block.x + f * rows + row);
        x = vmax(select((typename simd<T>::i)(t < v{}), -t, t), x);  // not a NaN
      }
    T largest = 0;
    for (int l = 0; l < n; ++l) largest = x[l] > largest ? x[l] : largest;
    return (largest + 3 * most.mean) * most.precision * T(m.d) < T(sizeof(T) == 4 ? 1e37 : 1e307);
  }

  void densities(Block<T, rows>& block, const Mixture<T>& m, bool matrix) {
    if (!possible || rest || !live || !safe(block, m)) {
      rest -= rest > 0;
      block.densities(m, matrix);
      return;
    }
    const T* const from = block.rows_for(m, matrix);
    const int64_t split = 3 * m.d / 4 / 8 * 8;
    const int words = block.used / n, step = tile_words(m.d) < words ? tile_words(m.d) : words;
    int64_t finished = 0;
    for (int u = 0; u < words; u += step) {
      const int now = words - u < step ? words - u : step;
      for (int64_t c = 0; c < m.k; ++c) block.component_words(m, matrix, from, u, now, c, split);
      for (int w = u; w < u + now; ++w)
        finished += matrix      ? word<true, false>(block, m, from + w * n, w, split)
                    : m.centred ? word<false, true>(block, m, from + w * n, w, split)
                                : word<false, false>(block, m, from + w * n, w, split);
    }
    if (4 * finished > 3 * words * live) rest = kPruneRest;
  }

  // From sums of squares to densities: components list[0] .. list[V - 1], together, for a sum is a chain.
  template <bool matrix, bool centred, int V>
  static void finish(T* e, const T* x, const Mixture<T>& m, const int32_t* list, int64_t split) {
    v sum[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) sum[i] = load(e + int64_t(list[i]) * rows);
    if (matrix)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        v one[1] = {sum[i]};
        full_squares<T, 1>(one, x, rows, m, list[i], split, m.d);
        sum[i] = one[0];
      }
    else
      for (int64_t f = split; f < m.d; ++f)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
          const v y = scaled<centred>(load(x + f * rows), m, list[i] * m.d + f);
          sum[i] = madd(y, y, sum[i]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) store(e + int64_t(list[i]) * rows, density(sum[i], m, list[i]));
  }
  template <bool matrix, bool centred>
  static void finish_all(T* e, const T* x, const Mixture<T>& m, const int32_t* list, int count, int64_t split) {
    int i = 0;
    for (; !matrix && i + 4 <= count; i += 4) finish<matrix, centred, 4>(e, x, m, list + i, split);
    for (; i < count; ++i) finish<matrix, centred, 1>(e, x, m, list + i, split);
  }

  // From sums of squares to densities or, for components that no row of the word meets, 0. How many were finished.
  template <bool matrix, bool centred>
  int word(Block<T, rows>& block, const Mixture<T>& m, const T* x, int u, int64_t split) {
    using i = typename simd<T>::i;
    using lane = decltype(i{}[0] + 0);
    T* const e = block.e + u * n;
    v best = splat(T(-INFINITY));
    i arg = i{} + lane(first);  // where all bounds are -inf
    for (int64_t c = 0; c < m.k; ++c) {
      if (m.constants[c] == T(-INFINITY)) continue;
      const v bound = density(load(e + c * rows), m, c);
      const i more = (i)(bound > best);
      best = select(more, bound, best);
      arg = select(more, i{} + lane(c), arg);
    }
    int32_t* const list = block.list + u * m.k;
    int champions = 0;
    for (int l = 0; l < n; ++l) {
      const int64_t c = int64_t(arg[l]);
      if (block.seen[c] || m.constants[c] == T(-INFINITY)) continue;
      block.seen[c] = true;
      list[champions++] = int32_t(c);
    }
    finish_all<matrix, centred>(e, x, m, list, champions, split);
    v top = splat(T(-INFINITY));
    for (int l = 0; l < champions; ++l) top = vmax(load(e + int64_t(list[l]) * rows), top);
    // Far beyond the rounding of either side: a density just below is still computed, and then left out.
    const v size = select((i)(top < v{}), -top, top);
    const v least = madd(size, splat(T(-0x1p-20)), top) + splat(kNegligible<T> - T(1));
    int32_t* const todo = block.todo;
    int count = 0, others = 0;
    for (int64_t c = 0; c < m.k; ++c) {
      T* const at = e + c * rows;
      const v sum = load(at);
      const bool champion = block.seen[c], live = m.constants[c] != T(-INFINITY);
      const bool near =
          live & !champion & any(~(i)(density(sum, m, c) <= least));  // no branches: they are not foreseen
      const bool counts = champion | near;
      store(at, select(i{} - lane(counts), sum, v{}));
      block.seen[c] = false;
      todo[others] = list[count] = int32_t(c);
      others += near;
      count += counts;
    }
    finish_all<matrix, centred>(e, x, m, todo, others, split);
    block.listed[u] = count;
    return count;
  }
};

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
