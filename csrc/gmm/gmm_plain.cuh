// CUDA, the plain path: one thread is one row, plain multiply-adds, for every dtype, covariance, d and k. It serves float64,
// GPUs before sm_80, and the sizes that gmm_matrix.cuh leaves out. A block keeps its rows of x in shared memory, features
// outside, where they fit; parameters are read at one address per warp.
#pragma once
#include "cuda/prims.cuh"
#include "gmm/gmm.h"

namespace gmk {
namespace {

constexpr int kRows = 64;                 // rows (and threads) of a block
constexpr int kColumns = 8;               // columns of P at a time
constexpr int64_t kTileBytes = 24 << 10;  // shared memory for x; the same again for grad_x
constexpr int kBlocks = 8;  // of a multiprocessor, at least: without it ptxas spills to stay at 64 registers

GMK_DEV float gmm_exp(float x) { return expf(x); }
GMK_DEV double gmm_exp(double x) { return exp(x); }
GMK_DEV float gmm_log(float x) { return logf(x); }
GMK_DEV double gmm_log(double x) { return log(x); }
template <class T>
GMK_DEV T infinity() {
  return T(HUGE_VAL);
}

// One mixture's parameters.
template <class T>
struct Parameters {
  const T *log_weights, *means, *precisions;
  int64_t k, d;
  int covariance;

  GMK_HD_MEMBER bool matrix() const { return covariance <= kTied; }
  GMK_HD_MEMBER const T* matrix_of(int64_t c) const { return precisions + (covariance == kFull ? c * d * d : 0); }
  GMK_HD_MEMBER T scale(int64_t c, int64_t f) const { return precisions[covariance == kDiag ? c * d + f : c]; }
  GMK_HD_MEMBER T diagonal(int64_t c, int64_t f) const { return matrix() ? matrix_of(c)[f * d + f] : scale(c, f); }
};
template <class T>
GMK_DEV Parameters<T> parameters(const GmmInputs& in, int64_t b) {
  Parameters<T> p;
  p.log_weights = static_cast<const T*>(in.log_weights) + b * in.weights_stride;
  p.means = static_cast<const T*>(in.means) + b * in.means_stride;
  p.precisions = static_cast<const T*>(in.precisions) + b * in.precisions_stride;
  p.k = in.k;
  p.d = in.d;
  p.covariance = in.covariance;
  return p;
}

// A component of no weight, or with a zero on the diagonal of P, does not count, whatever else it holds.
template <class T>
GMK_DEV bool left_out(const Parameters<T>& p, int64_t c) {
  bool yes = p.log_weights[c] == -infinity<T>();
  for (int64_t f = 0; f < p.d; ++f) yes = yes || p.diagonal(c, f) == T(0);
  return yes;
}

// log weight + log|det P| - d/2 log 2 pi; -inf where it is left out
template <class T>
GMK_DEV T constant(const Parameters<T>& p, int64_t c) {
  if (left_out(p, c)) return -infinity<T>();
  double sum = double(p.log_weights[c]) - 0.91893853320467274178 * double(p.d);
  for (int64_t f = 0; f < p.d; ++f) sum += log(fabs(double(p.diagonal(c, f))));
  return T(sum);
}

// A thread's row of x: in a shared tile (step = kRows) or in global memory (step = 1).
template <class T>
struct Row {
  const T* x;
  int64_t step;
  GMK_HD_MEMBER T operator[](int64_t f) const { return x[f * step]; }
};

// y = (x - mean) P, columns j .. j + kColumns (0 past column d).
template <class T>
GMK_DEV void times_columns(T (&y)[kColumns], Row<T> x, const T* mean, const T* p, int64_t d, int64_t j) {
  for (int e = 0; e < kColumns; ++e) y[e] = T(0);
  const int64_t end = j + kColumns < d ? j + kColumns : d;
  for (int64_t i = 0; i < j; ++i) {
    const T t = x[i] - mean[i];
    for (int e = 0; e < kColumns; ++e)
      if (j + e < end) y[e] += t * p[i * d + j + e];
  }
  for (int64_t i = j; i < end; ++i) {
    const T t = x[i] - mean[i];
    for (int e = 0; e < kColumns; ++e)
      if (j + e < end && i <= j + e) y[e] += t * p[i * d + j + e];
  }
}

// |(x - mean) P|^2
template <class T>
GMK_DEV T square_distance(Row<T> x, const Parameters<T>& p, int64_t c) {
  const T* const mean = p.means + c * p.d;
  T sum = T(0);
  if (p.matrix()) {
    for (int64_t j = 0; j < p.d; j += kColumns) {
      T y[kColumns];
      times_columns(y, x, mean, p.matrix_of(c), p.d, j);
      for (int e = 0; e < kColumns; ++e) sum += y[e] * y[e];
    }
  } else {
    for (int64_t f = 0; f < p.d; ++f) {
      const T y = (x[f] - mean[f]) * p.scale(c, f);
      sum += y * y;
    }
  }
  return sum;
}

// Rows first .. first + rows of x into tile[f][row]; every thread calls it, and may read its own row afterwards.
template <class T>
GMK_DEV Row<T> load_rows(T* tile, bool shared, const T* x, int64_t first, int64_t rows, int64_t d) {
  if (!shared) return Row<T>{x + (first + (threadIdx.x < rows ? threadIdx.x : 0)) * d, 1};
  __syncthreads();
  for (int64_t i = threadIdx.x; i < rows * d; i += kRows) tile[i % d * kRows + i / d] = x[first * d + i];
  __syncthreads();
  return Row<T>{tile + (threadIdx.x < rows ? threadIdx.x : 0), kRows};
}

// w = grad * exp(component's log-density - log_prob); 0 for a row without density.
template <class T>
GMK_DEV T weight(Row<T> x, const Parameters<T>& p, int64_t c, T own, T grad, T log_prob) {
  if (log_prob == -infinity<T>() || own == -infinity<T>()) return T(0);
  return grad * gmm_exp(own - T(0.5) * square_distance(x, p, c) - log_prob);
}

}  // namespace
}  // namespace gmk
