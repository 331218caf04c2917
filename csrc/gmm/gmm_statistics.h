// CPU only: the sums over rows that the backward keeps in float64, and how they become the parameters' gradients.
#pragma once
#include "gmm/gmm_tile.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int kBlock = 4;  // features: sums of t_a t_b are kept in blocks [4][4], a-block <= b-block

// Statistics of one mixture, in this order:
//   full, tied:       [k][1 + padded d]: sum w, sum w t;  then [k or 1][blocks][4][4]: sum w t_a t_b
//   diag, spherical:  [k][1 + 2 d]:      sum w, sum w y, sum w y^2
struct Layout {
  bool matrix, tied;
  int64_t d, padded, first, second, seconds;  // `first`: numbers per component; `second`: numbers per matrix
  int64_t total(int64_t components) const { return components * first + (tied ? 1 : components) * second; }
};
GMK_INLINE Layout layout(const GmmInputs& in) {
  Layout s{};
  s.matrix = matrix_covariance(in.covariance);
  s.tied = in.covariance == kTied;
  s.d = in.d;
  s.padded = (in.d + kBlock - 1) / kBlock * kBlock;
  const int64_t blocks = s.padded / kBlock;
  s.first = 1 + (s.matrix ? s.padded : 2 * in.d);
  s.second = s.matrix ? blocks * (blocks + 1) / 2 * kBlock * kBlock : 0;
  return s;
}
GMK_INLINE int64_t block_at(int64_t a, int64_t b) { return (b * (b + 1) / 2 + a) * kBlock * kBlock; }  // a <= b

// upper(-S P) + diag(mass / P), S given as blocks.
template <class T>
static void matrix_gradient(T* out, const double* second, double mass, const T* p, int64_t d) {
  for (int64_t a = 0; a < d; ++a)
    for (int64_t e = 0; e < d; ++e) {
      double g = 0;
      if (e >= a) {
        for (int64_t c = 0; c <= e; ++c) {
          const int64_t low = a < c ? a : c, high = a < c ? c : a;
          const int64_t at = block_at(low / kBlock, high / kBlock) + low % kBlock * kBlock + high % kBlock;
          g -= second[at] * double(p[c * d + e]);
        }
        if (e == a && mass != 0) g += mass / double(p[a * d + a]);
      }
      out[a * d + e] = T(g);
    }
}

// Of parameters that no row reaches, whatever they hold. There may be none (no features), and no memory for them.
template <class T>
static void zero_gradient(void* gradients, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) ((T*)gradients)[first + i] = T(0);
}

// The statistics of component c, all groups added, into its gradients.
template <class T>
static void finish_component(const GmmLogProbBackward& a, const Layout& s, int64_t b, int64_t c, double* sums) {
  const GmmInputs& in = a.in;
  const int64_t k = in.k, d = in.d;
  double* const first = sums + c * s.first;
  const T* const p = (const T*)in.precisions + b * in.precisions_stride;
  T* const grad_mean = (T*)a.grad_means + (b * k + c) * d;
  ((T*)a.grad_log_weights)[b * k + c] = T(first[0]);
  if (left_out<T>(in, b, c)) {
    const int64_t matrix = s.tied ? 0 : covariance_numbers(1, d, in.covariance);
    zero_gradient<T>(a.grad_means, (b * k + c) * d, d);
    zero_gradient<T>(a.grad_precisions, (b * k + c) * matrix, matrix);
    return;
  }
  if (s.matrix) {
    const T* const q = p + (s.tied ? 0 : c * d * d);
    for (int64_t e = d - 1; e >= 0; --e) {  // P^T sum w t, in place
      double projected = 0;
      for (int64_t f = 0; f <= e; ++f) projected += first[1 + f] * double(q[f * d + e]);
      first[1 + e] = projected;
    }
    for (int64_t f = 0; f < d; ++f) {
      double g = 0;
      for (int64_t e = f; e < d; ++e) g += double(q[f * d + e]) * first[1 + e];
      grad_mean[f] = T(g);
    }
    if (!s.tied)
      matrix_gradient((T*)a.grad_precisions + (b * k + c) * d * d, sums + k * s.first + c * s.second, first[0], q, d);
    return;
  }
  double total = 0;
  for (int64_t f = 0; f < d; ++f) {
    const double scale = in.covariance == kDiag ? double(p[c * d + f]) : double(p[c]);
    const double rest = first[0] - first[2 + 2 * f], g = rest == 0 ? 0 : rest / scale;
    grad_mean[f] = T(scale * first[1 + 2 * f]);
    if (in.covariance == kDiag) ((T*)a.grad_precisions)[(b * k + c) * d + f] = T(g);
    total += g;
  }
  if (in.covariance == kSpherical) ((T*)a.grad_precisions)[b * k + c] = T(total);
}

template <class T>
static void finish(const GmmLogProbBackward& a, const Layout& s, int64_t b, double* sums, int threads) {
  const GmmInputs& in = a.in;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t c = 0; c < in.k; ++c) finish_component<T>(a, s, b, c, sums);
  if (!s.tied) return;
  bool all_left_out = true;
  for (int64_t c = 0; c < in.k && all_left_out; ++c) all_left_out = left_out<T>(in, b, c);
  if (all_left_out) return zero_gradient<T>(a.grad_precisions, b * in.d * in.d, in.d * in.d);
  double mass = 0;
  for (int64_t c = 0; c < in.k; ++c) mass += sums[c * s.first];
  matrix_gradient((T*)a.grad_precisions + b * in.d * in.d, sums + in.k * s.first, mass,
                  (const T*)in.precisions + b * in.precisions_stride, in.d);
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
