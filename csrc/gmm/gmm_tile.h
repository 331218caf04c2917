// CPU only: what the forward and the backward share. Rows lie on the SIMD lanes: a tile holds a block of rows with the
// features outside, so that no sum over features or components crosses lanes, and every k and d fits.
#pragma once
#include "core/simd_math.h"
#include "core/tile.h"
#include "gmm/gmm.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// Columns of P (kColumns) times words of rows (kWords) that are accumulated at once; kChains where one word of rows has
// to fill the pipelines alone. Measured on Sapphire Rapids.
#if defined(__AVX512F__)
constexpr int kColumns = 16, kWords = 1, kChains = 16;
#elif defined(__AVX2__)
constexpr int kColumns = 4, kWords = 2, kChains = 8;
#else
constexpr int kColumns = 4, kWords = 2, kChains = 8;
#endif
constexpr int kTileWords = 8;  // words of rows in a tile, fewer where d is large

GMK_INLINE int tile_words(int64_t d) { return d <= 32 ? kTileWords : d <= 128 ? kTileWords / 2 : kTileWords / 4; }

GMK_INLINE bool matrix_covariance(int covariance) { return covariance == kFull || covariance == kTied; }

// A component of no weight, or with a zero on the diagonal of P, does not count, whatever else it holds.
template <class T>
GMK_INLINE bool left_out(const GmmInputs& in, int64_t b, int64_t c) {
  if (((const T*)in.log_weights)[b * in.weights_stride + c] == T(-INFINITY)) return true;
  const T* const p = (const T*)in.precisions + b * in.precisions_stride;
  for (int64_t f = 0; f < in.d; ++f)
    if (p[precision_at(in.covariance, in.d, c, f, f)] == T(0)) return true;
  return false;
}

// One mixture, ready for the tiles.
template <class T>
struct Mixture {
  int64_t k, d;
  const T* means;       // [k, d]
  const T* matrices;    // full, tied: P of component 0
  int64_t matrix_step;  // from one component's P to the next; 0 for tied
  T* constants;         // [k]: log weight + log|det P| - d/2 log 2 pi; -inf: the component is left out
  T* scales;            // diag, spherical: [k, d]
  T* shifts;            // diag, spherical: [k, d], (centre - mean) * scale
  T* centre;            // [d]: subtracted from x where `centred`
  bool centred;         // y = (x - centre) * scale + shift; else y = (x - mean) * scale

  static int64_t scratch(const GmmInputs& in) {
    return in.k + in.d + (matrix_covariance(in.covariance) ? 0 : 2 * in.k * in.d) + 2 * in.d;
  }
};

template <class T>
GMK_INLINE T sum_log_abs(const T* p, int64_t step, int64_t count, T* work) {
  constexpr int n = simd<T>::n;
  for (int64_t f = 0; f < count; ++f) work[f] = p[f * step] < 0 ? -p[f * step] : p[f * step];
  double sum = 0;
  for (int64_t f = 0; f < count; f += n) {
    const int64_t some = count - f < n ? count - f : n;
    const auto logs = vlog(load_some(work + f, some));
    for (int64_t l = 0; l < some; ++l) sum += double(logs[l]);
  }
  return T(sum);
}

// Two operations per element instead of three, where they are as good: the rounding of x - centre and of the shift
// reaches y as 2^-23 of the largest |mean - centre| * scale.
constexpr double kCentredLimit = 128;

template <class T>
static Mixture<T> prepare(const GmmInputs& in, int64_t b, T* scratch) {
  Mixture<T> m{};
  const int64_t k = m.k = in.k, d = m.d = in.d;
  const T* const log_weights = (const T*)in.log_weights + b * in.weights_stride;
  const T* const p = (const T*)in.precisions + b * in.precisions_stride;
  m.means = (const T*)in.means + b * in.means_stride;
  m.matrices = p;
  m.matrix_step = in.covariance == kFull ? d * d : 0;
  m.constants = scratch;
  m.centre = m.constants + k;
  T* const work = m.centre + d;
  m.scales = work + 2 * d;
  m.shifts = m.scales + k * d;
  const double half_log_2pi = 0.91893853320467274178;
  const bool matrix = matrix_covariance(in.covariance);
  T log_det = 0;
  for (int64_t c = 0; c < k; ++c) {
    if (in.covariance == kFull || (in.covariance == kTied && c == 0)) {
      log_det = sum_log_abs(p + c * m.matrix_step, d + 1, d, work);
    } else if (!matrix) {
      for (int64_t f = 0; f < d; ++f) m.scales[c * d + f] = in.covariance == kDiag ? p[c * d + f] : p[c];
      log_det = sum_log_abs(m.scales + c * d, 1, d, work);
    }
    m.constants[c] =
        left_out<T>(in, b, c) ? T(-INFINITY) : T(double(log_weights[c]) + double(log_det) - double(d) * half_log_2pi);
  }
  if (matrix) return m;
  for (int64_t f = 0; f < d; ++f) {
    double sum = 0;
    int64_t live = 0;
    for (int64_t c = 0; c < k; ++c)
      if (m.constants[c] != T(-INFINITY)) sum += double(m.means[c * d + f]), ++live;
    m.centre[f] = T(sum / double(live ? live : 1));
  }
  m.centred = true;
  for (int64_t c = 0; c < k; ++c) {
    if (m.constants[c] == T(-INFINITY)) continue;
    for (int64_t f = 0; f < d; ++f) {
      const double shift = (double(m.centre[f]) - double(m.means[c * d + f])) * double(m.scales[c * d + f]);
      m.shifts[c * d + f] = T(shift);
      m.centred &= shift < kCentredLimit && shift > -kCentredLimit;
    }
  }
  return m;
}

// y = (x - mean) P for J columns from column j on and V words of rows; P[i][j] with i > j is never read.
template <class T, int J, int V>
GMK_INLINE void times_columns(typename simd<T>::v (&y)[J][V], const T* x, int64_t stride, const T* mean, const T* p,
                              int64_t d, int64_t j) {
  using v = typename simd<T>::v;
  constexpr int n = simd<T>::n;
#pragma GCC unroll 16
  for (int c = 0; c < J; ++c)
#pragma GCC unroll 2
    for (int u = 0; u < V; ++u) y[c][u] = v{};
  for (int64_t i = 0; i < j; ++i) {
    v t[V];
#pragma GCC unroll 2
    for (int u = 0; u < V; ++u) t[u] = load(x + i * stride + u * n) - splat(mean[i]);
#pragma GCC unroll 16
    for (int c = 0; c < J; ++c) {
      const v q = splat(p[i * d + j + c]);
#pragma GCC unroll 2
      for (int u = 0; u < V; ++u) y[c][u] = madd(t[u], q, y[c][u]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < J; ++r) {
    v t[V];
#pragma GCC unroll 2
    for (int u = 0; u < V; ++u) t[u] = load(x + (j + r) * stride + u * n) - splat(mean[j + r]);
#pragma GCC unroll 16
    for (int c = r; c < J; ++c) {
      const v q = splat(p[(j + r) * d + j + c]);
#pragma GCC unroll 2
      for (int u = 0; u < V; ++u) y[c][u] = madd(t[u], q, y[c][u]);
    }
  }
}

// y = (x - mean) * scale of feature f.
template <bool centred, class V, class T>
GMK_INLINE V scaled(V x, const Mixture<T>& m, int64_t at) {
  if (centred) return madd(x, splat(m.scales[at]), splat(m.shifts[at]));
  return (x - splat(m.means[at])) * splat(m.scales[at]);
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
