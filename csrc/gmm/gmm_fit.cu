// Fits of many small mixtures (gmm_fit.h): a block is a mixture, from its start to convergence, in float64. Its rows,
// responsibilities and parameters stay in shared memory where 40 KiB hold them (200 rows of 4, k = 3: 19 KiB), else in the
// block's part of a workspace. No block waits for another one, and the host for none.
//
//   a thread a row       densities and responsibilities; distances to centres
//   a warp a number      of the sums: lanes over the rows, then the 32 of them in the order of warp_sum
//   the block            the M-step (gmm_m_step.cuh)
// Every sum is taken in one order, whatever the GPU. Bound: per row and component d^2 / 2 multiply-adds for the density, as
// many again for the sums, and one exponential.
#include "gmm/gmm_fit_start.cuh"

namespace gmk {
namespace {

constexpr int kResident = 4;  // blocks of a multiprocessor, at least: 128 registers, without spills
constexpr int64_t kSharedBytes = 40 << 10;

// By more than rounding, as on the CPU.
GMK_DEV bool better(double now, double best) { return now - best > 1e-10 * (1 + fabs(best)); }

struct Progress {
  double log_likelihood;
  int64_t iterations;
  bool converged;
};

// A block's work. Every method is called by all threads.
struct Fitter : Starter {
  Progress now, best;

  using Starter::Starter;

  // The sums under r. [0] and [1] of them are the caller's business, and nobody's.
  GMK_DEV void add_rows() {
    const int64_t n = a.n, k = a.k, d = a.d, numbers = k + k * d + covariance_numbers(k, d, a.covariance);
    __syncthreads();
    for (int64_t e = threadIdx.x / 32; e < numbers; e += kWarps) {
      const int64_t rest = e - k - k * d;
      double sum;
      int64_t twin = e;  // of a symmetric matrix
      if (e < k) {
        sum = over_rows([&](int64_t i) { return m.r[e * n + i]; });
      } else if (rest < 0) {
        const int64_t c = (e - k) / d, f = (e - k) % d;
        sum = over_rows([&](int64_t i) { return m.r[c * n + i] * m.x[f * n + i]; });
      } else if (a.covariance == kSpherical) {
        sum = over_rows([&](int64_t i) {
          double square = 0;
          for (int64_t f = 0; f < d; ++f) square += m.x[f * n + i] * m.x[f * n + i];
          return m.r[rest * n + i] * square;
        });
      } else if (a.covariance == kDiag) {
        const int64_t c = rest / d, f = rest % d;
        sum = over_rows([&](int64_t i) { return m.r[c * n + i] * m.x[f * n + i] * m.x[f * n + i]; });
      } else {
        const int64_t c = rest / (d * d), f = rest / d % d, g = rest % d;
        if (f > g) continue;
        twin = e + (g - f) * (d - 1);
        if (a.covariance == kFull)
          sum = over_rows([&](int64_t i) { return m.r[c * n + i] * m.x[f * n + i] * m.x[g * n + i]; });
        else
          sum = over_rows([&](int64_t i) {
            double w = 0;
            for (int64_t own = 0; own < k; ++own) w += m.r[own * n + i];
            return w * m.x[f * n + i] * m.x[g * n + i];
          });
      }
      if (threadIdx.x % 32 == 0) m.sums[2 + e] = m.sums[2 + twin] = sum;
    }
    __syncthreads();
  }

  // Responsibilities and sums under `now`; the log-likelihood of the mean row.
  GMK_DEV double expectation() {
    Parameters<double> p;
    p.log_weights = m.now.log_weights;
    p.means = m.now.means;
    p.precisions = m.now.precisions;
    p.k = a.k;
    p.d = a.d;
    p.covariance = a.covariance;
    __syncthreads();
    for (int64_t c = threadIdx.x; c < a.k; c += kThreads) m.constants[c] = constant(p, c);
    __syncthreads();
    double own = 0;
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
      const double w = m.weight[i];
      double top = -infinity<double>(), sum = 0;
      for (int64_t c = 0; c < a.k; ++c) {
        double& density = m.r[c * a.n + i];
        density = m.constants[c];
        if (w == 0 || density == -infinity<double>()) continue;
        density -= 0.5 * square_distance(Row<double>{m.x + i, a.n}, p, c);
        top = density > top ? density : top;
      }
      const bool counts = w != 0 && top > -infinity<double>();
      for (int64_t c = 0; c < a.k; ++c) {
        double& density = m.r[c * a.n + i];
        density = counts ? exp(density - top) : 0.0;
        sum += density;
      }
      for (int64_t c = 0; counts && c < a.k; ++c) m.r[c * a.n + i] *= w / sum;
      if (w != 0) own += w * (top + log(sum));
    }
    const double likelihood = block_sum<kWarps>(own, common.parts);
    add_rows();
    return likelihood / total;
  }

  GMK_DEV bool maximisation() {  // is the mixture finite?
    GmmMStep& step = common.step;
    __syncthreads();
    if (threadIdx.x == 0) {
      step = GmmMStep{};
      step.weights = m.now.weights;
      step.log_weights = m.now.log_weights;
      step.means = m.now.means;
      step.covariances = m.now.covariances;
      step.precisions = m.now.precisions;
      step.status = m.now.status;
      step.sums = m.sums;
      step.shift = m.zero;
      step.b = 1;
      step.k = a.k;
      step.d = a.d;
      step.covariance = a.covariance;
      step.reg_covar = a.reg_covar;
      step.dtype = kFloat64;
    }
    __syncthreads();
    const View v = view(step, 0);
    begin<double>(step, v, 0, m.ridge, Block{});
    __syncthreads();
    const int64_t matrices = a.covariance == kFull ? a.k : a.covariance == kTied ? 1 : 0;
    for (int64_t c = 0; c < matrices; ++c)
      if (a.covariance == kTied ? !v.nothing : !dead(v, c))
        make_matrix<double>(step, v, 0, c, m.ridge[c], m.factors, m.factors + a.d * a.d, common.odd);
    __syncthreads();
    finish<double>(step, v, 0, m.heads, Block{});
    __syncthreads();
    bool fine = true;
    for (int64_t c = 0; c < a.k; ++c) fine = fine && m.now.status[c] != kNotFinite;
    for (int64_t c = threadIdx.x; c < a.k; c += kThreads)
      m.now.recovered[c] += m.now.status[c] == kDead || m.now.status[c] == kSingular;
    return fine;
  }

  // The given mixture, its weights normalised.
  template <class T>
  GMK_DEV void start_given(int64_t b) {
    const int64_t k = a.k, d = a.d, numbers = covariance_numbers(k, d, a.covariance);
    const T* const log_weights = static_cast<const T*>(a.start_log_weights) + b * a.start_log_weights_stride;
    const T* const means = static_cast<const T*>(a.start_means) + b * a.start_means_stride;
    const T* const precisions = static_cast<const T*>(a.start_precisions) + b * a.start_precisions_stride;
    double sum = 0;
    for (int64_t c = 0; c < k; ++c) sum += exp(double(log_weights[c]));
    for (int64_t c = threadIdx.x; c < k; c += kThreads) {
      m.now.log_weights[c] = double(log_weights[c]) - log(sum);
      m.now.weights[c] = exp(m.now.log_weights[c]);
      m.now.status[c] = kHealthy;
    }
    for (int64_t e = threadIdx.x; e < k * d; e += kThreads) m.now.means[e] = double(means[e]) - m.shift[e % d];
    const bool matrix = a.covariance <= kTied;
    for (int64_t e = threadIdx.x; e < numbers; e += kThreads) {
      const double p = matrix && e / d % d > e % d ? 0.0 : double(precisions[e]);
      m.now.precisions[e] = p;
      if (!matrix) m.now.covariances[e] = 1 / (p * p);
    }
    __syncthreads();
    if (matrix && a.max_iter == 0) invert_precisions(numbers);
  }
  // The covariances, where no M-step will make them: Sigma = P^-T P^-1, a thread a column of P^-1.
  GMK_DEV void invert_precisions(int64_t numbers) {
    const int64_t d = a.d;
    for (int64_t at = 0; at < numbers; at += d * d) {
      const double* const p = m.now.precisions + at;
      for (int64_t j = threadIdx.x; j < d; j += kThreads)
        for (int64_t i = d - 1; i >= 0; --i) {
          double sum = i == j ? 1.0 : 0.0;
          for (int64_t e = i + 1; e <= j; ++e) sum -= p[i * d + e] * m.factors[e * d + j];
          m.factors[i * d + j] = i <= j ? sum / p[i * d + i] : 0.0;
        }
      __syncthreads();
      for (int64_t e = threadIdx.x; e < d * d; e += kThreads) {
        double sum = 0;
        for (int64_t i = 0; i < d; ++i) sum += m.factors[i * d + e / d] * m.factors[i * d + e % d];
        m.now.covariances[at + e] = sum;
      }
      __syncthreads();
    }
  }

  // The first mixture; is it finite? `run`: the number of the start.
  template <class T>
  GMK_DEV bool start(int64_t b, int64_t run) {
    const int64_t n = a.n, k = a.k, d = a.d;
    for (int64_t c = threadIdx.x; c < k; c += kThreads) m.now.recovered[c] = 0;
    if (a.start_log_weights) {
      start_given<T>(b);
      return true;
    }
    if (a.responsibilities) {
      const T* const from = static_cast<const T*>(a.responsibilities) + b * a.responsibilities_stride;
      for (int64_t i = threadIdx.x; i < n; i += kThreads) {
        double sum = 0;
        for (int64_t c = 0; m.weight[i] != 0 && c < k; ++c) sum += double(from[i * k + c]);
        for (int64_t c = 0; c < k; ++c) m.r[c * n + i] = sum == 0 ? 0.0 : double(from[i * k + c]) / sum * m.weight[i];
      }
    } else {
      if (a.start_means) {
        const T* const from = static_cast<const T*>(a.start_means) + b * a.start_means_stride;
        for (int64_t e = threadIdx.x; e < k * d; e += kThreads) m.centres[e] = double(from[e]) - m.shift[e % d];
      } else {
        const bool own = a.seed_rows > 1;
        const PhiloxKey key = philox_key(a.seeds ? uint64_t(a.seeds[own ? b : 0]) : a.seed);
        const uint64_t begin = own ? 0 : uint64_t(b) * uint64_t(1 + (k - 1) * a.candidates);
        pick([&](int64_t i) {
          const uint64_t e = begin + uint64_t(i);
          const PhiloxWords words = philox(e / 4, uint32_t(run), kStreamGmmFit, key);
          const uint32_t low = e & 1 ? words.w[1] : words.w[0], high = e & 1 ? words.w[3] : words.w[2];
          return component_uniform(e & 2 ? high : low);
        });
      }
      lloyd();
      for (int64_t e = threadIdx.x; e < k * n; e += kThreads)
        m.r[e] = m.row[e % n] == double(e / n) ? m.weight[e % n] : 0.0;
    }
    add_rows();
    return maximisation();
  }

  template <class T>
  GMK_DEV bool iterate(int64_t b, int64_t run) {  // is the result finite?
    now.log_likelihood = -infinity<double>();
    now.iterations = 0;
    now.converged = false;
    if (!start<T>(b, run)) return false;
    while (now.iterations < a.max_iter && !now.converged) {
      const double before = now.log_likelihood;
      now.log_likelihood = expectation();
      ++now.iterations;
      if (!finite(now.log_likelihood) || !maximisation()) return false;
      const double change = now.log_likelihood - before;
      now.converged = change < a.tol && change > -a.tol;
    }
    return true;
  }

  template <class T>
  GMK_DEV void write(int64_t b, bool fine) {
    const int64_t k = a.k, d = a.d;
    const auto put = [&](void* to, const double* numbers, int64_t count, bool shifted) {
      for (int64_t e = threadIdx.x; e < count; e += kThreads)
        static_cast<T*>(to)[b * count + e] = fine ? T(shifted ? numbers[e] + m.shift[e % d] : numbers[e]) : T(NAN);
    };
    __syncthreads();
    put(a.weights, m.best.weights, k, false);
    put(a.log_weights, m.best.log_weights, k, false);
    put(a.means, m.best.means, k * d, true);
    put(a.covariances, m.best.covariances, covariance_numbers(k, d, a.covariance), false);
    put(a.precisions, m.best.precisions, covariance_numbers(k, d, a.covariance), false);
    for (int64_t c = threadIdx.x; c < k; c += kThreads) {
      a.status[b * k + c] = fine ? m.best.status[c] : uint8_t(kNotFinite);
      a.recovered[b * k + c] = m.best.recovered[c];
    }
    if (threadIdx.x == 0) {
      a.log_likelihood[b] = fine ? best.log_likelihood : NAN;
      a.iterations[b] = best.iterations;
      a.converged[b] = best.converged && fine;
    }
    __syncthreads();
  }

  template <class T>
  GMK_DEV void run(int64_t b) {
    load<T>(b);
    bool fine = true;
    for (int64_t turn = 0; turn < a.n_init && fine; ++turn) {
      fine = iterate<T>(b, turn);
      if (turn && fine && !better(now.log_likelihood, best.log_likelihood)) continue;
      best = now;
      __syncthreads();
      if (threadIdx.x == 0) {
        const Mixture swap = m.best;
        m.best = m.now;
        m.now = swap;
      }
      __syncthreads();
    }
    write<T>(b, fine);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kResident) gmm_fit_kernel(GmmFit a, int shared) {
  GMK_DYN_SHARED(bytes);
  GMK_SHARED(common, Common);
  Fitter fitter(a, common, shared ? reinterpret_cast<double*>(bytes) : a.workspace + blockIdx.x * a.block_numbers);
  for (int64_t b = blockIdx.x; b < a.b; b += gridDim.x) fitter.run<T>(b);
}

template <class T>
Status launch(const GmmFit& a, void* stream) {
  const int64_t bytes = a.block_numbers * int64_t(sizeof(double));
  const bool shared = !a.workspace;
  if (a.block_numbers < fit_numbers(a) || (shared && bytes > kSharedBytes)) return "the workspace is too small";
  return GMK_LAUNCH((gmm_fit_kernel<T>), grid_for(shared ? a.b : a.blocks, 1), kThreads, shared ? size_t(bytes) : 0,
                    stream, a, int(shared));
}

}  // namespace

Status gmm_fit_cuda(const GmmFit& a, int device, void* stream) {
  if (a.b <= 0) return kOk;
  const DeviceGuard guard(device);
  return a.dtype == kFloat64 ? launch<double>(a, stream) : launch<float>(a, stream);
}

}  // namespace gmk
