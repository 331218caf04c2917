// CPU only: sums over a block of rows of feature times responsibility, S[t][c] += sum_row F[t][row] R[c][row]. This is a
// matrix product that is contracted over the rows. Wide: components on the SIMD lanes, R transposed. Narrow, for
// fewer components than lanes: rows on the lanes, each sum still spread over them.
#pragma once
#include "core/simd.h"
#include "gmm/gmm_tile.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

#if defined(__AVX512F__)
constexpr int kPanel = 4;                    // words of components at once
constexpr int kTall[5] = {0, 12, 12, 8, 6};  // features at once, by words of components
constexpr int kNarrowFeatures = 6, kNarrowComponents = 4;
#else
constexpr int kPanel = 3;
constexpr int kTall[5] = {0, 12, 6, 4, 3};
constexpr int kNarrowFeatures = 6, kNarrowComponents = 2;
#endif

// F [J][rows], R [rows][step], `used` of the rows; V words of components.
template <class T, int J, int V, int rows>
GMK_INLINE void wide_tile(T* s, const T* f, const T* r, int64_t step, int used) {
  using v = typename simd<T>::v;
  constexpr int n = simd<T>::n;
  v sum[J][V];
#pragma GCC unroll 12
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
    for (int u = 0; u < V; ++u) sum[j][u] = v{};
  for (int row = 0; row < used; ++row) {
    v b[V];
#pragma GCC unroll 4
    for (int u = 0; u < V; ++u) b[u] = load(r + row * step + u * n);
#pragma GCC unroll 12
    for (int j = 0; j < J; ++j) {
      const v a = splat(f[j * rows + row]);
#pragma GCC unroll 4
      for (int u = 0; u < V; ++u) sum[j][u] = madd(a, b[u], sum[j][u]);
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
    for (int u = 0; u < V; ++u) store(s + j * step + u * n, load(s + j * step + u * n) + sum[j][u]);
}
template <class T, int V, int rows>
static void wide_panel(T* s, const T* f, const T* r, int64_t step, int64_t features, int used) {
  for_blocks<kTall[V]>(features, [&](auto size, int64_t t) __attribute__((always_inline)) {
    wide_tile<T, decltype(size)::value, V, rows>(s + t * step, f + t * rows, r, step, used);
  });
}
// s [features][step], step a whole number of words.
template <class T, int rows>
static void wide_sums(T* s, const T* f, const T* r, int64_t step, int64_t features, int used) {
  constexpr int n = simd<T>::n;
  int64_t c = 0;
  for (; c + kPanel * n <= step; c += kPanel * n) wide_panel<T, kPanel, rows>(s + c, f, r + c, step, features, used);
  const int64_t words = (step - c) / n;
  if (kPanel > 3 && words == 3) wide_panel<T, 3, rows>(s + c, f, r + c, step, features, used);
  if (words == 2) wide_panel<T, 2, rows>(s + c, f, r + c, step, features, used);
  if (words == 1) wide_panel<T, 1, rows>(s + c, f, r + c, step, features, used);
}

// F [J][rows], R [C][rows]; each of the sums s[t][c] is one word.
template <class T, int J, int C, int rows>
GMK_INLINE void narrow_tile(T* s, const T* f, const T* r, int64_t k, int used) {
  using v = typename simd<T>::v;
  constexpr int n = simd<T>::n;
  v sum[J][C];
#pragma GCC unroll 12
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[j][c] = v{};
  for (int row = 0; row < used; row += n) {
    v b[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) b[c] = load(r + c * rows + row);
#pragma GCC unroll 12
    for (int j = 0; j < J; ++j) {
      const v a = load(f + j * rows + row);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[j][c] = madd(a, b[c], sum[j][c]);
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      T* const at = s + (j * k + c) * n;
      store(at, load(at) + sum[j][c]);
    }
}
// s [features][k][n]
template <class T, int rows>
static void narrow_sums(T* s, const T* f, const T* r, int64_t k, int64_t features, int used) {
  constexpr int n = simd<T>::n;
  for_blocks<kNarrowFeatures>(features, [&](auto tall, int64_t t) __attribute__((always_inline)) {
    for_blocks<kNarrowComponents>(k, [&](auto wide, int64_t c) __attribute__((always_inline)) {
      narrow_tile<T, decltype(tall)::value, decltype(wide)::value, rows>(s + (t * k + c) * n, f + t * rows,
                                                                         r + c * rows, k, used);
    });
  });
}

// out[i] += the sum of the lanes of word i.
template <class T>
static void add_lanes(T* out, const T* words, int64_t count) {
  using v = typename simd<T>::v;
  constexpr int n = simd<T>::n;
  for (int64_t i = 0; i < count; i += n) {
    const int64_t some = count - i < n ? count - i : n;
    v r[n];
#pragma GCC unroll 16
    for (int l = 0; l < n; ++l) r[l] = l < some ? load(words + (i + l) * n) : v{};
    transpose<T>(r);
#pragma GCC unroll 4
    for (int half = n / 2; half; half /= 2)
#pragma GCC unroll 8
      for (int l = 0; l < half; ++l) r[l] += r[l + half];
    store_some(out + i, load_some(out + i, some) + r[0], some);
  }
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
