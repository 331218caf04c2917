// CUDA: the M-step's part for a block of threads (gmm_m_step.cu has a matrix per block, gmm_fit.cu a mixture). float64.
#pragma once
#include "cuda/prims.cuh"
#include "gmm/gmm_m_step_parts.h"

namespace gmk {
namespace {

using namespace m_step;

constexpr int kThreads = 128;

struct Block {
  int64_t index = threadIdx.x, size = kThreads;
  GMK_DEV void sync() const { __syncthreads(); }
};

// One matrix: full, component c; tied, all of them (c = 0).
struct Matrix {
  const GmmMStep& a;
  const View& v;
  int64_t c;

  GMK_DEV bool tied() const { return a.covariance == kTied; }
  GMK_DEV double entry(int64_t i, int64_t j) const {
    const double e = tied() ? tied_covariance(a, v, j, i) : covariance(a, v, c, j, i);
    return i == j ? e + a.reg_covar : e;
  }
  GMK_DEV double least(int64_t i) const {  // pivot
    const double second = tied() ? v.s2[i * a.d + i] / v.total : v.s2[(c * a.d + i) * a.d + i] * (1 / v.nk[c]);
    return kTinyPivot * (second + a.reg_covar);
  }
};

// low [d][d]: A in, L out, lower triangles. false: a pivot was too small.
GMK_DEV bool factor(double* low, const Matrix& m, int64_t d) {
  for (int64_t j = 0; j < d; ++j) {
    __syncthreads();
    const double pivot = low[j * d + j];
    if (!(pivot > m.least(j))) return false;  // all threads see the same
    const double root = sqrt(pivot);
    __syncthreads();
    for (int64_t i = j + threadIdx.x; i < d; i += kThreads) low[i * d + j] = i == j ? root : low[i * d + j] / root;
    __syncthreads();
    const int64_t rest = d - j - 1;
    for (int64_t e = threadIdx.x; e < rest * rest; e += kThreads) {
      const int64_t i = j + 1 + e / rest, l = j + 1 + e % rest;
      if (l <= i) low[i * d + l] -= low[i * d + j] * low[l * d + j];
    }
  }
  __syncthreads();
  return true;
}

// upper [d][d] = L^-T: P[j][i] = -sum_{j <= p < i} L[i][p] P[j][p] / L[i][i].
GMK_DEV void invert(double* upper, const double* low, int64_t d) {
  for (int64_t j = threadIdx.x; j < d; j += kThreads)
    for (int64_t i = j; i < d; ++i) {
      double sum = i == j ? -1.0 : 0.0;
      for (int64_t p = j; p < i; ++p) sum += low[i * d + p] * upper[j * d + p];
      upper[j * d + i] = -sum / low[i * d + i];
    }
}

// Covariance and precision of component c of mixture b (tied: of all, c = 0), repaired where it is singular. low, upper
// [d][d]: memory to use; odd: shared by the block.
template <class T>
GMK_DEV void make_matrix(const GmmMStep& a, const View& v, int64_t b, int64_t c, double ridge, double* low,
                         double* upper, int& odd) {
  const int64_t d = a.d, dd = d * d;
  const bool tied = a.covariance == kTied;
  const int64_t q = tied ? b : b * a.k + c;
  const Matrix m = {a, v, c};
  __syncthreads();
  if (threadIdx.x == 0) odd = 0;
  __syncthreads();
  double added = 0;
  bool singular = false, good = false;
  for (int attempt = 0; attempt < kAttempts && !good; ++attempt) {
    if (attempt) {
      singular = true;
      added = attempt > 1 ? 10 * added : ridge;
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; e < dd; e += kThreads) {
      const int64_t i = e / d, j = e % d;
      if (j > i) continue;
      const double entry = m.entry(i, j);
      low[e] = i == j ? entry + added : entry;
      if (!(entry - entry == 0)) atomicMax(&odd, 1);
    }
    __syncthreads();
    if (odd) break;
    good = factor(low, m, d);
  }
  if (good) invert(upper, low, d);
  __syncthreads();
  T* const covariances = static_cast<T*>(a.covariances) + q * dd;
  T* const precisions = static_cast<T*>(a.precisions) + q * dd;
  for (int64_t e = threadIdx.x; e < dd; e += kThreads) {
    const int64_t i = e / d, j = e % d;
    covariances[e] = T(m.entry(i > j ? i : j, i > j ? j : i) + (i == j ? added : 0.0));
    precisions[e] = !good ? T(NAN) : i > j ? T(0) : T(upper[e]);
  }
  const uint8_t state = !good ? kNotFinite : singular ? kSingular : kHealthy;
  for (int64_t e = threadIdx.x; e < (tied ? a.k : 1); e += kThreads) a.status[tied ? q * a.k + e : q] = state;
  __syncthreads();
}

}  // namespace
}  // namespace gmk
