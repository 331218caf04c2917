// The E-step and its sums. They are what the gradient with respect to the parameters is made of (gmm_backward.cu), with the
// sample weights in the place of the gradient; so this file only has what comes before and after: log-densities of the
// rows (gmm_log_prob), which of them count, and the sums, turned from every component's own mean to the common shift.
// x is read twice, and nothing of size n x k is stored. No atomics: groups of rows and slabs are added in order.
// Bound: the two products with P of each component and the one with t t^T; full 3 k d^2 multiply-adds per row.
#include "gmm/gmm_cuda.h"
#include "gmm/gmm_em.h"
#include "gmm/gmm_plain.cuh"

namespace gmk {
namespace {

constexpr int kThreads = 128, kTileRows = 16;
constexpr int kAtLeast = 4;  // blocks of a multiprocessor, at least: else ptxas spills to stay at 40 or 72 registers

// What the sums are about: one thread is one feature of a mixture.
template <class T>
__global__ void __launch_bounds__(kThreads, kAtLeast) gmm_em_shift_kernel(GmmEmStatistics a) {
  const GmmInputs& in = a.in;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < in.b * in.d; i += int64_t(gridDim.x) * kThreads) {
    const int64_t b = i / in.d, f = i % in.d;
    if (a.shift) {
      a.used_shift[i] = double(T(a.shift[b * a.shift_stride + f]));
      continue;
    }
    const Parameters<T> p = parameters<T>(in, b);
    double top = -1e300, total = 0, mean = 0;
    for (int64_t c = 0; c < in.k; ++c) top = double(p.log_weights[c]) > top ? double(p.log_weights[c]) : top;
    for (int64_t c = 0; c < in.k; ++c) total += exp(double(p.log_weights[c]) - top);
    for (int64_t c = 0; c < in.k; ++c) {
      const double w = exp(double(p.log_weights[c]) - top) / (total > 1e-300 ? total : 1e-300);
      if (w != 0) mean += w * double(p.means[c * in.d + f]);
    }
    a.used_shift[i] = double(T(mean));
  }
}

// Log-densities and weights of the rows, as the sums take them: a row of weight 0 has density 0 whatever it holds. One
// block is a group of rows.
template <class T>
__global__ void __launch_bounds__(kThreads) gmm_em_rows_kernel(GmmEmStatistics a) {
  GMK_SHARED(parts, double[2 * kThreads]);
  const GmmInputs& in = a.in;
  const int64_t groups = (in.n + kEmGroupRows - 1) / kEmGroupRows;
  for (int64_t job = blockIdx.x; job < in.b * groups; job += gridDim.x) {
    const int64_t b = job / groups, first = job % groups * kEmGroupRows, rest = in.n - first;
    const int64_t rows = rest < kEmGroupRows ? rest : kEmGroupRows;
    T* const log_prob = static_cast<T*>(a.rows) + b * in.n + first;
    T* const weights = log_prob + in.b * in.n;
    const T* const given = static_cast<const T*>(a.sample_weight);
    double likelihood = 0, weight = 0;
    for (int64_t r = threadIdx.x; r < rows; r += kThreads) {
      const T w = given ? given[b * a.sample_weight_stride + first + r] : T(1);
      weights[r] = w;
      if (w == T(0)) {
        log_prob[r] = -infinity<T>();
        continue;
      }
      likelihood += double(w) * double(log_prob[r]);
      weight += double(w);
    }
    parts[threadIdx.x] = likelihood;
    parts[kThreads + threadIdx.x] = weight;
    __syncthreads();
    if (threadIdx.x < 2) {
      double sum = 0;
      for (int i = 0; i < kThreads; ++i) sum += parts[threadIdx.x * kThreads + i];
      a.row_sums[2 * job + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

// 0 times whatever a component without rows holds is 0.
GMK_DEV double times(double a, double b) { return b == 0 ? 0.0 : a * b; }

// The sums of component c about the shift, from those about its mean. One component of full or tied; diag: `scale` is P.
template <class T>
struct Moments {
  const double* sums;  // statistics_of
  const double* shift;
  Parameters<T> p;
  int64_t c;

  GMK_HD_MEMBER double nk() const { return sums[0]; }
  GMK_HD_MEMBER double delta(int64_t f) const { return double(p.means[c * p.d + f]) - shift[f]; }
  // Sum of w t, t = x - mean.
  GMK_HD_MEMBER double own(int64_t f) const {
    const double s = sums[1 + f];
    return p.matrix() || s == 0 ? s : s / double(p.scale(c, f));
  }
  GMK_HD_MEMBER double first(int64_t f) const { return own(f) + times(delta(f), nk()); }
  GMK_HD_MEMBER double second(int64_t f, int64_t g) const {
    double s;
    if (p.matrix()) {
      s = sums[second_moment_at(p.d, f, g)];
    } else {
      s = sums[1 + p.d + f];
      if (s != 0) s /= double(p.scale(c, f)) * double(p.scale(c, f));
    }
    return s + times(delta(f), own(g)) + times(delta(g), own(f)) + times(delta(f), times(delta(g), nk()));
  }
};

// One thread is one of the numbers.
template <class T>
__global__ void __launch_bounds__(kThreads) gmm_em_sums_kernel(GmmEmStatistics a) {
  const GmmInputs& in = a.in;
  const int64_t k = in.k, d = in.d, count = statistics_of(in), numbers = em_numbers(k, d, in.covariance);
  const int64_t groups = (in.n + kEmGroupRows - 1) / kEmGroupRows;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < in.b * numbers;
       at += int64_t(gridDim.x) * kThreads) {
    const int64_t b = at / numbers;
    int64_t i = at % numbers;
    double sum = a.initial ? a.initial[at] : 0.0;
    if (i < 2) {
      for (int64_t g = 0; g < groups; ++g) sum += a.row_sums[2 * (b * groups + g) + i];
      a.sums[at] = sum;
      continue;
    }
    i -= 2;
    Moments<T> m = {a.slab_sums + b * k * count, a.used_shift + b * d, parameters<T>(in, b), 0};
    const auto component = [&](int64_t c) {
      m.sums += (c - m.c) * count;
      m.c = c;
    };
    if (i < k) {
      component(i);
      sum += m.nk();
    } else if (i < k + k * d) {
      component((i - k) / d);
      sum += m.first((i - k) % d);
    } else {
      i -= k + k * d;
      if (in.covariance == kFull) {
        component(i / (d * d));
        sum += m.second(i / d % d, i % d);
      } else if (in.covariance == kTied) {
        for (int64_t c = 0; c < k; ++c) {
          component(c);
          sum += m.second(i / d, i % d);
        }
      } else if (in.covariance == kDiag) {
        component(i / d);
        sum += m.second(i % d, i % d);
      } else {
        component(i);
        for (int64_t f = 0; f < d; ++f) sum += m.second(f, f);
      }
    }
    a.sums[at] = sum;
  }
}

// One thread is one component, and meets the rows of a tile one after the other: neighbours write neighbours.
template <class T>
__global__ void __launch_bounds__(kThreads, kAtLeast) gmm_responsibilities_kernel(GmmResponsibilities a) {
  const GmmInputs& in = a.in;
  const int64_t tiles = (in.n + kTileRows - 1) / kTileRows, groups = (in.k + kThreads - 1) / kThreads;
  for (int64_t job = blockIdx.x; job < in.b * tiles * groups; job += gridDim.x) {
    const int64_t b = job / groups / tiles, first = job / groups % tiles * kTileRows;
    const int64_t c = job % groups * kThreads + threadIdx.x;
    if (c >= in.k) continue;
    const Parameters<T> p = parameters<T>(in, b);
    const T own = constant(p, c);
    for (int64_t row = first; row < in.n && row < first + kTileRows; ++row) {
      const Row<T> x = {static_cast<const T*>(in.x) + b * in.x_stride + row * in.d, 1};
      const int64_t at = b * in.n + row;
      static_cast<T*>(a.out)[at * in.k + c] = weight(x, p, c, own, T(1), static_cast<const T*>(a.log_prob)[at]);
    }
  }
}

template <class T>
Status launch_responsibilities(const GmmResponsibilities& a, void* stream) {
  GmmLogProb forward{};
  forward.out = a.log_prob;
  forward.scratch = a.prepared;
  forward.scratch_bytes = a.prepared_bytes;
  forward.in = a.in;
  const Status status = gmm_row_log_prob(forward, stream);
  if (status) return status;
  const int64_t jobs = a.in.b * ((a.in.n + kTileRows - 1) / kTileRows) * ((a.in.k + kThreads - 1) / kThreads);
  return GMK_LAUNCH((gmm_responsibilities_kernel<T>), grid_for(jobs, 1), kThreads, 0, stream, a);
}

template <class T>
Status launch(const GmmEmStatistics& a, void* stream) {
  const GmmInputs& in = a.in;
  Status status = GMK_LAUNCH((gmm_em_shift_kernel<T>), grid_for(in.b * in.d, kThreads), kThreads, 0, stream, a);
  if (status) return status;
  if (in.n > 0) {
    GmmLogProb forward{};
    forward.out = a.rows;
    forward.scratch = a.prepared;
    forward.scratch_bytes = a.prepared_bytes;
    forward.in = in;
    status = gmm_row_log_prob(forward, stream);
    if (status) return status;
    const int64_t groups = (in.n + kEmGroupRows - 1) / kEmGroupRows;
    status = GMK_LAUNCH((gmm_em_rows_kernel<T>), grid_for(in.b * groups, 1), kThreads, 0, stream, a);
    if (status) return status;
  }
  GmmLogProbBackward sums{};
  sums.need_parameters = true;
  sums.log_prob = a.rows;
  sums.grad = static_cast<const T*>(a.rows) + in.b * in.n;
  sums.prepared = a.prepared;
  sums.prepared_bytes = a.prepared_bytes;
  sums.scratch = a.slab_sums;
  sums.in = in;
  status = gmm_row_sums(sums, a.slabs, stream);
  if (status) return status;
  const int64_t numbers = in.b * em_numbers(in.k, in.d, in.covariance);
  return GMK_LAUNCH((gmm_em_sums_kernel<T>), grid_for(numbers, kThreads), kThreads, 0, stream, a);
}

}  // namespace

Status gmm_em_statistics_cuda(const GmmEmStatistics& a, int device, void* stream) {
  if (a.in.b <= 0) return kOk;
  const DeviceGuard guard(device);
  return a.in.dtype == kFloat64 ? launch<double>(a, stream) : launch<float>(a, stream);
}

Status gmm_responsibilities_cuda(const GmmResponsibilities& a, int device, void* stream) {
  if (a.in.b <= 0 || a.in.n <= 0 || a.in.k <= 0) return kOk;
  const DeviceGuard guard(device);
  return a.in.dtype == kFloat64 ? launch_responsibilities<double>(a, stream)
                                : launch_responsibilities<float>(a, stream);
}

}  // namespace gmk
