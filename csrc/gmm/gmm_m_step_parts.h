// The M-step but for the matrices (gmm_m_step.h, gmm_m_step.cu): weights, means, variances, what to add to a singular
// matrix, and components that nobody needs. float64. One team works on a mixture: a thread of the CPU, a block of CUDA.
#pragma once
#include <math.h>

#include "gmm/gmm_em.h"

namespace gmk {
namespace m_step {

constexpr double kDeadShare = 0x1p-40;          // of the total weight
constexpr double kTinyPivot = 0x1p-46;          // of the second moment: below it a pivot is rounding
constexpr double kRidge = 1e-6;                 // of the mean variance: the first that is tried
constexpr double kGolden = 0.6180339887498949;  // no two copies are displaced by the same amount
constexpr int kAttempts = 40;

GMK_HD bool finite(double x) { return x - x == 0; }

// One mixture's sums.
struct View {
  const double *nk, *s1, *s2, *shift;
  double total;
  bool nothing;  // no weight at all
};
GMK_HD View view(const GmmMStep& a, int64_t b) {
  View v{};
  v.nk = a.sums + b * em_numbers(a.k, a.d, a.covariance) + 2;
  v.s1 = v.nk + a.k;
  v.s2 = v.s1 + a.k * a.d;
  v.shift = a.shift + b * a.d;
  for (int64_t c = 0; c < a.k; ++c) v.total += v.nk[c];
  v.nothing = a.k == 0 || v.total <= 0;
  return v;
}
GMK_HD bool dead(const View& v, int64_t c) { return v.nothing || v.nk[c] <= kDeadShare * v.total; }

// Entry (i, j) of the covariance of component c, and its second moment.
GMK_HD double covariance(const GmmMStep& a, const View& v, int64_t c, int64_t i, int64_t j) {
  const double inverse = 1 / v.nk[c];
  return v.s2[(c * a.d + i) * a.d + j] * inverse - v.s1[c * a.d + i] * inverse * (v.s1[c * a.d + j] * inverse);
}
GMK_HD double tied_covariance(const GmmMStep& a, const View& v, int64_t i, int64_t j) {
  double sum = v.s2[i * a.d + j];
  for (int64_t c = 0; c < a.k; ++c)
    if (!dead(v, c)) sum -= v.s1[c * a.d + i] * (v.s1[c * a.d + j] / v.nk[c]);
  return sum / v.total;
}
// Second moment and variance of feature f (spherical: of all features).
struct Moment {
  double second, variance;
};
GMK_HD Moment moment(const GmmMStep& a, const View& v, int64_t c, int64_t f) {
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
template <class Team>
GMK_HD void find_ridges(const GmmMStep& a, const View& v, double* ridge, const Team& team) {
  const int64_t features = a.covariance == kSpherical ? 1 : a.d, count = a.covariance == kTied ? 1 : a.k;
  for (int64_t c = team.index; c < count; c += team.size) {
    ridge[c] = 0;
    if (a.covariance != kTied && dead(v, c)) continue;
    for (int64_t f = 0; f < features; ++f) {
      const Moment e = moment(a, v, c, f);
      ridge[c] += e.variance <= kTinyPivot * (e.second + a.reg_covar) ? 0 : e.variance;
    }
    ridge[c] /= double(features > 0 ? features : 1);
  }
  team.sync();
  double pooled = 0;
  for (int64_t c = 0; c < count; ++c) pooled += a.covariance == kTied ? ridge[c] : ridge[c] * (v.nk[c] / v.total);
  team.sync();
  for (int64_t c = team.index; c < count; c += team.size) {
    const double r = kRidge * (ridge[c] > pooled ? ridge[c] : pooled);
    ridge[c] = r > 0 ? r : kRidge;
  }
}

// Diagonal and spherical covariances of component c.
template <class T>
GMK_HD void variances(const GmmMStep& a, const View& v, int64_t b, int64_t c, double ridge) {
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

// What comes before the matrices of one mixture: its ridges; diagonal and spherical covariances are done here.
template <class T, class Team>
GMK_HD void begin(const GmmMStep& a, const View& v, int64_t b, double* ridge, const Team& team) {
  if (v.nothing) return;
  find_ridges(a, v, ridge, team);
  if (a.covariance == kFull || a.covariance == kTied) return;
  for (int64_t c = team.index; c < a.k; c += team.size)
    if (!dead(v, c)) variances<T>(a, v, b, c, ridge[c]);
}

// Component c, which is dead, becomes a copy of the heaviest. `copies`: how many have before.
template <class T>
GMK_HD void replace_dead(const GmmMStep& a, int64_t b, int64_t c, int64_t copies, double* weights) {
  const int64_t k = a.k, d = a.d;
  const int64_t per = a.covariance == kFull ? d * d : a.covariance == kDiag ? d : 1;  // of one component
  T* const means = (T*)a.means + b * k * d;
  T* const covariances = (T*)a.covariances + b * covariance_numbers(k, d, a.covariance);
  T* const precisions = (T*)a.precisions + b * covariance_numbers(k, d, a.covariance);
  int64_t donor = 0;
  for (int64_t e = 1; e < k; ++e)
    if (weights[e] > weights[donor]) donor = e;
  weights[c] = weights[donor] /= 2;
  for (int64_t f = 0; f < d; ++f) means[c * d + f] = means[donor * d + f];
  for (int64_t i = 0; a.covariance != kTied && i < per; ++i) {
    covariances[c * per + i] = covariances[donor * per + i];
    precisions[c * per + i] = precisions[donor * per + i];
  }
  a.status[b * k + c] = kDead;
  const T* const own = a.covariance == kTied ? covariances : covariances + c * per;
  const int64_t step = a.covariance == kDiag ? 1 : a.covariance == kSpherical ? 0 : d + 1;
  int64_t widest = 0;
  for (int64_t f = 1; f < d; ++f)
    if (own[f * step] > own[widest * step]) widest = f;
  const double turns = 0.5 + kGolden * double(copies), aside = 0.5 + turns - floor(turns);
  if (d > 0) means[c * d + widest] += T(aside * sqrt(double(own[widest * step])));
}

// Weights and means of one mixture; its dead components become copies of the heaviest. `weights` [k]: memory to use.
template <class T, class Team>
GMK_HD void finish(const GmmMStep& a, const View& v, int64_t b, double* weights, const Team& team) {
  const int64_t k = a.k, d = a.d;
  T* const means = (T*)a.means + b * k * d;
  uint8_t* const status = a.status + b * k;
  if (v.nothing) {
    const int64_t numbers = covariance_numbers(k, d, a.covariance);
    T* const covariances = (T*)a.covariances + b * numbers;
    T* const precisions = (T*)a.precisions + b * numbers;
    const bool matrix = a.covariance == kFull || a.covariance == kTied;
    for (int64_t i = team.index; i < numbers; i += team.size)
      covariances[i] = precisions[i] = T(!matrix || (i % (d * d)) % (d + 1) == 0 ? 1 : 0);
  }
  for (int64_t i = team.index; i < k * d; i += team.size)
    means[i] = T(v.nothing ? v.shift[i % d] : v.shift[i % d] + v.s1[i] / v.nk[i / d]);
  for (int64_t c = team.index; c < k; c += team.size) {
    weights[c] = v.nothing ? 1 : dead(v, c) ? -1 : v.nk[c];
    if (v.nothing) status[c] = kDead;
    if (!v.nothing && v.nk[c] != v.nk[c]) status[c] = kNotFinite;
  }
  team.sync();
  if (team.index == 0 && !v.nothing) {
    int64_t copies = 0;
    for (int64_t c = 0; c < k; ++c)
      if (dead(v, c)) replace_dead<T>(a, b, c, copies++, weights);
  }
  team.sync();
  double total = 0;
  for (int64_t c = 0; c < k; ++c) total += weights[c];
  for (int64_t c = team.index; c < k; c += team.size) {
    ((T*)a.weights)[b * k + c] = T(weights[c] / total);
    ((T*)a.log_weights)[b * k + c] = T(log(weights[c] / total));
  }
}

}  // namespace m_step
}  // namespace gmk
