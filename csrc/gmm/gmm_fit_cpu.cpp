// Fits of many small mixtures: one mixture is one task, and all that it needs (rows, responsibilities, parameters) stays
// in the cache of one thread from start to convergence. Bound: the E-step's multiply-adds and exponentials, float64.
#include <omp.h>

#include "gmm/gmm_em_group.h"
#include "gmm/gmm_fit.h"
#include "gmm/gmm_fit_start.h"
#include "gmm/gmm_m_step.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int64_t kFeatureBytes = 192 << 10;  // kept for all iterations where they are no more: they stay in L2

// By more than rounding: two starts that find the same mixture, its components in another order, are equal.
static bool better(double now, double best) { return now - best > 1e-10 * (1 + fabs(best)); }

struct Solution {  // means about FitRows::shift
  double *weights, *log_weights, *means, *covariances, *precisions;
  int64_t* recovered;
  uint8_t* status;
  double log_likelihood;
  int64_t iterations;
  bool converged;
};

// One thread's memory and work. `narrow`: of the sums (gmm_em_sums.h).
template <bool narrow>
struct Fitter {
  using W = Worker<double, double, narrow>;
  const GmmFit& a;
  GmmInputs in{};  // sizes; parameters: those of `now`
  Sums s;
  int64_t matrix_numbers;
  W w;
  FitRows data;
  KMeans means;
  double *slot, *sums, *zero, *ridge, *heads, *matrix_scratch;
  int64_t feature_rows;  // [padded / rows][feature][rows], or 0: they are made anew in every E-step
  double* features;
  Solution now, best;

  explicit Fitter(const GmmFit& args) : a(args) {
    in.b = 1;
    in.n = a.n;
    in.k = a.k;
    in.d = a.d;
    in.dtype = kFloat64;
    in.covariance = a.covariance;
    s = sums_of<double>(in);
    matrix_numbers = covariance_numbers(a.k, a.d, a.covariance);
    data.n = a.n;
    data.d = a.d;
    data.rows = W::rows;
    data.padded = (a.n + W::rows - 1) / W::rows * W::rows;
    feature_rows = s.linear + s.shared;
    if (feature_rows * data.padded * int64_t(sizeof(double)) > kFeatureBytes) feature_rows = 0;
    means.data = &data;
    means.k = a.k;
  }
  Fitter(const Fitter&) = delete;

  // Where everything lies behind `at` (null: nowhere yet); doubles in all.
  int64_t take(double* at) {
    int64_t used = 0;
    const auto more = [&](int64_t count) {
      double* const p = at ? at + used : nullptr;
      used += (count + 15) / 16 * 16;
      return p;
    };
    const int64_t k = a.k, d = a.d;
    double* const tiles = more(W::numbers_t(in));
    double* const sums_scratch = more(W::numbers_a(s));
    features = more(feature_rows * data.padded);
    slot = more(s.numbers());
    sums = more(em_numbers(k, d, a.covariance));
    zero = more(d);
    ridge = more(k);
    heads = more(k);
    matrix_scratch = more(matrices_scratch(d, a.covariance));
    data.x = more(data.padded * d);
    data.weight = more(data.padded);
    data.shift = more(d);
    means.centres = more(k * d);
    means.nearest = more(data.padded);
    means.trial = more(data.padded);
    means.least = more(data.padded);
    means.sums = more(k * (d + 1));
    means.labels = reinterpret_cast<int64_t*>(more(data.padded));
    const auto place = [&](Solution& p) {
      p.weights = more(k);
      p.log_weights = more(k);
      p.means = more(k * d);
      p.covariances = more(matrix_numbers);
      p.precisions = more(matrix_numbers);
      p.recovered = reinterpret_cast<int64_t*>(more(k));
      p.status = reinterpret_cast<uint8_t*>(more((k + 7) / 8));
    };
    place(now);
    place(best);
    if (!at) return used;
    w.take(in, s, tiles, sums_scratch);
    for (int row = 0; row < W::rows; ++row) w.block.alive[row] = 1;
    for (int64_t f = 0; f < d; ++f) zero[f] = 0;
    return used;
  }

  void use_block(int64_t first) {
    w.block.x = data.x + first * a.d;
    memcpy(w.block.weight, data.weight + first, sizeof w.block.weight);
    constexpr int64_t lanes = simd<double>::n;
    const int64_t rest = (a.n - first + lanes - 1) / lanes * lanes;
    w.block.used = int(rest < W::rows ? rest : W::rows);
  }
  struct Keep {
    double* to;
    double* next() { return (to += W::rows) - W::rows; }
    void turn_to_shared() {}
  };
  void keep_features() {
    if (!feature_rows) return;
    Keep out{features};
    double* const t = w.t;
    for (int64_t first = 0; first < data.padded; first += W::rows) {
      w.t = data.x + first * a.d;
      w.form_features(s, out);
    }
    w.t = t;
  }
  void add_block(int64_t first) {
    if (!feature_rows) return w.add_block(s, zero, slot);
    const double* const from = w.final_responsibilities(s);
    const double* const own = features + first * feature_rows;
    w.add_linear(s, slot, from, own, 0, s.linear);
    if (!s.shared) return;
    w.weigh_rows(s);
    w.add_shared(own + s.linear * W::rows, 0, s.shared);
  }

  // The sums under `now`; the log-likelihood of the mean row.
  double expectation() {
    in.log_weights = now.log_weights;
    in.means = now.means;
    in.precisions = now.precisions;
    const bool matrix = matrix_covariance(a.covariance);
    const Mixture<double> m = prepare<double>(in, 0, w.mixture);
    w.begin_sums(s, slot);
    for (int64_t first = 0; first < data.padded; first += W::rows) {
      use_block(first);
      w.block.densities(m, matrix);
      w.block.softmax(a.k, a.d, kNegligible<double>);
      add_block(first);
    }
    return w.end_sums(s, slot) / data.total;
  }
  // The sums under responsibilities: fill(e [k][rows], scale, first row of the block).
  template <class F>
  void expectation_of(const F& fill) {
    w.begin_sums(s, slot);
    for (int64_t first = 0; first < data.padded; first += W::rows) {
      use_block(first);
      memcpy(w.block.scale, w.block.weight, sizeof w.block.weight);
      fill(w.block.e, w.block.scale, first);
      add_block(first);
    }
    w.end_sums(s, slot);
  }

  bool maximisation() {  // is the mixture finite?
    unpack(sums, slot, s, 0, a.k);
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
    constexpr int64_t lanes = simd<double>::n;
    const int64_t all = a.covariance == kTied ? 1 : a.k;
    begin<double>(m, v, 0, ridge);
    if (matrix_covariance(a.covariance))
      for (int64_t q = 0; q < all; q += lanes)
        matrices<double>(m, ridge, q, all - q < lanes ? all - q : lanes, matrix_scratch);
    finish<double>(m, v, 0, heads);
    bool finite = true;
    for (int64_t c = 0; c < a.k; ++c) {
      finite &= now.status[c] != kNotFinite;
      now.recovered[c] += now.status[c] == kDead || now.status[c] == kSingular;
    }
    return finite;
  }

  template <class T>
  void start_given(int64_t b) {
    const int64_t k = a.k, d = a.d;
    const T* const log_weights = (const T*)a.start_log_weights + b * a.start_log_weights_stride;
    const T* const centres = (const T*)a.start_means + b * a.start_means_stride;
    const T* const precisions = (const T*)a.start_precisions + b * a.start_precisions_stride;
    double total = 0;
    for (int64_t c = 0; c < k; ++c) total += exp(double(log_weights[c]));
    for (int64_t c = 0; c < k; ++c) {
      now.log_weights[c] = double(log_weights[c]) - log(total);
      now.weights[c] = exp(now.log_weights[c]);
      now.status[c] = kHealthy;
      for (int64_t f = 0; f < d; ++f) now.means[c * d + f] = double(centres[c * d + f]) - data.shift[f];
    }
    for (int64_t i = 0; i < matrix_numbers; ++i) now.precisions[i] = double(precisions[i]);
    if (a.max_iter == 0) invert_start();
  }
  // The covariances of `now` from its precisions, where no M-step will make them: Sigma = P^-T P^-1.
  void invert_start() {
    const int64_t d = a.d;
    if (!matrix_covariance(a.covariance)) {
      for (int64_t i = 0; i < matrix_numbers; ++i) now.covariances[i] = 1 / (now.precisions[i] * now.precisions[i]);
      return;
    }
    double* const inverse = matrix_scratch;  // of P: upper triangle
    for (int64_t at = 0; at < matrix_numbers; at += d * d) {
      double* const p = now.precisions + at;
      for (int64_t j = 0; j < d; ++j) {
        for (int64_t i = j + 1; i < d; ++i) p[i * d + j] = 0;
        for (int64_t i = d - 1; i >= 0; --i) {
          double sum = i == j;
          for (int64_t e = i + 1; e <= j; ++e) sum -= p[i * d + e] * inverse[e * d + j];
          inverse[i * d + j] = i <= j ? sum / p[i * d + i] : 0;
        }
      }
      for (int64_t i = 0; i < d; ++i)
        for (int64_t j = 0; j < d; ++j) {
          double sum = 0;
          for (int64_t e = 0; e < d; ++e) sum += inverse[e * d + i] * inverse[e * d + j];
          now.covariances[at + i * d + j] = sum;
        }
    }
  }

  template <class T>
  bool start(int64_t b, int64_t run) {
    for (int64_t c = 0; c < a.k; ++c) now.recovered[c] = 0;
    if (a.start_log_weights) {
      start_given<T>(b);
      return true;
    }
    if (a.responsibilities) {
      const T* const from = (const T*)a.responsibilities + b * a.responsibilities_stride;
      expectation_of([&](double* e, double* scale, int64_t first) {
        for (int row = 0; row < W::rows; ++row) {
          const T* const own = from + (first + row) * a.k;
          double sum = 0;
          const bool counts = w.block.weight[row] != 0;
          for (int64_t c = 0; counts && c < a.k; ++c) sum += double(own[c]);
          if (sum == 0) scale[row] = 0;
          for (int64_t c = 0; c < a.k; ++c) e[c * W::rows + row] = sum == 0 ? 0 : double(own[c]) / sum;
        }
      });
      return maximisation();
    }
    if (a.start_means) {
      const T* const from = (const T*)a.start_means + b * a.start_means_stride;
      for (int64_t i = 0; i < a.k * a.d; ++i) means.centres[i] = double(from[i]) - data.shift[i % a.d];
    } else {
      const bool own = a.seed_rows > 1;
      const PhiloxKey key = philox_key(a.seeds ? uint64_t(a.seeds[own ? b : 0]) : a.seed);
      const uint64_t begin = own ? 0 : uint64_t(b) * uint64_t(1 + (a.k - 1) * a.candidates);
      means.pick(a.candidates, [&](int64_t i) {
        const uint64_t e = begin + uint64_t(i);
        return component_uniform(philox(e / 4, uint32_t(run), kStreamGmmFit, key).w[e % 4]);
      });
    }
    means.lloyd(a.rounds);
    expectation_of([&](double* e, double*, int64_t first) {
      for (int64_t c = 0; c < a.k; ++c)
        for (int row = 0; row < W::rows; ++row) e[c * W::rows + row] = means.labels[first + row] == c;
    });
    return maximisation();
  }

  template <class T>
  bool iterate(int64_t b, int64_t run) {  // is the result finite?
    now.log_likelihood = -INFINITY;
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
  void run(int64_t b) {
    data.load((const T*)a.x + b * a.x_stride,
              a.sample_weight ? (const T*)a.sample_weight + b * a.weight_stride : nullptr);
    keep_features();
    bool finite = true;
    for (int64_t r = 0; r < a.n_init && finite; ++r) {
      finite = iterate<T>(b, r);
      if (r && finite && !better(now.log_likelihood, best.log_likelihood)) continue;
      const Solution swap = best;
      best = now;
      now = swap;
    }
    write<T>(b, best, finite);
  }

  template <class T>
  void write(int64_t b, const Solution& from, bool finite) {
    const int64_t k = a.k, d = a.d;
    const auto put = [&](void* to, const double* numbers, int64_t count) {
      for (int64_t i = 0; i < count; ++i) ((T*)to)[b * count + i] = finite ? T(numbers[i]) : T(NAN);
    };
    for (int64_t c = 0; c < k; ++c)
      for (int64_t f = 0; f < d; ++f) from.means[c * d + f] += data.shift[f];
    put(a.weights, from.weights, k);
    put(a.log_weights, from.log_weights, k);
    put(a.means, from.means, k * d);
    put(a.covariances, from.covariances, matrix_numbers);
    put(a.precisions, from.precisions, matrix_numbers);
    for (int64_t c = 0; c < k; ++c) {
      a.status[b * k + c] = finite ? from.status[c] : uint8_t(kNotFinite);
      a.recovered[b * k + c] = from.recovered[c];
    }
    a.log_likelihood[b] = finite ? from.log_likelihood : NAN;
    a.iterations[b] = from.iterations;
    a.converged[b] = from.converged && finite;
  }
};

template <bool narrow>
static Status fit(const GmmFit& a, int threads) {
  threads = team(a.b * a.n * (a.k + 1) * (a.d + 1), threads);
  if (threads > a.b) threads = int(a.b);
  const int64_t size = Fitter<narrow>(a).take(nullptr);
  Scratch<double> memory(threads * size);
  if (!memory.ok()) return kOutOfMemory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Fitter<narrow> own(a);
    own.take(memory.get() + omp_get_thread_num() * size);
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < a.b; ++b) {
      if (a.dtype == kFloat64)
        own.template run<double>(b);
      else
        own.template run<float>(b);
    }
  }
  return kOk;
}

Status gmm_fit(const GmmFit& a, int threads) {
  if (a.b <= 0) return kOk;
  GmmInputs in{};
  in.k = a.k;
  in.d = a.d;
  in.covariance = a.covariance;
  return sums_of<double>(in).narrow ? fit<true>(a, threads) : fit<false>(a, threads);
}

}  // namespace

extern const GmmFitKernels gmm_fit_kernels;
const GmmFitKernels gmm_fit_kernels = {gmm_fit};

}  // namespace GMK_ISA_NS
}  // namespace gmk
