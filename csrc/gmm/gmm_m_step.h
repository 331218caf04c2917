// CPU only: the matrices of the M-step, float64: components on the SIMD lanes, so that Cholesky factor and inverse are
// plain multiply-adds. Bound: d^3 / 3 of them per component.
#pragma once
#include "core/simd.h"
#include "gmm/gmm_m_step_parts.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

using namespace m_step;

struct OneThread {
  int64_t index = 0, size = 1;
  void sync() const {}
};

// low [d][d] words, lower triangle: A in, L out; false lanes: a pivot was too small.
static vlong factor(double* low, const double* least, int64_t d) {
  constexpr int n = simd<double>::n;
  vlong good = ~vlong{};
  for (int64_t j = 0; j < d; ++j) {
    double* const own = low + j * d * n;
    for (int64_t i = j; i < d; i += 4) {
      const int64_t rows = d - i < 4 ? d - i : 4;
      const double* at[4];
      vdouble sum[4];
      for (int64_t r = 0; r < 4; ++r) {
        at[r] = low + (i + (r < rows ? r : 0)) * d * n;
        sum[r] = load(at[r] + j * n);
      }
      for (int64_t p = 0; p < j; ++p) {
        const vdouble e = load(own + p * n);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) sum[r] = madd(-load(at[r] + p * n), e, sum[r]);
      }
      if (i == j) {
        const vlong fine = sum[0] > load(least + j * n);
        good &= fine;
        sum[0] = vsqrt(select(fine, sum[0], splat(1.0)));
        store(own + j * n, sum[0]);
        for (int64_t r = 1; r < rows; ++r) store(low + ((i + r) * d + j) * n, sum[r] / sum[0]);
      } else {
        for (int64_t r = 0; r < rows; ++r) store(low + ((i + r) * d + j) * n, sum[r] / load(own + j * n));
      }
    }
  }
  return good;
}
// P [d][d] words, upper triangle, of L^-T: P[j][i] = -sum_{j <= p < i} L[i][p] P[j][p] / L[i][i].
static void invert(double* upper, const double* low, int64_t d) {
  constexpr int n = simd<double>::n;
  for (int64_t i = 0; i < d; ++i) {
    const double* const own = low + i * d * n;
    const vdouble inverse = splat(1.0) / load(own + i * n);
    store(upper + (i * d + i) * n, inverse);
    for (int64_t j = 0; j < i; j += 4) {
      const int64_t rows = i - j < 4 ? i - j : 4;
      vdouble sum[4] = {};
      double* at[4];
      for (int64_t r = 0; r < 4; ++r) at[r] = upper + (j + (r < rows ? r : 0)) * d * n;
      for (int64_t p = j; p < j + rows; ++p)
        for (int64_t r = 0; r <= p - j; ++r) sum[r] = madd(load(own + p * n), load(at[r] + p * n), sum[r]);
      for (int64_t p = j + rows; p < i; ++p) {
        const vdouble e = load(own + p * n);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) sum[r] = madd(e, load(at[r] + p * n), sum[r]);
      }
      for (int64_t r = 0; r < rows; ++r) store(at[r] + i * n, -sum[r] * inverse);
    }
  }
}

// Matrices first .. first + count of all (full: component first / k; tied: mixture), on the lanes.
template <class T>
static void matrices(const GmmMStep& a, const double* ridge, int64_t first, int64_t count, double* scratch) {
  constexpr int n = simd<double>::n;
  const int64_t d = a.d, dd = d * d;
  const bool tied = a.covariance == kTied;
  double* const low = scratch;
  double* const upper = low + dd * n;
  double* const base = upper + dd * n;  // the covariances, lower triangle
  double* const least = base + dd * n;
  double added[n] = {};
  bool live[n] = {}, odd[n] = {}, singular[n] = {};
  memset(base, 0, size_t(dd * n) * sizeof(double));
  for (int64_t i = 0; i < d; ++i) store(base + (i * d + i) * n, splat(1.0));
  memset(least, 0, size_t(d * n) * sizeof(double));
  for (int64_t l = 0; l < count; ++l) {
    const int64_t q = first + l, b = tied ? q : q / a.k, c = tied ? 0 : q % a.k;
    const View v = view(a, b);
    live[l] = tied ? !v.nothing : !dead(v, c);
    if (!live[l]) continue;
    const double inverse = tied ? 0 : 1 / v.nk[c];
    double check = 0;
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        double e = tied ? tied_covariance(a, v, j, i)
                        : v.s2[c * dd + j * d + i] * inverse - v.s1[c * d + i] * inverse * (v.s1[c * d + j] * inverse);
        if (i == j) e += a.reg_covar;
        base[(i * d + j) * n + l] = e;
        check += e - e;
      }
      least[i * n + l] =
          kTinyPivot * ((tied ? v.s2[i * d + i] / v.total : v.s2[c * dd + i * d + i] * inverse) + a.reg_covar);
    }
    odd[l] = check != 0;  // also NaN
  }
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    memcpy(low, base, size_t(dd * n) * sizeof(double));
    for (int64_t i = 0; i < d; ++i) store(low + (i * d + i) * n, load(low + (i * d + i) * n) + load(added));
    const vlong good = factor(low, least, d);
    bool again = false;
    for (int64_t l = 0; l < count; ++l)
      if (live[l] && !odd[l] && !good[l]) {
        again = singular[l] = true;
        odd[l] = attempt == kAttempts - 1;
        if (!odd[l]) added[l] = attempt ? 10 * added[l] : ridge[first + l];
      }
    if (!again) break;
  }
  invert(upper, low, d);
  for (int64_t l = 0; l < count; ++l) {
    const int64_t q = first + l;
    if (!live[l]) continue;
    T* const covariances = (T*)a.covariances + q * dd;
    T* const precisions = (T*)a.precisions + q * dd;
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        const double e = base[(i * d + j) * n + l] + (i == j ? added[l] : 0);
        covariances[i * d + j] = covariances[j * d + i] = T(e);
        precisions[i * d + j] = T(0);
        precisions[j * d + i] = odd[l] ? T(NAN) : T(upper[(j * d + i) * n + l]);
      }
    if (odd[l])
      for (int64_t i = 0; i < dd; ++i) precisions[i] = T(NAN);
    const uint8_t state = odd[l] ? kNotFinite : singular[l] ? kSingular : kHealthy;
    for (int64_t c = 0; c < (tied ? a.k : 1); ++c) a.status[tied ? q * a.k + c : q] = state;
  }
}

// Numbers of `scratch` for matrices().
GMK_INLINE int64_t matrices_scratch(int64_t d, int covariance) {
  return covariance == kFull || covariance == kTied ? (3 * d * d + d) * simd<double>::n : 0;
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
