// Fits of many small mixtures (gmm_fit.h): a block is a mixture, from its start to convergence, in float64. Its rows,
// responsibilities and parameters stay in shared memory where 40 KiB hold them (200 rows of 4, k = 3: 19 KiB), else in the
// block's part of a workspace. No block waits for another one, and the host for none.
//
//   a thread a row       densities and responsibilities; distances to centres
//   a warp a number      of the sums: lanes over the rows, then the 32 of them in the order of warp_sum
//   the block            the M-step (gmm_m_step.cuh)
// Every sum is taken in one order, whatever the GPU. Bound: per row and component d^2 / 2 multiply-adds for the density, as
// many again for the sums, and one exponential.
#include "gmm/gmm_fit.h"
#include "gmm/gmm_m_step.cuh"
#include "gmm/gmm_plain.cuh"
#include "gmm/gmm_sample.h"

namespace gmk {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int64_t kSharedBytes = 40 << 10;

// By more than rounding, as on the CPU.
GMK_DEV bool better(double now, double best) { return now - best > 1e-10 * (1 + fabs(best)); }

struct Solution {  // means about the shift
  double *weights, *log_weights, *means, *covariances, *precisions;
  int64_t* recovered;
  uint8_t* status;
  double log_likelihood;
  int64_t iterations;
  bool converged;
};

// A block's shared memory.
struct Common {
  double parts[kThreads];
  int64_t found;
  int odd;
};

// A block's memory and work. Every method is called by all threads, and ends with what it wrote visible to all.
struct Fitter {
  const GmmFit& a;
  Common& common;
  double* x;          // [d][n], about the shift; 0 where the weight is 0
  double* weight;     // [n]
  double* row;        // [n]: squared distance to the nearest pick; then the label
  double* r;          // [k][n]: responsibilities times weights
  double* sums;       // [em_numbers]: of gmm_em.h, about 0; of Lloyd, [k][d + 1]
  double* centres;    // [k][d]
  double* constants;  // [k]
  double *ridge, *heads, *shift, *zero, *factors;
  double total;  // weight of all rows
  Solution now, best;

  GMK_DEV Fitter(const GmmFit& args, Common& c, double* at) : a(args), common(c) {
    const int64_t n = a.n, k = a.k, d = a.d, matrices = covariance_numbers(k, d, a.covariance);
    const auto more = [&](int64_t count) {
      double* const p = at;
      at += count;
      return p;
    };
    x = more(n * d);
    weight = more(n);
    row = more(n);
    r = more(k * n);
    sums = more(em_numbers(k, d, a.covariance));
    centres = more(k * d);
    constants = more(k);
    ridge = more(k);
    heads = more(k);
    shift = more(d);
    zero = more(d);
    factors = more(2 * d * d);
    const auto place = [&](Solution& s) {
      s.weights = more(k);
      s.log_weights = more(k);
      s.means = more(k * d);
      s.covariances = more(matrices);
      s.precisions = more(matrices);
      s.recovered = reinterpret_cast<int64_t*>(more(k));
      s.status = reinterpret_cast<uint8_t*>(more(k));
    };
    place(now);
    place(best);
  }

  // The sum of all threads' values, the same in all of them.
  GMK_DEV double block_sum(double value) {
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) common.parts[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += common.parts[w];
    return sum;
  }
  // The sum of part(row), by one warp: its lanes take every 32nd.
  template <class F>
  GMK_DEV double over_rows(const F& part) const {
    double sum = 0;
    for (int64_t i = threadIdx.x % 32; i < a.n; i += 32) sum += part(i);
    return warp_sum(sum);
  }

  template <class T>
  GMK_DEV void load(int64_t b) {
    const T* const from = static_cast<const T*>(a.x) + b * a.x_stride;
    const T* const weights = a.sample_weight ? static_cast<const T*>(a.sample_weight) + b * a.weight_stride : nullptr;
    const int64_t n = a.n, d = a.d;
    __syncthreads();
    double own = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) own += weight[i] = weights ? double(weights[i]) : 1.0;
    total = block_sum(own);
    for (int64_t i = threadIdx.x; i < n * d; i += kThreads)
      x[i % d * n + i / d] = weight[i / d] != 0 ? double(from[i]) : 0.0;
    __syncthreads();
    for (int64_t f = threadIdx.x / 32; f < d; f += kWarps) {
      const double sum = over_rows([&](int64_t i) { return weight[i] * x[f * n + i]; });
      if (threadIdx.x % 32 == 0) {
        shift[f] = sum / total;
        zero[f] = 0;
      }
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n * d; i += kThreads)
      if (weight[i % n] != 0) x[i] -= shift[i / n];
    __syncthreads();
  }

  GMK_DEV double square_to(int64_t i, const double* centre) const {
    double sum = 0;
    for (int64_t f = 0; f < a.d; ++f) {
      const double t = x[f * a.n + i] - centre[f];
      sum += t * t;
    }
    return sum;
  }

  // The first row at which the weights (times `row`) so far exceed u of them all; with nothing to go by, the first row
  // with a weight. A thread has neighbouring rows.
  GMK_DEV int64_t choose(bool by_distance, double u) {
    const int64_t per = (a.n + kThreads - 1) / kThreads, first = threadIdx.x * per;
    const int64_t end = first + per < a.n ? first + per : a.n;
    const auto mass = [&](int64_t i) { return by_distance ? weight[i] * row[i] : weight[i]; };
    double own = 0;
    for (int64_t i = first; i < end; ++i) own += mass(i);
    __syncthreads();
    common.parts[threadIdx.x] = own;
    if (threadIdx.x == 0) common.found = -1;
    __syncthreads();
    double before = 0, all = 0;
    for (int t = 0; t < kThreads; ++t) {
      if (t == int(threadIdx.x)) before = all;
      all += common.parts[t];
    }
    const double at = u * all;
    if (before <= at && before + own > at) {  // of one thread
      int64_t last = first;                   // rounding may hide the step: then the last row that could be drawn
      double sum = before;
      for (int64_t i = first; i < end && sum <= at; ++i) {
        sum += mass(i);
        if (mass(i) > 0) last = i;
      }
      common.found = last;
    }
    __syncthreads();
    int64_t found = common.found;
    for (int64_t i = 0; found < 0 && i < a.n; ++i)
      if (weight[i] > 0) found = i;
    return found < 0 ? 0 : found;
  }
  GMK_DEV void take_centre(int64_t c, int64_t i) {
    __syncthreads();
    for (int64_t f = threadIdx.x; f < a.d; f += kThreads) centres[c * a.d + f] = x[f * a.n + i];
    __syncthreads();
  }

  // k-means++ as the CPU has it (gmm_fit_start.h). uniform(i): number i of this mixture.
  template <class F>
  GMK_DEV void pick(const F& uniform) {
    take_centre(0, choose(false, uniform(0)));
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads) row[i] = square_to(i, centres);
    for (int64_t c = 1; c < a.k; ++c) {
      double* const centre = centres + c * a.d;
      int64_t best_row = 0;
      double least = 0;
      __syncthreads();
      for (int64_t t = 0; t < a.candidates; ++t) {
        const int64_t candidate = choose(true, uniform(1 + (c - 1) * a.candidates + t));
        take_centre(c, candidate);
        double own = 0;
        for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
          const double square = square_to(i, centre);
          own += weight[i] * (square < row[i] ? square : row[i]);
        }
        const double left = block_sum(own);
        if (t && !(left < least)) continue;
        least = left;
        best_row = candidate;
      }
      take_centre(c, best_row);
      for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
        const double square = square_to(i, centre);
        if (square < row[i]) row[i] = square;
      }
    }
  }

  // The nearest centre of every row, of equally near ones the first, to `row`; did any change?
  GMK_DEV bool assign(bool first_time) {
    __syncthreads();
    if (threadIdx.x == 0) common.odd = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
      int64_t label = 0;
      double least = square_to(i, centres);
      for (int64_t c = 1; c < a.k; ++c) {
        const double square = square_to(i, centres + c * a.d);
        if (square < least) {
          least = square;
          label = c;
        }
      }
      if (!first_time && row[i] != double(label)) atomicMax(&common.odd, 1);
      row[i] = double(label);
    }
    __syncthreads();
    return common.odd != 0;
  }
  GMK_DEV void move_centres() {  // an empty one stays
    const int64_t d = a.d, numbers = a.k * (d + 1);
    for (int64_t e = threadIdx.x / 32; e < numbers; e += kWarps) {
      const int64_t c = e / (d + 1), f = e % (d + 1);
      const double sum =
          over_rows([&](int64_t i) { return row[i] == double(c) ? weight[i] * (f < d ? x[f * a.n + i] : 1.0) : 0.0; });
      if (threadIdx.x % 32 == 0) sums[e] = sum;
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; e < a.k * d; e += kThreads) {
      const double* const own = sums + e / d * (d + 1);
      if (own[d] > 0) centres[e] = own[e % d] / own[d];
    }
  }
  GMK_DEV void lloyd() {
    assign(true);
    for (int64_t round = 0; round < a.rounds; ++round) {
      move_centres();
      if (!assign(false)) break;
    }
  }

  // The sums under r. [0] and [1] of them are the caller's business, and nobody's.
  GMK_DEV void add_rows() {
    const int64_t n = a.n, k = a.k, d = a.d, numbers = k + k * d + covariance_numbers(k, d, a.covariance);
    __syncthreads();
    for (int64_t e = threadIdx.x / 32; e < numbers; e += kWarps) {
      const int64_t rest = e - k - k * d;
      double sum;
      int64_t twin = e;  // of a symmetric matrix
      if (e < k) {
        sum = over_rows([&](int64_t i) { return r[e * n + i]; });
      } else if (rest < 0) {
        const int64_t c = (e - k) / d, f = (e - k) % d;
        sum = over_rows([&](int64_t i) { return r[c * n + i] * x[f * n + i]; });
      } else if (a.covariance == kSpherical) {
        sum = over_rows([&](int64_t i) {
          double square = 0;
          for (int64_t f = 0; f < d; ++f) square += x[f * n + i] * x[f * n + i];
          return r[rest * n + i] * square;
        });
      } else if (a.covariance == kDiag) {
        const int64_t c = rest / d, f = rest % d;
        sum = over_rows([&](int64_t i) { return r[c * n + i] * x[f * n + i] * x[f * n + i]; });
      } else {
        const int64_t c = rest / (d * d), f = rest / d % d, g = rest % d;
        if (f > g) continue;
        twin = e + (g - f) * (d - 1);
        if (a.covariance == kFull)
          sum = over_rows([&](int64_t i) { return r[c * n + i] * x[f * n + i] * x[g * n + i]; });
        else
          sum = over_rows([&](int64_t i) {
            double w = 0;
            for (int64_t own = 0; own < k; ++own) w += r[own * n + i];
            return w * x[f * n + i] * x[g * n + i];
          });
      }
      if (threadIdx.x % 32 == 0) sums[2 + e] = sums[2 + twin] = sum;
    }
    __syncthreads();
  }

  // Responsibilities and sums under `now`; the log-likelihood of the mean row.
  GMK_DEV double expectation() {
    Parameters<double> p;
    p.log_weights = now.log_weights;
    p.means = now.means;
    p.precisions = now.precisions;
    p.k = a.k;
    p.d = a.d;
    p.covariance = a.covariance;
    __syncthreads();
    for (int64_t c = threadIdx.x; c < a.k; c += kThreads) constants[c] = constant(p, c);
    __syncthreads();
    double own = 0;
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
      const double w = weight[i];
      double top = -infinity<double>(), sum = 0;
      for (int64_t c = 0; c < a.k; ++c) {
        double& density = r[c * a.n + i];
        density = constants[c];
        if (w == 0 || density == -infinity<double>()) continue;
        density -= 0.5 * square_distance(Row<double>{x + i, a.n}, p, c);
        top = density > top ? density : top;
      }
      const bool counts = w != 0 && top > -infinity<double>();
      for (int64_t c = 0; c < a.k; ++c) {
        double& density = r[c * a.n + i];
        density = counts ? exp(density - top) : 0.0;
        sum += density;
      }
      for (int64_t c = 0; counts && c < a.k; ++c) r[c * a.n + i] *= w / sum;
      if (w != 0) own += w * (top + log(sum));
    }
    const double likelihood = block_sum(own);
    add_rows();
    return likelihood / total;
  }

  GMK_DEV bool maximisation() {  // is the mixture finite?
    GmmMStep m{};
    m.weights = now.weights;
    m.log_weights = now.log_weights;
    m.means = now.means;
    m.covariances = now.covariances;
    m.precisions = now.precisions;
    m.status = now.status;
    m.sums = sums;
    m.shift = zero;
    m.b = 1;
    m.k = a.k;
    m.d = a.d;
    m.covariance = a.covariance;
    m.reg_covar = a.reg_covar;
    m.dtype = kFloat64;
    const View v = view(m, 0);
    begin<double>(m, v, 0, ridge, Block{});
    __syncthreads();
    const int64_t matrices = a.covariance == kFull ? a.k : a.covariance == kTied ? 1 : 0;
    for (int64_t c = 0; c < matrices; ++c)
      if (a.covariance == kTied ? !v.nothing : !dead(v, c))
        make_matrix<double>(m, v, 0, c, ridge[c], factors, factors + a.d * a.d, common.odd);
    __syncthreads();
    finish<double>(m, v, 0, heads, Block{});
    __syncthreads();
    bool fine = true;
    for (int64_t c = 0; c < a.k; ++c) fine = fine && now.status[c] != kNotFinite;
    for (int64_t c = threadIdx.x; c < a.k; c += kThreads)
      now.recovered[c] += now.status[c] == kDead || now.status[c] == kSingular;
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
      now.log_weights[c] = double(log_weights[c]) - log(sum);
      now.weights[c] = exp(now.log_weights[c]);
      now.status[c] = kHealthy;
    }
    for (int64_t e = threadIdx.x; e < k * d; e += kThreads) now.means[e] = double(means[e]) - shift[e % d];
    const bool matrix = a.covariance <= kTied;
    for (int64_t e = threadIdx.x; e < numbers; e += kThreads) {
      const double p = matrix && e / d % d > e % d ? 0.0 : double(precisions[e]);
      now.precisions[e] = p;
      if (!matrix) now.covariances[e] = 1 / (p * p);
    }
    __syncthreads();
    if (matrix && a.max_iter == 0) invert_precisions(numbers);
  }
  // The covariances, where no M-step will make them: Sigma = P^-T P^-1, a thread a column of P^-1.
  GMK_DEV void invert_precisions(int64_t numbers) {
    const int64_t d = a.d;
    for (int64_t at = 0; at < numbers; at += d * d) {
      const double* const p = now.precisions + at;
      for (int64_t j = threadIdx.x; j < d; j += kThreads)
        for (int64_t i = d - 1; i >= 0; --i) {
          double sum = i == j ? 1.0 : 0.0;
          for (int64_t e = i + 1; e <= j; ++e) sum -= p[i * d + e] * factors[e * d + j];
          factors[i * d + j] = i <= j ? sum / p[i * d + i] : 0.0;
        }
      __syncthreads();
      for (int64_t e = threadIdx.x; e < d * d; e += kThreads) {
        double sum = 0;
        for (int64_t i = 0; i < d; ++i) sum += factors[i * d + e / d] * factors[i * d + e % d];
        now.covariances[at + e] = sum;
      }
      __syncthreads();
    }
  }

  // The first mixture; is it finite? `run`: the number of the start.
  template <class T>
  GMK_DEV bool start(int64_t b, int64_t run) {
    const int64_t n = a.n, k = a.k, d = a.d;
    for (int64_t c = threadIdx.x; c < k; c += kThreads) now.recovered[c] = 0;
    if (a.start_log_weights) {
      start_given<T>(b);
      return true;
    }
    if (a.responsibilities) {
      const T* const from = static_cast<const T*>(a.responsibilities) + b * a.responsibilities_stride;
      for (int64_t i = threadIdx.x; i < n; i += kThreads) {
        double sum = 0;
        for (int64_t c = 0; weight[i] != 0 && c < k; ++c) sum += double(from[i * k + c]);
        for (int64_t c = 0; c < k; ++c) r[c * n + i] = sum == 0 ? 0.0 : double(from[i * k + c]) / sum * weight[i];
      }
    } else {
      if (a.start_means) {
        const T* const from = static_cast<const T*>(a.start_means) + b * a.start_means_stride;
        for (int64_t e = threadIdx.x; e < k * d; e += kThreads) centres[e] = double(from[e]) - shift[e % d];
      } else {
        const bool own = a.seed_rows > 1;
        const PhiloxKey key = philox_key(a.seeds ? uint64_t(a.seeds[own ? b : 0]) : a.seed);
        const uint64_t begin = own ? 0 : uint64_t(b) * uint64_t(1 + (k - 1) * a.candidates);
        pick([&](int64_t i) {
          const uint64_t e = begin + uint64_t(i);
          return component_uniform(philox(e / 4, uint32_t(run), kStreamGmmFit, key).w[e % 4]);
        });
      }
      lloyd();
      for (int64_t e = threadIdx.x; e < k * n; e += kThreads) r[e] = row[e % n] == double(e / n) ? weight[e % n] : 0.0;
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
        static_cast<T*>(to)[b * count + e] = fine ? T(shifted ? numbers[e] + shift[e % d] : numbers[e]) : T(NAN);
    };
    __syncthreads();
    put(a.weights, best.weights, k, false);
    put(a.log_weights, best.log_weights, k, false);
    put(a.means, best.means, k * d, true);
    put(a.covariances, best.covariances, covariance_numbers(k, d, a.covariance), false);
    put(a.precisions, best.precisions, covariance_numbers(k, d, a.covariance), false);
    for (int64_t c = threadIdx.x; c < k; c += kThreads) {
      a.status[b * k + c] = fine ? best.status[c] : uint8_t(kNotFinite);
      a.recovered[b * k + c] = best.recovered[c];
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
      const Solution swap = best;
      best = now;
      now = swap;
    }
    write<T>(b, fine);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) gmm_fit_kernel(GmmFit a, int shared) {
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
