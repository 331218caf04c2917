// CPU only: sums over a block of rows in which most responsibilities are 0, as they are where components are many or far
// apart. A component meets its own rows only; features lie on the SIMD lanes. With u = (t, 1):
//   full       S[a][b] += sum_i r_i u_ia u_ib, a <= b: weight, first and second moments in one
//   otherwise  S[f]    += sum_i r_i v_if,      v = (t, 1), diag (t, 1, t^2), spherical (t, 1, |t|^2)
#pragma once
#include "core/simd.h"
#include "gmm/gmm_tile.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int kSparseRows = 4;  // of S at once: they begin at the same word
#if defined(__AVX512F__)
constexpr int kSparseWords = 4;
#else
constexpr int kSparseWords = 2;
#endif

template <class A, int rows>
struct SparseSums {
  static constexpr int n = simd<A>::n;
  int64_t d, k, words, per;  // words of a row of u or v; numbers of a component's sums
  int covariance;
  A* u;     // [rows][words * n]
  A* sums;  // [k][per]

  SparseSums() = default;
  SparseSums(int64_t features, int64_t components, int kind) : d(features), k(components), covariance(kind) {
    const int64_t length = d + 1 + (kind == kDiag ? d : kind == kSpherical ? 1 : 0);
    words = (length + n - 1) / n;
    per = kind == kFull ? start(d + 1) : words * n;
  }
  int64_t numbers() const { return rows * words * n + k * per; }
  void take(A* at) {
    u = at;
    sums = u + rows * words * n;
  }
  static int64_t first_word(int64_t a) { return a / kSparseRows * kSparseRows / n; }
  // Where row a of S begins; its first number is that of column first_word(a) * n.
  int64_t start(int64_t a) const {
    int64_t at = 0;
    for (int64_t b = 0; b < a; b += kSparseRows)
      at += (a - b < kSparseRows ? a - b : kSparseRows) * (words - first_word(b)) * n;
    return at;
  }

  // x: [count][d] as it came. Rows without weight are never looked at again.
  template <class T>
  void load_rows(const T* x, const T* shift, int64_t count) {
    for (int64_t row = 0; row < count; ++row) {
      A* const to = u + row * words * n;
      A square = 0;
      for (int64_t f = 0; f < d; ++f) to[f] = A(x[row * d + f]) - A(shift[f]);
      for (int64_t f = d; f < words * n; ++f) to[f] = 0;
      to[d] = 1;
      if (covariance == kDiag)
        for (int64_t f = 0; f < d; ++f) to[d + 1 + f] = to[f] * to[f];
      if (covariance == kSpherical) {
        for (int64_t f = 0; f < d; ++f) square += to[f] * to[f];
        to[d + 1] = square;
      }
    }
  }

  // e [k][rows] times scale [rows]: the responsibilities.
  template <class T>
  void add(const T* e, const T* scale) {
    for (int64_t c = 0; c < k; ++c, e += rows) {
      int own[rows], count = 0;
      A r[rows];
      for (int row = 0; row < rows; row += simd<T>::n) {
        T product[simd<T>::n];
        const auto p = load(e + row) * load(scale + row);
        store(product, p);
        // not 0, or NaN; never a row that is infinite, whose scale is 0
        for (uint32_t live = lanes_of(~(typename simd<T>::i)(p == typename simd<T>::v{})); live; live &= live - 1) {
          const int lane = __builtin_ctz(live);
          own[count] = row + lane;
          r[count++] = A(product[lane]);
        }
      }
      if (!count) continue;
      if (covariance == kFull)
        add_products(sums + c * per, own, r, count);
      else
        add_rows(sums + c * per, own, r, count);
    }
  }

  void add_rows(A* s, const int* own, const A* r, int count) const {
    for_blocks<kSparseWords>(words, [&](auto size, int64_t w) __attribute__((always_inline)) {
      constexpr int V = decltype(size)::value;
      typename simd<A>::v sum[V] = {};
      for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[v] = madd(splat(r[i]), load(u + (own[i] * words + w + v) * n), sum[v]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(s + (w + v) * n, load(s + (w + v) * n) + sum[v]);
    });
  }
  void add_products(A* s, const int* own, const A* r, int count) const {
    for_blocks<kSparseRows>(d + 1, [&](auto tall, int64_t a) __attribute__((always_inline)) {
      constexpr int J = decltype(tall)::value;
      const int64_t begin = first_word(a), step = (words - begin) * n;
      for_blocks<kSparseWords>(words - begin, [&](auto size, int64_t w) __attribute__((always_inline)) {
        constexpr int V = decltype(size)::value;
        typename simd<A>::v sum[J][V] = {};
        for (int i = 0; i < count; ++i) {
          const A* const row = u + own[i] * words * n;
          typename simd<A>::v b[V];
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) b[v] = load(row + (begin + w + v) * n);
#pragma GCC unroll 4
          for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[j][v] = madd(splat(r[i] * row[a + j]), b[v], sum[j][v]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            A* const at = s + j * step + (w + v) * n;
            store(at, load(at) + sum[j][v]);
          }
      });
      s += J * step;
    });
  }

  // To the sums of all: [1, t, products or squares][step], a column per component.
  void move(A* to, int64_t step) const {
    for (int64_t c = 0; c < k; ++c) {
      const A* const s = sums + c * per;
      A* at = to + c;
      if (covariance != kFull) {
        *at += s[d];
        for (int64_t f = 0; f < d; ++f) *(at += step) += s[f];
        for (int64_t f = d + 1; f < d + 1 + (covariance == kDiag ? d : covariance == kSpherical ? 1 : 0); ++f)
          *(at += step) += s[f];
        continue;
      }
      const auto of = [&](int64_t a, int64_t b) { return s[start(a) + b - first_word(a) * n]; };
      *at += of(d, d);
      for (int64_t f = 0; f < d; ++f) *(at += step) += of(f, d);
      for (int64_t a = 0; a < d; ++a) {
        const A* const row = s + start(a) - first_word(a) * n;
        for (int64_t b = a; b < d; ++b) *(at += step) += row[b];
      }
    }
  }
};

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
