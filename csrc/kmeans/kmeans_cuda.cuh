// CUDA only: a block's rows in shared memory, and squared distances to eight centres at a time as sums of squared
// differences: no cancellation, no centring, no tensor cores.
#pragma once
#include "cuda/prims.cuh"
#include "kmeans/kmeans.h"

namespace gmk {

// kmeans_move.cu
Status kmeans_begin(const KmeansLloyd&, void* stream);
Status kmeans_spread(const KmeansLloyd&, int64_t slab_rows, void* stream);  // then the slabs added, then
Status kmeans_enough(const KmeansLloyd&, void* stream);
Status kmeans_move(const KmeansLloyd&, int64_t iteration, void* stream);  // counted from 1

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
template <class T>
constexpr int kBlocks = sizeof(T) == 4 ? 3 : 2;  // of a multiprocessor, at least
constexpr int kCenters = 8;                      // that one read of x serves; their numbers lie side by side

template <class T>
GMK_DEV const T* rows_of(const KmeansInputs& in, int64_t b) {
  return static_cast<const T*>(in.x) + b * in.x_stride;
}

// Weights of the rows of one data set.
template <class T>
struct Weights {
  const T* given;
  GMK_DEV Weights(const KmeansInputs& in, int64_t b)
      : given(in.sample_weight ? static_cast<const T*>(in.sample_weight) + b * in.weight_stride : nullptr) {}
  GMK_DEV T operator[](int64_t i) const { return given ? given[i] : T(1); }
};

// Features f0 .. f0 + width of the rows at x to tile[feature][row]. An odd stride: neither the features nor the rows of a
// warp meet in a bank.
template <class T>
GMK_DEV void load_rows(T* tile, int stride, const T* x, int rows, int64_t d, int64_t f0, int width) {
  if (width == 0) return;
  const int row_step = kThreads / width, feature_step = kThreads % width;
  int row = int(threadIdx.x) / width, f = int(threadIdx.x) % width;
  while (row < rows) {
    T v[4];
    int at[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {  // four reads on their way at a time
      at[u] = row < rows ? f * stride + row : -1;
      if (at[u] >= 0) v[u] = x[row * d + f0 + f];
      row += row_step, f += feature_step;
      if (f >= width) f -= width, ++row;
    }
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (at[u] >= 0) tile[at[u]] = v[u];
  }
}

// sum[j] += |x - center_j|^2 over `width` features; x[feature * stride], centers[feature][kCenters] at one address per
// warp.
template <class T>
GMK_DEV void add_squares(T (&sum)[kCenters], const T* x, int stride, const T* centers, int width) {
  constexpr int n = 16 / sizeof(T);
#pragma unroll 2
  for (int f = 0; f < width; ++f) {
    const T v = x[f * stride];
#pragma unroll
    for (int j = 0; j < kCenters; j += n) {
      const Pack<T, n> c = load_pack<T, n>(centers + f * kCenters + j);
#pragma unroll
      for (int e = 0; e < n; ++e) {
        const T t = v - c.v[e];
        sum[j + e] += t * t;
      }
    }
  }
}

template <class T>
GMK_DEV double squared_distance(const T* a, const T* b, int64_t d) {
  double sum = 0;
  for (int64_t f = 0; f < d; ++f) {
    const double t = double(a[f]) - double(b[f]);
    sum += t * t;
  }
  return sum;
}

}  // namespace
}  // namespace gmk
