// CPU only: squared distances of a tile of rows to centres, as sums of squared differences: no cancellation, no centring.
#pragma once
#include "core/batch.h"
#include "core/scratch.h"
#include "core/tile.h"
#include "kmeans/kmeans.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

#if defined(__AVX512F__)
constexpr int kWords = 4;  // of rows in a tile
#else
constexpr int kWords = 2;
#endif
constexpr int kCenters = 4;  // times kWords sums in registers

template <class T>
constexpr int64_t kTileRows = kWords * simd<T>::n;

// The rows of one data set.
template <class T>
struct Rows {
  const T *x, *weight;
  int64_t n, d;

  Rows(const KmeansInputs& in, int64_t b)
      : x((const T*)in.x + b * in.x_stride),
        weight(in.sample_weight ? (const T*)in.sample_weight + b * in.weight_stride : nullptr),
        n(in.n),
        d(in.d) {}
  int64_t groups() const { return (n + kKmeansGroupRows - 1) / kKmeansGroupRows; }
  int64_t group_end(int64_t g) const { return (g + 1) * kKmeansGroupRows < n ? (g + 1) * kKmeansGroupRows : n; }
  double weight_of(int64_t i) const { return weight ? double(weight[i]) : 1.0; }

  // f(first, count) for the tiles of group g, each transposed into `tile` before; rows that lack are 0.
  template <class F>
  inline __attribute__((always_inline)) void tiles(T* tile, int64_t g, F f) const {
    const int64_t end = group_end(g);
    for (int64_t first = g * kKmeansGroupRows; first < end; first += kTileRows<T>) {
      const int64_t count = end - first < kTileRows<T> ? end - first : kTileRows<T>;
      if (count < kTileRows<T>) memset(tile, 0, size_t(d * kTileRows<T>) * sizeof(T));  // load_tile ends at a word
      load_tile(tile, kTileRows<T>, x + first * d, count, d);
      f(first, count);
    }
  }
};

// distance[j][u] = |x - center_j|^2 for J centres and all words of the tile.
template <class T, int J>
GMK_INLINE void distances(typename simd<T>::v (&distance)[J][kWords], const T* tile, const T* centers, int64_t d) {
  using v = typename simd<T>::v;
#pragma GCC unroll 4
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
    for (int u = 0; u < kWords; ++u) distance[j][u] = v{};
  for (int64_t f = 0; f < d; ++f) {
    v x[kWords];
#pragma GCC unroll 4
    for (int u = 0; u < kWords; ++u) x[u] = load(tile + f * kTileRows<T> + u * simd<T>::n);
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      const v c = splat(centers[j * d + f]);
#pragma GCC unroll 4
      for (int u = 0; u < kWords; ++u) {
        const v t = x[u] - c;
        distance[j][u] = madd(t, t, distance[j][u]);
      }
    }
  }
}

// The nearest centre of every row of the tile, the first of equals, and its squared distance.
template <class T>
GMK_INLINE void nearest(T* distance, typename simd<T>::i* label, const T* tile, const T* centers, int64_t k,
                        int64_t d) {
  using v = typename simd<T>::v;
  using i = typename simd<T>::i;
  v best[kWords];
  i at[kWords];
#pragma GCC unroll 4
  for (int u = 0; u < kWords; ++u) best[u] = splat(T(INFINITY)), at[u] = i{};
  for_blocks<kCenters>(k, [&](auto size, int64_t c) __attribute__((always_inline)) {
    constexpr int J = decltype(size)::value;
    v now[J][kWords];
    distances<T, J>(now, tile, centers + c * d, d);
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      const i number = i{} + decltype(at[0][0] + 0)(c + j);
#pragma GCC unroll 4
      for (int u = 0; u < kWords; ++u) {
        const i closer = now[j][u] < best[u];
        at[u] = select(closer, number, at[u]);
        best[u] = vmin(now[j][u], best[u]);
      }
    }
  });
#pragma GCC unroll 4
  for (int u = 0; u < kWords; ++u) store(distance + u * simd<T>::n, best[u]), label[u] = at[u];
}

// Words of float64.
typedef float vnarrow __attribute__((vector_size(GMK_VECTOR_BYTES / 2)));
GMK_INLINE vdouble wide(const float* p) {
  vnarrow x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vdouble);
}
GMK_INLINE vdouble wide(const double* p) { return load(p); }

template <class T>
GMK_INLINE void copy(T* to, const T* from, int64_t count) {  // memcpy refuses the null of an empty tensor
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <class T>
static double squared_distance(const T* a, const T* b, int64_t d) {
  double sum = 0;
  for (int64_t f = 0; f < d; ++f) {
    const double t = double(a[f]) - double(b[f]);
    sum += t * t;
  }
  return sum;
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
