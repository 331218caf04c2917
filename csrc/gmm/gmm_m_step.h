// CPU only: the M-step, float64, piece by piece: components on the SIMD lanes, so that Cholesky factor and inverse are
// plain multiply-adds. Bound: d^3 / 3 of them per component.
#pragma once
#include "core/simd.h"
#include "gmm/gmm_em.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr double kDeadShare = 0x1p-40;          // of the total weight
constexpr double kTinyPivot = 0x1p-46;          // of the second moment: below it a pivot is rounding
constexpr double kRidge = 1e-6;                 // of the mean variance: the first that is tried
constexpr double kGolden = 0.6180339887498949;  // no two copies are displaced by the same amount
constexpr int kAttempts = 40;

GMK_INLINE bool finite(double x) { return x - x == 0; }

// One mixture's sums.
struct View {
  const double *nk, *s1, *s2, *shift;
  double total;
  bool nothing;  // no weight at all
};
static View view(const GmmMStep& a, int64_t b) {
  View v{};
  v.nk = a.sums + b * em_numbers(a.k, a.d, a.covariance) + 2;
  v.s1 = v.nk + a.k;
  v.s2 = v.s1 + a.k * a.d;
  v.shift = a.shift + b * a.d;
  for (int64_t c = 0; c < a.k; ++c) v.total += v.nk[c];
  v.nothing = a.k == 0 || v.total <= 0;
  return v;
}
GMK_INLINE bool dead(const View& v, int64_t c) { return v.nothing || v.nk[c] <= kDeadShare * v.total; }

// Entry (i, j) of the covariance of component c, and its second moment.
GMK_INLINE double covariance(const GmmMStep& a, const View& v, int64_t c, int64_t i, int64_t j) {
  const double inverse = 1 / v.nk[c];
  return v.s2[(c * a.d + i) * a.d + j] * inverse - v.s1[c * a.d + i] * inverse * (v.s1[c * a.d + j] * inverse);
}
static double tied_covariance(const GmmMStep& a, const View& v, int64_t i, int64_t j) {
  double sum = v.s2[i * a.d + j];
  for (int64_t c = 0; c < a.k; ++c)
    if (!dead(v, c)) sum -= v.s1[c * a.d + i] * (v.s1[c * a.d + j] / v.nk[c]);
  return sum / v.total;
}
// Second moment and variance of feature f (spherical: of all features).
struct Moment {
  double second, variance;
};
static Moment moment(const GmmMStep& a, const View& v, int64_t c, int64_t f) {
  const double inverse = 1 / v.nk[c];
  if (a.covariance == kTied) return {v.s2[f * a.d + f] / v.total, tied_covariance(a, v, f, f) + a.reg_covar};
  if (a.covariance == kFull) return {v.s2[(c * a.d + f) * a.d + f] * inverse, covariance(a, v, c, f, f) + a.reg_covar};
  if (a.covariance == kDiag) {
    const double delta = v.s1[c * a.d + f] * inverse, second = v.s2[c * a.d + f] * inverse;
    return {second, second - delta * delta + a.reg_covar};
  }
  const double width = double(a.d > 0 ? a.d : 1), second = v.s2[c] * inverse / width;
  double square = 0;
  for (int64_t g = 0; g < a.d; ++g) square += v.s1[c * a.d + g] * inverse * (v.s1[c * a.d + g] * inverse);
  return {second, second - square / width + a.reg_covar};
}

// ridge[c] of one mixture (tied: ridge[0]).
static void find_ridges(const GmmMStep& a, const View& v, double* ridge) {
  const int64_t features = a.covariance == kSpherical ? 1 : a.d;
  double pooled = 0;
  for (int64_t c = 0; c < (a.covariance == kTied ? 1 : a.k); ++c) {
    ridge[c] = 0;
    if (a.covariance != kTied && dead(v, c)) continue;
    for (int64_t f = 0; f < features; ++f) {
      const Moment e = moment(a, v, c, f);
      ridge[c] += e.variance <= kTinyPivot * (e.second + a.reg_covar) ? 0 : e.variance;
    }
    ridge[c] /= double(features > 0 ? features : 1);
    pooled += a.covariance == kTied ? ridge[c] : ridge[c] * (v.nk[c] / v.total);
  }
  for (int64_t c = 0; c < (a.covariance == kTied ? 1 : a.k); ++c) {
    const double r = kRidge * (ridge[c] > pooled ? ridge[c] : pooled);
    ridge[c] = r > 0 ? r : kRidge;
  }
}

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
        added[l] = attempt ? 10 * added[l] : ridge[first + l];
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

// Diagonal and spherical covariances of component c.
template <class T>
static void variances(const GmmMStep& a, const View& v, int64_t b, int64_t c, double ridge) {
  const int64_t features = a.covariance == kDiag ? a.d : 1, q = b * a.k + c;
  T* const covariances = (T*)a.covariances + q * features;
  T* const precisions = (T*)a.precisions + q * features;
  uint8_t state = kHealthy;
  for (int64_t f = 0; f < features; ++f)
    if (!finite(moment(a, v, c, f).variance)) state = kNotFinite;
  const bool odd = state == kNotFinite;
  for (int64_t f = 0; f < features; ++f) {
    const Moment e = moment(a, v, c, f);
    const double least = kTinyPivot * (e.second + a.reg_covar);
    double variance = e.variance;
    if (!odd && variance <= least) {
      variance = 2 * least > ridge ? 2 * least : ridge;
      state = kSingular;
    }
    covariances[f] = T(variance);
    precisions[f] = odd ? T(NAN) : T(1 / sqrt(variance));
  }
  a.status[q] = state;
}

// What comes before matrices() for one mixture: its ridges; diagonal and spherical covariances are done here.
template <class T>
static void begin(const GmmMStep& a, const View& v, int64_t b, double* ridge) {
  if (v.nothing) return;
  find_ridges(a, v, ridge);
  if (a.covariance == kFull || a.covariance == kTied) return;
  for (int64_t c = 0; c < a.k; ++c)
    if (!dead(v, c)) variances<T>(a, v, b, c, ridge[c]);
}

// Weights and means of one mixture; its dead components become copies of the heaviest.
template <class T>
static void finish(const GmmMStep& a, const View& v, int64_t b, double* weights) {
  const int64_t k = a.k, d = a.d;
  T* const means = (T*)a.means + b * k * d;
  const int64_t per = a.covariance == kFull ? d * d : a.covariance == kDiag ? d : 1;  // of one component
  T* const covariances = (T*)a.covariances + b * covariance_numbers(k, d, a.covariance);
  T* const precisions = (T*)a.precisions + b * covariance_numbers(k, d, a.covariance);
  uint8_t* const status = a.status + b * k;
  if (v.nothing) {
    const int64_t numbers = covariance_numbers(k, d, a.covariance);
    const bool matrix = a.covariance == kFull || a.covariance == kTied;
    for (int64_t i = 0; i < numbers; ++i)
      covariances[i] = precisions[i] = T(!matrix || (i % (d * d)) % (d + 1) == 0 ? 1 : 0);
    for (int64_t c = 0; c < k; ++c) {
      weights[c] = 1;
      status[c] = kDead;
      for (int64_t f = 0; f < d; ++f) means[c * d + f] = T(v.shift[f]);
    }
  } else {
    for (int64_t c = 0; c < k; ++c) {
      weights[c] = dead(v, c) ? -1 : v.nk[c];
      if (v.nk[c] != v.nk[c]) status[c] = kNotFinite;
      for (int64_t f = 0; f < d; ++f) means[c * d + f] = T(v.shift[f] + v.s1[c * d + f] / v.nk[c]);
    }
    int64_t copies = 0;
    for (int64_t c = 0; c < k; ++c) {
      if (!dead(v, c)) continue;
      int64_t donor = 0;
      for (int64_t e = 1; e < k; ++e)
        if (weights[e] > weights[donor]) donor = e;
      weights[c] = weights[donor] /= 2;
      for (int64_t f = 0; f < d; ++f) means[c * d + f] = means[donor * d + f];
      if (a.covariance != kTied) {
        memcpy(covariances + c * per, covariances + donor * per, size_t(per) * sizeof(T));
        memcpy(precisions + c * per, precisions + donor * per, size_t(per) * sizeof(T));
      }
      status[c] = kDead;
      const T* const own = a.covariance == kTied ? covariances : covariances + c * per;
      const int64_t step = a.covariance == kDiag ? 1 : a.covariance == kSpherical ? 0 : d + 1;
      int64_t widest = 0;
      for (int64_t f = 1; f < d; ++f)
        if (own[f * step] > own[widest * step]) widest = f;
      const double turns = 0.5 + kGolden * double(copies), aside = 0.5 + turns - floor(turns);
      if (d > 0) means[c * d + widest] += T(aside * sqrt(double(own[widest * step])));
      ++copies;
    }
  }
  double total = 0;
  for (int64_t c = 0; c < k; ++c) total += weights[c];
  for (int64_t c = 0; c < k; ++c) {
    ((T*)a.weights)[b * k + c] = T(weights[c] / total);
    ((T*)a.log_weights)[b * k + c] = T(log(weights[c] / total));
  }
}

// Numbers of `scratch` for matrices().
GMK_INLINE int64_t matrices_scratch(int64_t d, int covariance) {
  return covariance == kFull || covariance == kTied ? (3 * d * d + d) * simd<double>::n : 0;
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
